"""A clock for timeouts that does not count the time for which the process is suspended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_MAX_STEP_S = 5.0
"""The most that counts between two readings. Callers read the clock far more often than this."""


class RunningClock:
    """Returns the seconds for which this process has run. Thread-safe.

    Time for which the process was stopped does not count (Ctrl-Z, SLURM's suspend, a sleeping
    laptop): it made no progress then, but did not hang either. Setting the system time has no
    effect. At most 5 seconds count between two readings.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._read_at_s = clock()
        self._ran_s = 0.0

    def __call__(self) -> float:
        with self._lock:
            now = self._clock()
            self._ran_s += min(now - self._read_at_s, _MAX_STEP_S)
            self._read_at_s = now
            return self._ran_s
