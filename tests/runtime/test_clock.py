"""What counts is the time for which the process ran."""

from __future__ import annotations

from batchvlm.runtime.clock import RunningClock


def test_the_time_of_a_stopped_process_does_not_count() -> None:
    now = 1000.0
    clock = RunningClock(lambda: now)
    before = clock()
    for _ in range(3):
        now += 0.5
        clock()
    now += 7200.0  # stopped for two hours, then looked at again
    after = clock()
    now += 0.5
    assert clock() - after == 0.5
    assert 1.5 <= after - before < 10.0
