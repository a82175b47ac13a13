"""Which row of a dialog goes to the workers next, and when there is nothing to wait for."""

from __future__ import annotations

from typing import Any

from batchvlm.pipeline.turns import Turns

A: Any = "a"
B: Any = "b"
A_AGAIN: Any = "a, second turn"


def test_rows_that_return_go_before_those_that_have_not_begun() -> None:
    turns = Turns()
    to_pool = turns.to_pool([A, None, B])
    assert next(to_pool) is A
    turns.leave_pool()
    turns.requeue(A_AGAIN)
    # None: the input's next row is still on its way.
    assert [next(to_pool) for _ in range(3)] == [A_AGAIN, None, B]


def test_the_workers_are_asked_while_they_hold_rows_and_waited_for_otherwise() -> None:
    turns, idle = Turns(), []

    def answer() -> None:
        idle.append(turns.is_idle)
        if len(idle) == 1:
            turns.requeue(A_AGAIN)
        else:
            turns.end()
        idle.append(turns.is_idle)

    turns.on_idle = answer
    to_pool = turns.to_pool([A])
    assert [next(to_pool), next(to_pool), next(to_pool)] == [A, None, None]
    assert not turns.is_idle and not turns.is_over
    turns.leave_pool()
    # The engine is told that nothing comes before its answer, and no longer once that is here.
    assert next(to_pool) is A_AGAIN
    assert idle == [True, False] and not turns.is_idle
    turns.leave_pool()
    assert list(to_pool) == []
    assert idle[2] and turns.is_over and not turns.is_idle


def test_an_input_without_rows_is_over_at_once() -> None:
    turns = Turns()
    assert not turns.is_over
    assert list(turns.to_pool([])) == [] and turns.is_over


def test_whoever_leaves_waits_for_no_answer() -> None:
    with Turns() as turns:
        to_pool = turns.to_pool([A])
        assert next(to_pool) is A
        turns.leave_pool()
    assert list(to_pool) == []
    assert not turns.is_over
