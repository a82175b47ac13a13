"""Signals are those of this process and this job alone."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, signal
from batchvlm.runtime import signals

def interrupt():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    except signals.Interrupted:
        pass

# These tests may run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The second job of a sweep begins after the first has ignored all of them.
signals.catch_signals()
signals.ignore_signals()
signals.catch_signals()
assert signal.getsignal(signal.SIGHUP) is signals._interrupt

if (pid := os.fork()) == 0:
    interrupt()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert signals.interrupted_at_s() is None, "a child's signal"

interrupt()
first = signals.interrupted_at_s()
assert first is not None
assert signals.interrupted_at_s() == first
"""


def test_jobs_of_a_sweep_and_forked_children() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
