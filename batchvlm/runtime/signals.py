"""Signals that stop the process: the first one flushes, a second Ctrl-C exits at once."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from contextlib import suppress
from types import FrameType

from batchvlm.errors import ExitCode

# SIGUSR1 is SLURM's warning before the time limit (`--signal=USR1@120`), SIGTERM follows at the
# limit. SIGINT is Ctrl-C, and SIGHUP a closed terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_interrupted_at_s: float | None = None
_pipe: tuple[int, int] | None = None
"""Wakeup pipe, to which each signal's number is written at once. A Python handler runs only when
the main thread executes Python code, which a library call may delay."""


class Interrupted(BaseException):
    """A signal asked the process to stop. Not an `Exception`, so that no row's handler catches
    it."""


def catch_signals() -> None:
    """Install handlers that raise `Interrupted` in the main thread on the first stop signal."""
    global _interrupted_at_s, _pipe
    _interrupted_at_s = None
    for end in _pipe or ():
        os.close(end)
    _pipe = os.pipe()
    for end in _pipe:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        # Under nohup, SIGHUP stays ignored. The job scripts make the process ignore other signals
        # until it installs these handlers.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, _suspend)


def ignore_signals() -> None:
    """Ignore stop signals once everything is written: they would only interrupt clean-up."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupted_at_s() -> float | None:
    """Return the monotonic time of the first stop signal; None if there was none.

    A signal whose handler has not run yet gets the time of this call.
    """
    global _interrupted_at_s
    if _interrupted_at_s is None and _pipe is not None:
        with suppress(BlockingIOError):
            if any(number in STOP_SIGNALS for number in os.read(_pipe[0], 256)):
                _interrupted_at_s = time.monotonic()
    return _interrupted_at_s


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A launcher that forwards a Ctrl-C also sends SIGTERM, which must not stop the flush. A second
    # Ctrl-C does stop it.
    global _interrupted_at_s
    _interrupted_at_s = time.monotonic()
    for other in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGINT, _stop_at_once)
    raise Interrupted


def _suspend(number: int, frame: FrameType | None) -> None:
    # SIGTSTP comes from Ctrl-Z, and from SLURM before it suspends a job. The faulthandler timeout
    # of the watchdog counts suspended time, and would end the process when it resumes.
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    # Files are written atomically, so no clean-up is needed. Workers end with their parent.
    with suppress(OSError):
        os.write(
            2,
            b"\nbatchvlm: stopped at once; rows that were not on disk yet are computed again"
            b" by the same command\n",
        )
    os._exit(ExitCode.STOPPED)
