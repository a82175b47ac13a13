"""Which of several kernels is taken."""

from __future__ import annotations

import time

import pytest

from batchvlm.engine import race


def waits(milliseconds: float) -> object:
    return lambda: time.sleep(milliseconds / 1e3)


def test_the_fastest_wins() -> None:
    assert race.winner([waits(5), waits(1), waits(3)]) == 1


def test_the_first_stays_unless_another_is_clearly_faster() -> None:
    counts = [0, 0]

    def way(i: int, num: int) -> None:
        counts[i] += 1
        sum(range(num))

    assert race.winner([lambda: way(0, 50_000), lambda: way(1, 49_500)]) == 0
    assert min(counts) > 1


def test_a_way_that_does_not_work_here_is_out() -> None:
    def raises() -> None:
        raise RuntimeError("no instructions for this type")

    assert race.winner([waits(2), raises]) == 0
    assert race.winner([raises, waits(2)]) == 1


def test_an_error_of_another_kind_is_not_hidden() -> None:
    def is_wrong() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        race.winner([waits(1), is_wrong])
