"""A proxy before an HTTP server that answers with 500, answers late, or cuts connections."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

FAULTS = ("500", "slow", "cut before", "cut after")
"""`cut before`: the server never sees the request; `cut after`: nobody sees its answer."""
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class FlakyProxy:
    """Passes requests on, but for those that `choose` gives a fault. A context manager.

    Args:
        target: port of the server on this machine.
        choose: (method, path) -> a fault or None.
        slow_s: how late a slow answer is.
    """

    def __init__(
        self, target: int, choose: Callable[[str, str], str | None], *, slow_s: float = 0.6
    ) -> None:
        self.faults: Counter[str] = Counter()
        self.requests: set[tuple[str, str]] = set()
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def serve(self) -> None:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    fault = choose(self.command, self.path)
                    proxy.requests.add((self.command, self.path))
                    proxy.faults[fault or "none"] += 1
                if fault == "cut before":
                    return self.cut()
                if fault == "500":
                    return self.answer(500, [], b"<Error><Code>InternalError</Code></Error>")
                if fault == "slow":
                    time.sleep(slow_s)
                server = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                content = answer.read()
                server.close()
                if fault == "cut after":
                    return self.cut()
                return self.answer(answer.status, answer.getheaders(), content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

            def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
                try:
                    self.send_response_only(status)
                    length = str(len(content))
                    for name, value in headers:
                        if name.lower() not in _HOP_BY_HOP:
                            self.send_header(name, value)
                        elif name.lower() == "content-length" and self.command == "HEAD":
                            length = value
                    self.send_header("Content-Length", length)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # whoever asked did not wait so long

            def cut(self) -> None:
                # Closed without lingering: the other side sees a reset.
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()

            def finish(self) -> None:
                with suppress(OSError, ValueError):
                    super().finish()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]
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


def in_turn(every: int) -> Callable[[str, str], str | None]:
    """Give each `every`-th request a fault, one kind after the other."""
    count = 0

    def choose(method: str, path: str) -> str | None:
        nonlocal count
        count += 1
        return FAULTS[count // every % len(FAULTS)] if count % every == 0 else None

    return choose
