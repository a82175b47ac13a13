"""A web server on loopback that behaves as a test tells it to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Server:
    """Paths -> answers; a list of answers is gone through, its last one stays."""

    answers: dict[str, list[Answer] | Callable[[], Answer]]
    port: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """How often each path was asked for."""
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def answer(self, path: str) -> Answer:
        with self._lock:
            place = self.seen[path]
            self.seen[path] += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            found = self.answers.get(path, [(404, {}, b"")])
            return found() if callable(found) else found[min(place, len(found) - 1)]
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serve(answers: dict[str, Any], host: str = "127.0.0.1") -> Iterator[Server]:
    server = Server(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.headers.append(dict(self.headers))
            code, headers, body = server.answer(self.path)
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # the client has had enough
                self.wfile.write(body)
            if "Content-Length" in headers and not headers["Content-Length"]:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer((host, 0), Handler)
    http.daemon_threads = True
    http.block_on_close = False
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def image(data: bytes) -> list[Answer]:
    return [(200, {"Content-Type": "image/png"}, data)]
