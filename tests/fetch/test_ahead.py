"""Many images at once, in order, within their bounds, and a slow server costs its own rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from batchvlm.errors import ErrorType
from batchvlm.fetch.addresses import Allowed
from batchvlm.fetch.ahead import Fetcher
from batchvlm.fetch.client import FetchLimits
from batchvlm.records import Failure, Record
from tests.fetch.server import image, serve

LIMITS = FetchLimits(timeout_s=10.0, attempts=1, concurrency=8, max_image_bytes=1 << 20)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine nothing is overtaken that is not meant to be."""
    monkeypatch.setattr("batchvlm.fetch.ahead._PATIENCE_S", 60.0)


def record(row: int, *urls: str) -> Record:
    return Record(
        row=row, row_index=row, source_file="in", id=str(row), values={"image": list(urls)}
    )


def fetcher(limits: FetchLimits = LIMITS, **bounds: int) -> Fetcher:
    return Fetcher(Allowed(["127.0.0.1"]), limits, lambda r: r.values["image"], **bounds)


def rows_of(records: Sequence[Record]) -> list[int]:
    return [found.row for found in records]


def test_every_record_comes_back_once_in_order_with_its_images() -> None:
    answers = {f"/{i}.png": image(f"image {i}".encode()) for i in range(40)}
    with serve(answers) as server, fetcher() as ahead:
        wanted = [
            record(i, *(server.url(f"/{n}.png") for n in ((i,), (), (i, 0))[i % 3]))
            for i in range(40)
        ]
        found = list(ahead.ahead(wanted))
        assert rows_of(found) == list(range(40))
        for i, one in enumerate(found):
            names = ((i,), (), (i, 0))[i % 3]
            expected = {server.url(f"/{n}.png"): f"image {n}".encode() for n in names}
            assert one.fetched == expected
            assert replace(one, fetched={}) == wanted[i]


def test_images_are_fetched_at_the_same_time() -> None:
    # Each answer waits until four are asked for, which is all that one host may get of eight.
    together = threading.Barrier(4, timeout=30)

    def answer() -> Any:
        together.wait()
        return 200, {}, b"image"

    with serve({f"/{i}.png": answer for i in range(8)}) as server, fetcher() as ahead:
        found = list(ahead.ahead(record(i, server.url(f"/{i}.png")) for i in range(8)))
        assert all(list(one.fetched.values()) == [b"image"] for one in found)
        # The oldest row waits for no other.
        assert 4 <= server.most_at_once <= 5


def test_a_failure_is_its_rows_own() -> None:
    with serve({"/a.png": image(b"image")}) as server, fetcher() as ahead:
        bad = ["http://10.0.0.1/a.png", server.url("/none.png"), "s3://bucket/a.png"]
        found = list(ahead.ahead(record(i, url) for i, url in enumerate([*bad, bad[0]])))
        types = [next(iter(one.fetched.values())).error_type for one in found]  # type: ignore[union-attr]
    forbidden = ErrorType.FORBIDDEN
    assert types == [forbidden, ErrorType.MISSING_IMAGE, forbidden, forbidden]


def test_a_record_that_could_not_be_read_passes() -> None:
    broken = replace(
        record(0, "http://10.0.0.1/"),
        values={},
        failure=Failure(error_type=ErrorType.INPUT, message="broken"),
    )
    with fetcher() as ahead:
        assert list(ahead.ahead([broken])) == [broken]


def test_an_image_of_many_rows_is_fetched_once() -> None:
    with serve({"/a.png": image(b"image")}) as server, fetcher() as ahead:
        url = server.url("/a.png")
        found = list(ahead.ahead(record(i, url, url) for i in range(50)))
        assert [one.fetched for one in found] == [{url: b"image"}] * 50
        assert server.seen["/a.png"] == 1


def test_the_cache_is_bounded() -> None:
    answers = {f"/{i}.png": image(bytes(100)) for i in range(5)}
    with serve(answers) as server, fetcher(cache_bytes=250) as ahead:
        for i in (0, 1, 0, 2, 0, 1):
            list(ahead.ahead([record(0, server.url(f"/{i}.png"))]))
        assert server.seen == {"/0.png": 1, "/1.png": 2, "/2.png": 1}
        assert ahead._state.cached_bytes <= 250


def test_rows_behind_a_slow_server_are_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchvlm.fetch.ahead._PATIENCE_S", 0.0)
    rest_is_out = threading.Event()

    def slow() -> Any:
        rest_is_out.wait(30)
        return 200, {}, b"slow"

    answers: dict[str, Any] = {f"/{i}.png": image(b"image") for i in range(1, 60)}
    with serve(answers | {"/0.png": slow}) as server, fetcher() as ahead:
        found = []
        for one in ahead.ahead(record(i, server.url(f"/{i}.png")) for i in range(60)):
            found.append(one)
            if len(found) == 59:
                rest_is_out.set()
    assert sorted(rows_of(found)) == list(range(60))
    assert found[-1].row == 0
    assert list(found[-1].fetched.values()) == [b"slow"]


def test_bytes_are_bounded_and_the_oldest_row_is_never_held_up() -> None:
    size = 200_000
    answers = {f"/{i}.png": image(bytes(size)) for i in range(60)}
    most = 0

    def records(server: Any) -> Iterator[Record]:
        for i in range(60):
            # Two images a row, so that a row may have one while it waits for the other.
            yield record(i, server.url(f"/{i}.png"), server.url(f"/{59 - i}.png"))

    with serve(answers) as server, fetcher(max_bytes=500_000, cache_bytes=0) as ahead:
        for i, one in enumerate(ahead.ahead(records(server))):
            assert one.row == i
            assert all(len(data) == size for data in one.fetched.values())  # type: ignore[arg-type]
            most = max(most, ahead._state.gate.held_bytes)
        # The oldest row may go beyond, while the one before is still on its way out.
        assert most <= 500_000 + 4 * size


def test_rows_that_wait_are_bounded_by_their_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchvlm.fetch.ahead._PATIENCE_S", 0.0)
    read: list[int] = []
    rest = threading.Event()

    def slow() -> Any:
        rest.wait(30)
        return 200, {}, b"slow"

    def records(server: Any) -> Iterator[Record]:
        for i in range(20):
            read.append(i)
            one = record(i, *([server.url("/0.png")] if i == 0 else []))
            yield replace(one, kept={"image": bytes(1000)})

    with serve({"/0.png": slow}) as server, fetcher(max_bytes=3500) as ahead:
        found = ahead.ahead(records(server))
        assert next(found).row == 1
        assert len(read) <= 5
        rest.set()
        assert len(list(found)) == 19


def test_leaving_early_leaves_nothing_behind() -> None:
    done = threading.Event()

    def hang() -> Any:
        done.wait(20)
        return 200, {}, b""

    before = threading.active_count()
    with serve({"/a.png": hang}) as server:
        with fetcher() as ahead:
            next(ahead.ahead([record(0), record(1, server.url("/a.png"))]))
            ahead._start(record(2), [server.url("/a.png")])
        done.set()
    assert threading.active_count() <= before + 1
