"""Signals that stop the process: the first one flushes, a second Ctrl-C exits at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

from batchvlm.errors import ExitCode

# SIGUSR1 is SLURM's warning before the time limit (`--signal=USR1@120`), SIGTERM follows at the
# limit. SIGINT is Ctrl-C, and SIGHUP a closed terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_interrupted_at_s: float | None = None
_is_suspension_due = False
_is_nohup: bool | None = None
"""Whether SIGHUP was ignored when the program started; None before that."""
_pipe: tuple[int, int] | None = None
"""Wakeup pipe, to which each signal's number is written at once. A Python handler runs only when
the main thread executes Python code, which a library call may delay."""


class Interrupted(BaseException):
    """A signal asked the process to stop. Not an `Exception`, so that no row's handler catches
    it."""


def catch_signals() -> None:
    """Install handlers that raise `Interrupted` in the main thread on the first stop signal."""
    global _interrupted_at_s, _is_suspension_due, _is_nohup, _pipe
    _interrupted_at_s, _is_suspension_due = None, False
    if _is_nohup is None:
        _is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    for end in _pipe or ():
        os.close(end)
    _pipe = os.pipe()
    for end in _pipe:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        # The job scripts make the process ignore other signals until it installs these handlers.
        if number != signal.SIGHUP or not _is_nohup:
            signal.signal(number, _interrupt)


def ignore_signals() -> None:
    """Ignore stop signals once everything is written: they would only interrupt clean-up."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupted_at_s() -> float | None:
    """Return the monotonic time of the first stop signal; None if there was none.

    A signal whose handler has not run yet gets the time of this call.
    """
    _read_pipe()
    return _interrupted_at_s


def defer_suspension() -> bool:
    """Let SIGTSTP be noted for `take_suspension` and not stop the process.

    It comes from Ctrl-Z, and from SLURM two seconds before it stops a job.

    Returns:
        Whether it is noted; if so, call `allow_suspension` in the end. Only the main thread can
        install a handler, and a handler that is there already stays.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if _pipe is None or not is_main or signal.getsignal(signal.SIGTSTP) is not signal.SIG_DFL:
        return False
    signal.signal(signal.SIGTSTP, _do_nothing)
    return True


def allow_suspension() -> None:
    """Let SIGTSTP stop the process again."""
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def take_suspension() -> bool:
    """Whether a SIGTSTP came since the last call."""
    global _is_suspension_due
    _read_pipe()
    is_due, _is_suspension_due = _is_suspension_due, False
    return is_due


def _read_pipe() -> None:
    global _interrupted_at_s, _is_suspension_due
    if _pipe is None:
        return
    with suppress(BlockingIOError):
        numbers = os.read(_pipe[0], 256)
        _is_suspension_due |= signal.SIGTSTP in numbers
        if _interrupted_at_s is None and any(number in STOP_SIGNALS for number in numbers):
            _interrupted_at_s = time.monotonic()


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A launcher that forwards a Ctrl-C also sends SIGTERM, which must not stop the flush. A second
    # Ctrl-C does stop it.
    global _interrupted_at_s
    _interrupted_at_s = interrupted_at_s() or time.monotonic()
    for other in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGINT, _stop_at_once)
    raise Interrupted


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass  # the wakeup pipe has the signal


def _leave_pipe() -> None:
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


# The pipe of a forked child is its parent's, which would take the child's signals for its own.
os.register_at_fork(after_in_child=_leave_pipe)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    # Files are written atomically, so no clean-up is needed. Workers end with their parent.
    with suppress(OSError):
        os.write(
            2,
            b"\nbatchvlm: stopped at once; rows that were not on disk yet are computed again"
            b" by the same command\n",
        )
    os._exit(ExitCode.STOPPED)
