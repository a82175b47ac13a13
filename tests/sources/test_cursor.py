"""Forward reading goes on where it stopped, and never starts over without need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.sources.cursor import BrokenStreamError, Cursors


class Streams:
    """Streams of numbers in chunks, which count how often they are opened and closed."""

    def __init__(self, num_rows: int, chunk_rows: int = 4, bad_row: int | None = None) -> None:
        self.num_rows = num_rows
        self.chunk_rows = chunk_rows
        self.bad_row = bad_row
        self.num_opened = self.num_closed = self.num_read = 0
        self.cursors = Cursors(self.open)

    def open(self, key: str) -> Iterator[list[int]]:
        self.num_opened += 1
        try:
            for start in range(0, self.num_rows, self.chunk_rows):
                rows = list(range(start, min(start + self.chunk_rows, self.num_rows)))
                if self.bad_row in rows:
                    raise OSError("bad page")
                self.num_read += len(rows)
                yield rows
        finally:
            self.num_closed += 1

    def read(self, first_row: int, num_rows: int, key: str = "a") -> list[int]:
        return [row for chunk in self.cursors.read(key, first_row, num_rows) for row in chunk]


def test_ranges_further_ahead_go_on() -> None:
    streams = Streams(100)

    assert streams.read(0, 7) == list(range(7))
    assert streams.read(7, 6) == list(range(7, 13))
    assert streams.read(50, 3) == [50, 51, 52]
    assert streams.num_opened == 1
    assert streams.num_read <= 56


def test_going_back_opens_again() -> None:
    streams = Streams(100)

    assert streams.read(50, 10) == list(range(50, 60))
    assert streams.read(58, 2) == [58, 59]
    assert (streams.num_opened, streams.num_closed) == (2, 1)


def test_another_stream_closes_the_parked_one() -> None:
    streams = Streams(100)

    assert streams.read(3, 2, key="a") == [3, 4]
    assert streams.read(5, 2, key="b") == [5, 6]
    assert (streams.num_opened, streams.num_closed) == (2, 1)


def test_reads_at_the_same_time_do_not_disturb_each_other() -> None:
    streams = Streams(100)
    one = streams.cursors.read("a", 0, 40)
    two = streams.cursors.read("a", 40, 40)

    pairs = [(a, b) for a, b in zip(one, two, strict=True)]

    assert [row for a, _ in pairs for row in a] == list(range(40))
    assert [row for _, b in pairs for row in b] == list(range(40, 80))
    assert streams.num_opened == 2


def test_a_dropped_read_can_be_taken_up() -> None:
    streams = Streams(100)
    reader = streams.cursors.read("a", 0, 50)
    assert next(reader) == [0, 1, 2, 3]
    reader.close()  # type: ignore[attr-defined]

    assert streams.read(4, 3) == [4, 5, 6]
    assert streams.num_opened == 1


def test_a_short_stream_ends_short() -> None:
    streams = Streams(10)

    assert streams.read(8, 5) == [8, 9]
    assert streams.read(20, 5) == []


def test_a_broken_stream_is_not_tried_again_beyond_the_break() -> None:
    streams = Streams(100, bad_row=42)
    found = []
    with pytest.raises(BrokenStreamError, match="OSError: bad page"):
        for chunk in streams.cursors.read("a", 30, 30):
            found += chunk
    assert found == list(range(30, 40))
    assert streams.num_opened == 1

    with pytest.raises(BrokenStreamError, match="OSError: bad page"):
        streams.read(60, 5)
    assert streams.num_opened == 1
    assert streams.read(10, 5) == [10, 11, 12, 13, 14]


def test_a_stream_that_did_not_open_is_tried_again() -> None:
    streams = Streams(10, bad_row=0)
    with pytest.raises(BrokenStreamError, match="OSError: bad page"):
        streams.read(3, 2)

    streams.bad_row = None

    assert streams.read(5, 2) == [5, 6]


@given(
    st.integers(0, 60),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 30)), max_size=12),
)
def test_any_ranges_come_out_whole(
    num_rows: int, chunk_rows: int, wanted: list[tuple[int, int]]
) -> None:
    streams = Streams(num_rows, chunk_rows)

    for first_row, count in wanted:
        assert streams.read(first_row, count) == list(range(num_rows))[first_row:][:count]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_ranges_in_turn_read_every_row_once(num_rows: int, step: int, chunk_rows: int) -> None:
    streams = Streams(num_rows, chunk_rows)

    found = [row for first in range(0, num_rows, step) for row in streams.read(first, step)]

    assert found == list(range(num_rows))
    assert (streams.num_opened, streams.num_read) == (1, num_rows)
