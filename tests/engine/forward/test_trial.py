"""Which of several kernels is taken. The clock is the tests' own: each way moves it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from batchvlm.engine.forward import trial


class Clock:
    """Stands still but for the ways that are timed by it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_calls: list[int] = []

    def takes(self, *milliseconds: float) -> Callable[[], None]:
        """A way whose calls take so long, the last of them from then on."""
        way = len(self.num_calls)
        self.num_calls.append(0)

        def call() -> None:
            self.now_s += milliseconds[min(self.num_calls[way], len(milliseconds) - 1)] / 1e3
            self.num_calls[way] += 1

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    return clock


def test_the_fastest_wins(clock: Clock) -> None:
    assert trial.fastest([clock.takes(5), clock.takes(1), clock.takes(3)]) == 1
    assert trial.fastest([clock.takes(1), clock.takes(5), clock.takes(3)]) == 0


@pytest.mark.parametrize(("share", "expected"), [(0.99, 0), (0.951, 0), (0.949, 1)])
def test_the_first_stays_unless_another_is_clearly_faster(
    clock: Clock, share: float, expected: int
) -> None:
    assert trial.fastest([clock.takes(1.0), clock.takes(share)]) == expected
    assert min(clock.num_calls) > 1


def test_a_call_that_was_disturbed_does_not_decide(clock: Clock) -> None:
    """The first call of each way, and any that another process held up."""
    assert trial.fastest([clock.takes(90, 2), clock.takes(3)]) == 0
    assert trial.fastest([clock.takes(3), clock.takes(90, 90, 90, 90, 2)]) == 1


def test_a_way_that_does_not_work_here_is_out(clock: Clock) -> None:
    def raises() -> None:
        raise RuntimeError("no instructions for this type")

    assert trial.fastest([clock.takes(2), raises]) == 0
    assert trial.fastest([raises, clock.takes(2)]) == 1


def test_an_error_of_another_kind_is_not_hidden(clock: Clock) -> None:
    def is_wrong() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        trial.fastest([clock.takes(1), is_wrong])
