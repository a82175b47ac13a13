"""The thread that runs ahead: bounded, honest about errors, and gone when it should be."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from batchvlm.runtime.prefetch import Prefetcher


def prefetch(source: Iterator[int], **bounds: int) -> Prefetcher[int]:
    defaults = {"max_items": 100, "max_bytes": 10**6}
    return Prefetcher(source, size_of=lambda item: item, **(defaults | bounds))


def test_everything_in_order() -> None:
    with prefetch(iter(range(1000))) as ready:
        assert list(ready) == list(range(1000))


def test_an_error_arrives_where_it_happened() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise KeyError("lost")

    got = []
    with prefetch(source()) as ready, pytest.raises(KeyError, match="lost"):
        for item in ready:
            got.append(item)
    assert got == [0, 1, 2]


@pytest.mark.parametrize(
    ("bounds", "size", "ahead"),
    [({"max_items": 3}, 0, 3), ({"max_bytes": 50}, 10, 5), ({"max_bytes": 50}, 80, 1)],
)
def test_it_runs_ahead_no_further_than_allowed(
    bounds: dict[str, int], size: int, ahead: int
) -> None:
    pulled = 0
    moved = threading.Condition()

    def source() -> Iterator[int]:
        nonlocal pulled
        for _ in range(20):
            with moved:
                pulled += 1
                moved.notify_all()
            yield size

    def wait_for(count: int) -> None:
        with moved:
            assert moved.wait_for(lambda: pulled >= count, timeout=30)

    with prefetch(source(), **bounds) as ready:
        taken = iter(ready)
        for number in range(1, 10):
            next(taken)
            # One more than is ready is in the thread's hands.
            wait_for(min(20, number + ahead + 1))
            assert pulled <= number + ahead + 1


def test_leaving_early_ends_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    ready = prefetch(endless())
    with ready:
        next(iter(ready))
    assert not ready._thread.is_alive()
