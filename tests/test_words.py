"""Numbers and texts for people."""

from __future__ import annotations

import pytest

from batchvlm.words import (
    described,
    duration,
    first_line,
    large_number,
    num_bytes,
    number_of,
    one_line,
    printable,
)


def test_a_terminal_takes_no_orders_from_data() -> None:
    assert printable("a\x1b[2Jb\nc\td\x07\x9b\u202e") == "a [2Jb c d   "
    assert printable("a\x1b[2Jb\nc\td\x07\x9b", keep="\n\t") == "a [2Jb\nc\td  "


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (121, "2 min"),
        (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (1e7, "2,777 h 47 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_one_and_many() -> None:
    words = [number_of(n, w) for n, w in ((1, "row"), (0, "row"), (1200, "process"), (2, "batch"))]
    assert words == ["1 row", "0 rows", "1,200 processes", "2 batches"]


def test_large_numbers() -> None:
    assert [num_bytes(n) for n in (0, 512, 999.7, 2048, 6.53e6, 1.5e11, 2e15)] == [
        *("0 bytes", "512 bytes", "1 kB", "2.05 kB", "6.53 MB", "150 GB", "2e+03 TB"),
    ]
    assert [large_number(n) for n in (999, 1_634_000, 7_600_000_000)] == ["999", "1.63 M", "7.6 B"]


def test_an_error_of_many_lines_is_one() -> None:
    assert one_line(ValueError("no\n  such\tthing")) == "no such thing"
    assert len(one_line("x" * 999)) == 200
    assert described(ValueError("no\n  such\tthing")) == "ValueError: no such thing"
    assert described(TimeoutError()) == "TimeoutError"
    assert first_line(OSError("\n no such model \nTraceback")) == "no such model"
    assert first_line(KeyError()) == "KeyError"
