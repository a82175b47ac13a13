"""A server that stands in for vLLM, TGI and their like, and has the faults that a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server got."""

    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        """Content parts of the last message."""
        content = self.body["messages"][-1]["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        return "".join(part.get("text", "") for part in self.parts)

    @property
    def images(self) -> list[str]:
        """Their data: URIs."""
        return [p["image_url"]["url"] for p in self.parts if p["type"] == "image_url"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server says to it."""

    status: int = 200
    body: Any = None
    """JSON, or bytes as they are."""
    headers: Mapping[str, str] = field(default_factory=dict)


def chat(text: str, **changes: Any) -> Reply:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    choice |= {"finish_reason": "stop", **changes.pop("choice", {})}
    return Reply(body={"id": "x", "choices": [choice], "usage": usage, **changes})


def is_probe(request: Request) -> bool:
    return request.text == "Hello" and request.body["max_tokens"] == 1


def echo(request: Request) -> Reply:
    """An answer that says what was asked about how many images."""
    return chat(f"{request.text} [{len(request.images)}]")


class StandIn:
    """A context manager around a server on a loopback port of its own.

    Args:
        reply: called for each chat request but for probes, in the thread of its connection.
        port: 0 takes a free one.
    """

    def __init__(self, reply: Callable[[Request], Reply] = echo, *, port: int = 0) -> None:
        self.reply = reply
        self.probe: Callable[[Request], Reply] = lambda request: chat("Hi")
        self.models = Reply(body={"object": "list", "data": [{"id": "m"}]})
        self.requests: list[Request] = []
        """Chat requests in the order of their arrival, probes among them."""
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(owner.models if self.path == "/v1/models" else Reply(status=404))

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {key.lower(): value for key, value in self.headers.items()}
                request = Request(headers=headers, body=json.loads(text))
                with owner._lock:
                    owner.requests.append(request)
                if self.path != "/v1/chat/completions":
                    self._send(Reply(status=404, body={"detail": "Not Found"}))
                elif is_probe(request):
                    self._send(owner.probe(request))
                else:
                    self._send(owner.reply(request))

            def _send(self, reply: Reply) -> None:
                body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body)
                data = body if isinstance(body, bytes) else body.encode()
                self.send_response(reply.status)
                for key, value in reply.headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, *args: Any) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def rows(self) -> list[Request]:
        """Requests that are no probes."""
        return [request for request in self.requests if not is_probe(request)]

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
        self._thread.join()
