"""One address -> bytes: limits, faults, and what a server may make us wait for."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from batchvlm.errors import ErrorType, RowError
from batchvlm.fetch.addresses import Allowed
from batchvlm.fetch.client import Client, FetchLimits
from batchvlm.fetch.gate import Gate, Pass
from tests.fetch.server import Server, image, serve

LIMITS = FetchLimits(timeout_s=5.0, attempts=3, concurrency=4, max_image_bytes=1000)
LOOPBACK = Allowed(["127.0.0.1"])


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, []  # type: float, list[float]

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def fetch(url: str, limits: FetchLimits = LIMITS, clock: Time | None = None) -> bytes:
    passing = clock or Time()

    async def ask() -> bytes:
        client = Client(LOOPBACK, limits, sleep=passing.sleep, clock=lambda: passing.now)
        async with client:
            return await client.fetch(url, Pass(Gate(4, 1 << 20)))

    return asyncio.run(ask())


def failure(url: str, limits: FetchLimits = LIMITS, clock: Time | None = None) -> RowError:
    with pytest.raises(RowError) as caught:
        fetch(url, limits, clock)
    return caught.value


def test_an_image_is_its_bytes() -> None:
    with serve({"/a%20b.png?x=1": image(b"image")}) as server:
        assert fetch(server.url("/a%20b.png?x=1#part")) == b"image"
        (headers,) = server.headers
    assert headers["User-Agent"].startswith("batchvlm/")
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Authorization", "Cookie", "Referer"} & set(headers)


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_fault_is_tried_again(code: int) -> None:
    clock = Time()
    with serve({"/a.png": [(code, {}, b""), (code, {}, b""), *image(b"image")]}) as server:
        assert fetch(server.url("/a.png"), clock=clock) == b"image"
        assert server.seen["/a.png"] == 3
    first, second = clock.slept
    assert 0.25 <= first <= 0.75 and 0.5 <= second <= 1.5


def test_a_fault_that_stays_is_an_error_after_all_attempts() -> None:
    with serve({"/a.png": [(503, {}, b"")]}) as server:
        error = failure(server.url("/a.png"))
        assert server.seen["/a.png"] == LIMITS.attempts
    assert error.error_type is ErrorType.FETCH
    assert "503" in error.message


@pytest.mark.parametrize("form", ["7", "date"])
def test_retry_after_is_honoured(form: str) -> None:
    wait = form if form == "7" else email.utils.formatdate(time.time() + 30, usegmt=True)
    clock = Time()
    with serve({"/a.png": [(429, {"Retry-After": wait}, b""), *image(b"image")]}) as server:
        assert fetch(server.url("/a.png"), clock=clock) == b"image"
    # Of a date, what has passed since it was written is over.
    assert sum(clock.slept) == 7 if form == "7" else 0 < sum(clock.slept) <= 31


def test_retry_after_holds_for_all_rows_of_a_host() -> None:
    clock = Time()

    async def ask(server: Server) -> list[bytes]:
        client = Client(LOOPBACK, LIMITS, sleep=clock.sleep, clock=lambda: clock.now)
        async with client:
            row = Pass(Gate(4, 1 << 20))
            with pytest.raises(RowError):
                limits = replace(LIMITS, attempts=1)
                client._limits = limits
                await client.fetch(server.url("/busy.png"), row)
            return [await client.fetch(server.url("/a.png"), row) for _ in range(2)]

    with serve(
        {"/busy.png": [(503, {"Retry-After": "9"}, b"")], "/a.png": image(b"image")}
    ) as server:
        assert asyncio.run(ask(server)) == [b"image"] * 2
    assert clock.slept == [9.0]


def test_a_server_that_wants_too_long_a_wait_gets_none() -> None:
    clock = Time()
    with serve({"/a.png": [(429, {"Retry-After": "86400"}, b"")]}) as server:
        assert failure(server.url("/a.png"), clock=clock).error_type is ErrorType.FETCH
        assert server.seen["/a.png"] == 1
    assert clock.slept == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (404, ErrorType.MISSING_IMAGE),
        (410, ErrorType.MISSING_IMAGE),
        (401, ErrorType.FETCH),
        (403, ErrorType.FETCH),
        (206, ErrorType.FETCH),
    ],
)
def test_an_answer_that_is_final_is_not_tried_again(code: int, expected: ErrorType) -> None:
    with serve({"/a.png": [(code, {}, b"x")]}) as server:
        assert failure(server.url("/a.png")).error_type is expected
        assert server.seen["/a.png"] == 1


def test_a_server_that_is_not_there_is_tried_again() -> None:
    clock = Time()
    with serve({}) as server:
        url = server.url("/a.png")
    assert failure(url, clock=clock).error_type is ErrorType.FETCH
    assert len(clock.slept) == LIMITS.attempts - 1


def test_a_server_that_hangs_costs_its_row_the_time_limit() -> None:
    done = threading.Event()

    def hang() -> Any:
        done.wait(20)
        return 200, {}, b"late"

    with serve({"/a.png": hang}) as server:
        error = failure(server.url("/a.png"), replace(LIMITS, timeout_s=0.1, attempts=1))
        done.set()
    assert error.error_type is ErrorType.FETCH
    assert "longer than 0.1 s" in error.message


def test_redirects_have_an_end() -> None:
    with serve({"/a.png": [(302, {"Location": "/a.png"}, b"")]}) as server:
        assert "redirects" in failure(server.url("/a.png")).message
        assert server.seen["/a.png"] == 6


@pytest.mark.parametrize("told", [True, False])
def test_an_image_that_is_too_large_is_not_read_to_its_end(told: bool) -> None:
    big = b"x" * 500_000
    headers = {} if told else {"Content-Length": ""}
    with serve({"/a.png": [(200, headers, big)]}) as server:
        if told:
            assert failure(server.url("/a.png")).error_type is ErrorType.TOO_LARGE
        else:
            # One byte too many: whoever decodes it says that it is too large.
            assert len(fetch(server.url("/a.png"))) == LIMITS.max_image_bytes + 1


def test_nothing_is_unpacked() -> None:
    bomb = gzip.compress(b"\0" * 10_000_000)[:900]
    answer = [(200, {"Content-Encoding": "gzip"}, bomb)]
    with serve({"/a.png": answer}) as server:
        assert fetch(server.url("/a.png")) == bomb


def test_half_an_answer_is_a_fault() -> None:
    with serve({"/a.png": [(200, {"Content-Length": "900"}, b"half")]}) as server:
        # The connection is closed when the server is told to end.
        error = failure(server.url("/a.png"), replace(LIMITS, timeout_s=0.2, attempts=1))
    assert error.error_type is ErrorType.FETCH
