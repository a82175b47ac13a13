"""Ends a process that makes no progress, after a flush of its finished rows."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

from batchvlm.errors import ExitCode
from batchvlm.runtime.clock import RunningClock
from batchvlm.runtime.signals import (
    allow_suspension,
    defer_suspension,
    interrupted_at_s,
    take_suspension,
)

_CHECK_EVERY_S = 0.5
_JOIN_TIMEOUT_S = 2.0
"""How long `__exit__` waits for a call in progress."""
_LAST_RESORT_S = 60.0
_MAX_DELAY_S = 1.5
"""Between two checks; after a longer gap the process has been stopped, or was blocked."""


class Ticker:
    """Calls `action` every `every_s` seconds in a thread, until the context exits."""

    def __init__(self, action: Callable[[], None], *, every_s: float, name: str) -> None:
        self._action = action
        self._every_s = every_s
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()
        # A thread within a library call when the interpreter exits can crash it. The wait is short,
        # because the call may hang on a disk that does not respond.
        self._thread.join(timeout=_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_stopped.wait(self._every_s):
            self._action()


class Watchdog(Ticker):
    """Flushes and exits when the main thread no longer can.

    It does so in two cases: no row was finished for `stall_timeout_s`, or the run is not over
    `grace_s` after a signal. The exit code is 75, because a rerun resumes from the flushed rows.

    A library that hangs while it holds the GIL blocks this thread too. In that case `faulthandler`,
    whose timer runs in C, prints the stacks and exits with code 1, without a flush. That timer
    counts the time for which the process is suspended, so it is cancelled before a suspension.

    Args:
        stall_timeout_s: seconds; None waits forever.
        grace_s: seconds from a signal to the exit.
        flush: writes finished rows to disk; given at most `grace_s`.
        clock: seconds; by default a `RunningClock`.
        exit: ends the process.
    """

    def __init__(
        self,
        *,
        stall_timeout_s: float | None,
        grace_s: float,
        flush: Callable[[], None] = lambda: None,
        clock: Callable[[], float] | None = None,
        exit: Callable[[int], object] = os._exit,
    ) -> None:
        super().__init__(self._check, every_s=min(_CHECK_EVERY_S, grace_s), name="watchdog")
        self._stall_timeout_s = stall_timeout_s
        self._grace_s = grace_s
        self._flush = flush
        self._clock = clock or RunningClock()
        self._exit = exit
        self._beat_at_s: float | None = None
        self._checked_at_s = time.monotonic()
        self._defers_suspension = False

    def __enter__(self) -> Self:
        if self._stall_timeout_s is not None:
            self._defers_suspension = defer_suspension()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        faulthandler.cancel_dump_traceback_later()
        if self._defers_suspension:
            allow_suspension()

    def beat(self) -> None:
        """Record progress. Stalls are detected only after the first call."""
        self._beat_at_s = self._clock()

    def _check(self) -> None:
        delay_s = time.monotonic() - self._checked_at_s
        # After a gap the process was stopped for this signal, or another, and has been resumed.
        if take_suspension() and delay_s < self._every_s + _MAX_DELAY_S:
            faulthandler.cancel_dump_traceback_later()
            os.kill(os.getpid(), signal.SIGSTOP)
        self._checked_at_s = time.monotonic()
        now = self._clock()
        signalled_at_s = interrupted_at_s()
        if signalled_at_s is not None and time.monotonic() - signalled_at_s > self._grace_s:
            reason = f"still busy runtime.grace_s={self._grace_s:g} after the signal"
            self.end(reason, with_stacks=True)
        if self._stall_timeout_s is None or self._beat_at_s is None:
            return
        if now - self._beat_at_s > self._stall_timeout_s:
            reason = f"no row was finished for runtime.stall_timeout_s={self._stall_timeout_s:g}"
            self.end(reason, with_stacks=True)
        file = sys.__stderr__
        if file is not None:
            faulthandler.dump_traceback_later(
                self._stall_timeout_s + self._grace_s + _LAST_RESORT_S, exit=True, file=file
            )

    def end(self, reason: str, *, with_stacks: bool = False) -> None:
        """Flush and exit with 75.

        Args:
            with_stacks: print the stack of every thread first.
        """
        is_flushed = threading.Event()

        def flush() -> None:
            self._flush()
            is_flushed.set()

        # In another thread, because the disk may be what hangs.
        thread = threading.Thread(target=flush, name="last-flush", daemon=True)
        try:
            if (file := sys.__stderr__) is not None and with_stacks:
                print(f"batchvlm: {reason}; where every thread is:", file=file, flush=True)
                faulthandler.dump_traceback(file)
            thread.start()
            thread.join(self._grace_s)
            if file is not None:
                outcome = (
                    "finished rows are" if is_flushed.is_set() else "not all finished rows are"
                )
                print(
                    f"batchvlm: error: {reason}; {outcome} on disk; run the same command again",
                    file=file,
                    flush=True,
                )
        finally:
            self._exit(ExitCode.INTERRUPTED)
