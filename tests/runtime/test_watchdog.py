"""A run that does not get on ends by itself, with its finished rows on disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from batchvlm.errors import ExitCode, OutputError
from batchvlm.runtime import watchdog as watchdog_module
from batchvlm.runtime.watchdog import Ticker, Watchdog


class Exit:
    """Takes the place of `os._exit`."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.is_called = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.is_called.set()
        threading.Event().wait()  # the real one does not come back either


def watch(flush: Callable[[], None], exit: Exit, **changes: float | None) -> Watchdog:
    limits = {"stall_timeout_s": 1.0, "grace_s": 0.5} | changes
    return Watchdog(
        stall_timeout_s=limits["stall_timeout_s"],
        grace_s=limits["grace_s"] or 0.1,
        flush=flush,
        exit=exit,
    )


def test_no_beat_for_too_long_prints_stacks_flushes_and_exits(
    capfd: pytest.CaptureFixture[str],
) -> None:
    flushed = threading.Event()
    exit = Exit()
    with watch(flushed.set, exit) as watchdog:
        watchdog.beat()
        assert exit.is_called.wait(60)
    assert flushed.is_set()
    assert exit.codes == [ExitCode.INTERRUPTED]
    said = capfd.readouterr().err
    assert "no row was finished for runtime.stall_timeout_s=1" in said
    assert "test_no_beat_for_too_long" in said and "finished rows are on disk" in said


def test_a_flush_that_hangs_does_not_keep_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    never, exit = threading.Event(), Exit()
    with watch(lambda: never.wait(600) and None, exit) as watchdog:
        watchdog.beat()
        assert exit.is_called.wait(60)
    never.set()
    assert exit.codes == [ExitCode.INTERRUPTED]
    assert "not all finished rows are on disk" in capfd.readouterr().err


def full_disk() -> None:
    raise OutputError("no room")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_flush_that_fails_is_not_called_a_success(capfd: pytest.CaptureFixture[str]) -> None:
    exit = Exit()
    with watch(full_disk, exit) as watchdog:
        watchdog.beat()
        assert exit.is_called.wait(60)
    assert exit.codes == [ExitCode.INTERRUPTED]
    assert "not all finished rows are on disk" in capfd.readouterr().err


def test_beats_and_null_keep_it_quiet() -> None:
    now = [0.0]
    exit = Exit()
    beating = Watchdog(stall_timeout_s=10, grace_s=1, clock=lambda: now[0], exit=exit)
    beating._check()  # no beat yet: the model loads
    for now[0] in (100.0, 109.0, 118.0, 127.0):
        beating.beat()
        now[0] += 9.9
        beating._check()
    forever = Watchdog(stall_timeout_s=None, grace_s=1, clock=lambda: now[0], exit=exit)
    forever.beat()
    now[0] += 1e9
    forever._check()
    watchdog_module.faulthandler.cancel_dump_traceback_later()
    assert exit.codes == []


def test_a_signal_that_nobody_heeds(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flushed, exit = threading.Event(), Exit()
    monkeypatch.setattr(watchdog_module, "interrupted_at_s", time.monotonic)
    with watch(flushed.set, exit, stall_timeout_s=None):
        assert not exit.is_called.wait(0.2)
        at_s = time.monotonic()
        monkeypatch.setattr(watchdog_module, "interrupted_at_s", lambda: at_s)
        assert exit.is_called.wait(60)
    assert flushed.is_set() and exit.codes == [ExitCode.INTERRUPTED]
    assert "still busy runtime.grace_s=0.5 after the signal" in capfd.readouterr().err


def test_a_ticker_ticks_until_it_is_left() -> None:
    ticks = []
    twice = threading.Event()

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            twice.set()

    with Ticker(tick, every_s=0.01, name="tick") as ticker:
        assert twice.wait(60)
    assert not ticker._thread.is_alive()


def test_leaving_waits_for_a_call_that_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end, is_over = threading.Event(), threading.Event(), False

    def tick() -> None:
        nonlocal is_over
        begun.set()
        is_over = may_end.wait(60)

    with Ticker(tick, every_s=0.01, name="tick") as ticker:
        assert begun.wait(60)
        join = ticker._thread.join

        def waiting(timeout: float | None = None) -> None:
            may_end.set()  # no sooner than it is waited for
            join(timeout)

        monkeypatch.setattr(ticker._thread, "join", waiting)
    assert is_over


def test_leaving_waits_for_no_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "_JOIN_TIMEOUT_S", 0.1)
    begun, may_end = threading.Event(), threading.Event()

    def tick() -> None:
        begun.set()
        may_end.wait(60)

    with Ticker(tick, every_s=0.01, name="tick") as ticker:
        assert begun.wait(60)
    assert ticker._thread.is_alive()
    may_end.set()


def test_a_library_that_hangs_with_pythons_lock_held_ends_too() -> None:
    code = (
        "import ctypes\n"
        "from batchvlm.runtime import watchdog\n"
        "watchdog._LAST_RESORT_S = 0.5\n"
        "with watchdog.Watchdog(stall_timeout_s=1, grace_s=0.5) as dog:\n"
        "    dog.beat()\n"
        "    dog._check()\n"
        "    ctypes.PyDLL(None).sleep(300)\n"  # PyDLL keeps the lock
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "most recent call first" in done.stderr
    assert time.monotonic() - start < 100


def at_work(code: str) -> subprocess.Popen[str]:
    """A process with this code, once it has said that it is at work."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "at work\n"
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="reads the state of a process in /proc")
@pytest.mark.parametrize("call", ["sys.stdin.readline()", "ctypes.CDLL(None).system(b'read line')"])
def test_a_suspended_process_goes_on_afterwards(call: str) -> None:
    """Also where the main thread is in a library, so that no handler of Python's runs."""
    code = (
        "import ctypes, sys, time\n"
        "from batchvlm.runtime import clock, signals, watchdog\n"
        "watchdog._LAST_RESORT_S, clock._MAX_STEP_S = 0.2, 0.6\n"
        "signals.catch_signals()\n"
        "with watchdog.Watchdog(stall_timeout_s=1, grace_s=0.1) as dog:\n"
        "    dog.beat()\n"
        "    dog._check()\n"
        "    print('at work', flush=True)\n"
        f"    {call}\n"
    )
    with at_work(code) as process:
        process.send_signal(signal.SIGTSTP)
        end = time.monotonic() + 60
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(1.6)  # longer than the last resort waits
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate("\n", timeout=60)
    assert process.returncode == 0, said


# A call that says when it is begun, and waits where no signal is heard, without Python's lock.
DEAF = """
import ctypes, sys
from batchvlm.runtime import signals, watchdog
signals.catch_signals()
flush = lambda: print("flushed", flush=True)
with watchdog.Watchdog(stall_timeout_s=None, grace_s=0.5, flush=flush):
    ctypes.CDLL(None).system(b"echo at work; read line")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux's C library waits")
def test_a_signal_during_a_call_that_does_not_come_back_is_heard() -> None:
    with at_work(DEAF) as process:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)  # what it waits for is a pipe that stays open
        finally:
            process.kill()
            out, said = process.communicate()
    assert (process.returncode, out) == (ExitCode.INTERRUPTED, "flushed\n"), said
    assert "still busy runtime.grace_s=0.5 after the signal" in said
