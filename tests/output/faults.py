"""Faults at the calls that change the disk: the fixture `fault_points`."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchvlm.output import disk as disk_module


class Killed(BaseException):
    """Stands for SIGKILL: passes every `except`, and afterwards no call has an effect."""


class FaultPoint:
    """Counts the calls that change the disk, and lets the `fatal`-th one go wrong.

    Args:
        fatal: which call; -1: none.
        mode: `refused` (the call fails), `full` (from here on no write has room), `half` (it has
            effect, or half of it where it writes, and fails all the same), `killed` (the process
            dies before), `killed after`.
    """

    def __init__(self, fatal: int, mode: str) -> None:
        self.fatal = fatal
        self.mode = mode
        self.num_calls = 0
        self.is_dead = False

    def call(self, function: Any, *args: Any, half: Any = None, **kwargs: Any) -> Any:
        if self.is_dead:
            raise Killed
        is_fatal = self.num_calls == self.fatal
        self.num_calls += 1
        if self.mode == "full" and 0 <= self.fatal < self.num_calls and half is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not is_fatal or self.mode == "full":
            return function(*args, **kwargs)
        if self.mode in ("half", "killed after"):
            (half or function)(*args, **kwargs)
        if self.mode.startswith("killed"):
            self.is_dead = True
            raise Killed
        raise OSError(errno.EIO, "injected")


@pytest.fixture
def fault_points(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FaultPoint]]:
    """A list; its last element watches over every call of the output folder."""
    points = [FaultPoint(-1, "refused")]

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            write = super().write
            return int(
                points[-1].call(write, data, half=lambda data: write(data[: len(data) // 2]))
            )

    def make_empty(path: Path, mode: str) -> None:
        File(path, mode).close()

    def open_file(path: Path, mode: str) -> io.BufferedWriter:
        return io.BufferedWriter(points[-1].call(File, path, mode, half=make_empty))

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: points[-1].call(real, *a, **k))

    # A process that dies loses nothing that it did not sync: only a machine does. So, for speed:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for name in ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir"):
        watch(os, name)
    monkeypatch.setattr(disk_module, "open", open_file, raising=False)
    yield points
    points.append(FaultPoint(-1, "refused"))
