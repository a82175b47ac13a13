"""Samples are gathered as far as there is room, and waited for only where that is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from batchvlm.config import BatchingConfig
from batchvlm.engine.slots.feed import Feed
from batchvlm.records import Sample

from ...conftest import make_sample


class Stream:
    """Of `num_samples` samples and the end behind them, the first `num_ready` are ready."""

    def __init__(self, num_samples: int, num_ready: int = 0, num_tokens: int = 4) -> None:
        self.samples = [make_sample(i, num_tokens) for i in range(num_samples)]
        self.num_ready = num_ready
        self.num_taken = self.num_waits = 0

    def is_ready(self) -> bool:
        return self.num_taken < self.num_ready

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.samples:
            self._count()
            yield sample
        self._count()

    def _count(self) -> None:
        self.num_waits += not self.is_ready()
        self.num_taken += 1


def rows(feed: Feed) -> list[int]:
    """The rows of a new window."""
    feed.open_window()
    return more(feed)


def more(feed: Feed) -> list[int]:
    """The rows that join the window that is open."""
    return [sample.row_index for sample in feed.take()]


def test_it_never_waits_where_it_may_not() -> None:
    stream = Stream(6, num_ready=2)
    feed = Feed(stream, BatchingConfig())
    for _ in range(3):
        feed.gather(wait=False)
    assert (len(feed), stream.num_waits) == (2, 0)
    assert rows(feed) == [0, 1]
    assert len(feed) == 0 and not feed.is_done


def test_it_waits_for_one_at_most() -> None:
    stream = Stream(6)
    feed = Feed(stream, BatchingConfig())
    feed.gather(wait=True)
    feed.gather(wait=True)
    assert (rows(feed), stream.num_waits) == ([0], 1)
    feed.gather(wait=True)
    stream.num_ready = 5
    feed.gather(wait=True)
    assert (rows(feed), stream.num_waits) == ([1, 2, 3, 4], 2)


def test_the_end_is_taken_note_of() -> None:
    stream = Stream(2, num_ready=3)
    feed = Feed(stream, BatchingConfig())
    feed.gather(wait=False)
    assert feed.is_done and len(feed) == 2
    feed.gather(wait=True)
    assert rows(feed) == [0, 1]
    empty = Feed([], BatchingConfig())
    empty.gather(wait=True)
    assert empty.is_done and not len(empty)


def test_an_end_that_is_not_ready_is_not_waited_for_beside_a_sample() -> None:
    stream = Stream(1, num_ready=1)
    feed = Feed(stream, BatchingConfig())
    feed.gather(wait=True)
    assert (len(feed), feed.is_done, stream.num_waits) == (1, False, 0)


def test_a_plain_list_is_always_ready() -> None:
    feed = Feed([make_sample(i) for i in range(5)], BatchingConfig())
    feed.gather(wait=False)
    assert feed.is_done and rows(feed) == [0, 1, 2, 3, 4]


@given(
    num_samples=st.integers(0, 20),
    max_items=st.integers(1, 8),
    max_samples_bytes=st.integers(1, 8),
    waits=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=8),
)
def test_windows_are_bounded_and_in_order(
    num_samples: int, max_items: int, max_samples_bytes: int, waits: list[Any]
) -> None:
    stream = Stream(num_samples)
    one = make_sample(0, 4).size_bytes
    cfg = BatchingConfig(sort_window=max_items, max_window_bytes=one * max_samples_bytes)
    feed = Feed(stream, cfg)
    taken: list[int] = []
    for num_more, wait in [*waits, (num_samples + 1, True)]:
        stream.num_ready += num_more
        while not feed.is_done:
            before = stream.num_waits
            feed.gather(wait=wait)
            assert stream.num_waits <= before + wait
            assert len(feed) <= min(max_items, max_samples_bytes)
            window = rows(feed)
            taken += window
            if not window:
                break
    assert taken == list(range(num_samples))


def test_samples_join_a_window_until_it_is_full() -> None:
    stream = Stream(9, num_ready=2)
    feed = Feed(stream, BatchingConfig(sort_window=4))
    feed.gather(wait=False)
    assert rows(feed) == [0, 1]
    assert not feed.can_take
    stream.num_ready = 8
    feed.gather(wait=False)
    assert len(feed) == 4 and feed.can_take
    assert more(feed) == [2, 3]
    assert len(feed) == 2 and not feed.can_take
    feed.gather(wait=False)
    assert (more(feed), len(feed)) == ([], 4)
    assert rows(feed) == [4, 5, 6, 7]


def test_a_window_has_room_for_so_many_bytes() -> None:
    one = make_sample(0, 4).size_bytes
    stream = Stream(6, num_ready=1)
    feed = Feed(stream, BatchingConfig(max_window_bytes=2 * one + 1))
    feed.gather(wait=False)
    assert rows(feed) == [0]
    stream.num_ready = 6
    feed.gather(wait=False)
    assert len(feed) == 3
    # As one is let in that begins below the limit.
    assert (more(feed), len(feed)) == ([1, 2], 1)
    feed.gather(wait=False)
    assert len(feed) == 3
