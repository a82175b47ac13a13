"""A stand-in for the Hub: as much of its HTTP API as sending a dataset and reading it takes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

import fsspec
import pytest
from huggingface_hub import constants

TOKEN = "hf_not_to_be_printed"


@contextmanager
def on_the_hub(patch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that all libraries take for the Hub."""
    with HubServer(TOKEN) as server:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Its own protocol for pieces of files; the stand-in speaks the one before it.
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_TOKEN", TOKEN)
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        yield server
    fsspec.get_filesystem_class("hf").clear_instance_cache()


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
        self.requests: Counter[str] = Counter()
        """By what was asked for: `tree`, `resolve`, ..."""
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
                path, _, query = self.path.partition("?")
                if match := re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/main/(.*)", path):
                    hub.requests["resolve"] += 1
                    return self.send_file(hub.files.get(unquote(match[1])))
                status, content = hub.answer(self.command, path, body, query)
                return self.answer(status, content)

            def send_file(self, content: bytes | None) -> None:
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                status, data = 200, content or b""
                if content is None:
                    status = 404
                elif asked:
                    status, data = 206, data[int(asked[1]) : int(asked[2]) + 1]
                    status = 206 if int(asked[1]) < len(content) else 416
                self.send_response_only(status)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

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

    def answer(self, method: str, path: str, body: bytes, query: str = "") -> tuple[int, Any]:
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
            case "GET", ["tree", "main", *folder]:
                self.requests["tree"] += 1
                found = self._tree(
                    "/".join(map(unquote, folder)), "recursive=true" in query.lower()
                )
                is_there = found or not folder
                return (200, found) if is_there else (404, {"error": "Entry not found"})
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        return 404, {"error": f"{method} {path}"}

    def _tree(self, folder: str, is_recursive: bool) -> list[dict[str, Any]]:
        """Files and folders in a folder, or below it."""
        start = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for name, content in self.files.items():
            if not name.startswith(start):
                continue
            parts = name.removeprefix(start).split("/")
            for depth in range(1, len(parts) if is_recursive else min(len(parts), 2)):
                place = start + "/".join(parts[:depth])
                found[place] = {"type": "directory", "path": place, "size": 0, "oid": "0"}
            if len(parts) == 1 or is_recursive:
                found[name] = {"type": "file", "path": name, "size": len(content), "oid": "0"}
        return list(found.values())

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
