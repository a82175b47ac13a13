"""The seconds that count where something may take so long and no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_MAX_STEP_S = 5.0
"""Of the time between two looks no more counts; whoever uses the clock looks far more often."""


class RunningClock:
    """Seconds for which this process ran, as far as somebody looked; for any thread.

    Those for which it was stopped do not count (Ctrl-Z, SLURM's suspend, a laptop that sleeps):
    nothing got on, and nothing hung. Nor does it follow a clock that is set.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at_s = clock()
        self._ran_s = 0.0

    def __call__(self) -> float:
        with self._lock:
            now = self._clock()
            self._ran_s += min(now - self._looked_at_s, _MAX_STEP_S)
            self._looked_at_s = now
            return self._ran_s
