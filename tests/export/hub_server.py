"""A stand-in for the Hub: as much of its HTTP API as sending a dataset takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class HubServer:
    """Keeps what is committed; a context manager.

    Args:
        token: who asks without it is refused.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.files: dict[str, bytes] = {}
        """Of the one repository: name -> content."""
        self.created: dict[str, Any] | None = None
        self.commits: list[str] = []
        self.uploads: list[str] = []
        """Digest of each file that was sent, as often as it was."""
        self.refused_upload: int | None = None
        """The number of the upload that fails."""
        self._blobs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                is_upload = self.path.startswith("/upload/")
                if not is_upload and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.answer(401, {"error": "Invalid username or password."})
                status, content = hub.answer(self.command, self.path.partition("?")[0], body)
                return self.answer(status, content)

            do_GET = do_PUT = do_POST = do_HEAD = serve

            def answer(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response_only(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON content of one request."""
        match method, path.strip("/").split("/"):
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(body)
                if self.created is not None:
                    url = f"{self.url}/datasets/me/{asked['name']}"
                    return 409, {"error": "You already created this dataset repo", "url": url}
                self.created = asked
                return 200, {"url": f"{self.url}/datasets/me/{asked['name']}"}
            case "POST", ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case "PUT", ["upload", oid]:
                if len(self.uploads) == self.refused_upload:
                    self.refused_upload = None
                    return 403, {"error": "no room"}
                self.uploads.append(oid)
                self._blobs[oid] = body
                return 200, {}
        if self.created is None:
            return 404, {"error": "Repository not found"}
        match method, path.strip("/").split("/")[4:]:
            case "POST", ["preupload", "main"]:
                files = json.loads(body)["files"]
                return 200, {"files": [self._mode(file) for file in files]}
            case "POST", ["info", "lfs", "objects", "batch"] | ["lfs", "objects", "batch"]:
                return 200, self._batch(json.loads(body))
            case "POST", ["commit", "main"]:
                return self._commit(body)
            case "GET", ["revision", _] | []:
                return 200, {"id": "me/x", "siblings": [{"rfilename": n} for n in self.files]}
            case "GET", ["tree", "main", *_]:
                return 200, [
                    {"type": "file", "path": n, "size": len(c), "oid": "0"}
                    for n, c in self.files.items()
                ]
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        return 404, {"error": f"{method} {path}"}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        kind = "lfs" if file["path"].endswith(".parquet") else "regular"
        return {"path": file["path"], "uploadMode": kind, "shouldIgnore": False}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        def entry(item: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"{self.url}/upload/{item['oid']}"}}
            return item | ({} if item["oid"] in self._blobs else {"actions": upload})

        return {"transfer": "basic", "objects": [entry(item) for item in asked["objects"]]}

    def _commit(self, body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    self.commits.append(value["summary"])
                case "lfsFile":
                    content = self._blobs[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    self.files[value["path"]] = content
                case "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    del self.files[value["path"]]
        oid = f"{len(self.commits):040x}"
        return 200, {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.url}/datasets/me/x/commit/{oid}",
        }
