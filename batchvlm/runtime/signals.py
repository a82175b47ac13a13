"""Signals that ask the process to stop: the first one flushes, a second Ctrl-C does not wait."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from contextlib import suppress
from types import FrameType

from batchvlm.errors import ExitCode

# What SLURM sends before the time is up (`--signal=USR1@120`), what it sends then, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_interrupted_at_s: float | None = None
_pipe: tuple[int, int] | None = None
"""Each signal's number goes through it at once: a handler waits until the main thread is at Python,
which a call into a library may keep it from."""


class Interrupted(BaseException):
    """A signal asked the process to stop. Not an `Exception`: no row may swallow it."""


def catch_signals() -> None:
    """From here on raise `Interrupted` in the main thread, wherever it is, on the first signal."""
    global _interrupted_at_s, _pipe
    _interrupted_at_s = None
    for end in _pipe or ():
        os.close(end)
    _pipe = os.pipe()
    for end in _pipe:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        # Started by nohup, a process outlives its terminal. The job scripts have it ignore others
        # until it can handle them.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, _suspend)


def ignore_signals() -> None:
    """All is written: a signal from here on would only be raised in somebody's clean-up."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupted_at_s() -> float | None:
    """When the first signal came, by the monotonic clock; None where none did.

    One that the main thread could not handle yet comes when somebody asks.
    """
    global _interrupted_at_s
    if _interrupted_at_s is None and _pipe is not None:
        with suppress(BlockingIOError):
            if any(number in STOP_SIGNALS for number in os.read(_pipe[0], 256)):
                _interrupted_at_s = time.monotonic()
    return _interrupted_at_s


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A launcher that passes a Ctrl-C on sends SIGTERM too: it must not stop the flush. A second
    # Ctrl-C does.
    global _interrupted_at_s
    _interrupted_at_s = time.monotonic()
    for other in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGINT, _stop_at_once)
    raise Interrupted


def _suspend(number: int, frame: FrameType | None) -> None:
    # Ctrl-Z, and what SLURM says before it suspends a job. The watchdog's last resort, which cannot
    # tell how long the process was stopped, would end it as soon as it goes on.
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    # Every file is whole or not there, so nothing needs to be put right. Workers see that their
    # parent is gone.
    with suppress(OSError):
        os.write(
            2,
            b"\nbatchvlm: stopped at once; rows that were not on disk yet are computed again"
            b" by the same command\n",
        )
    os._exit(ExitCode.STOPPED)
