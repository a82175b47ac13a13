"""Kills and faults: whatever happens, going on gives the output of a job that nothing hit."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchvlm.errors import OutputError
from batchvlm.output import folder as folder_module
from batchvlm.output.folder import OutputFolder

from .job import run_job
from .make import make_plan, make_result, open_writer, read_data, undisturbed


def check_promises(folder: OutputFolder, num_shards: int, num_rows: int) -> dict[int, set[int]]:
    """What holds at every instant; returns the rows on disk of each shard."""
    plan = make_plan(num_shards, num_rows)
    parts = sorted(folder.data.glob("*")) if folder.data.exists() else []
    for path in parts:
        index = int(pq.read_schema(path).metadata[b"batchvlm.shard"])
        first = plan[index].first_row_index
        whole = list(range(first, first + plan[index].num_rows))
        assert pq.read_table(path)["row_index"].to_pylist() == whole
    return {
        shard.index: set(open_writer(folder, plan, shard.index).finished_rows) for shard in plan
    }


def test_sigkill_at_random_instants(tmp_path: Path) -> None:
    num_shards, num_rows = 4, 100  # Far more than ten attempts get done before they are killed.
    draw = random.Random(6)
    folder = OutputFolder(tmp_path / "out")
    promised: dict[int, set[int]] = {index: set() for index in range(num_shards)}
    num_kills = 0
    for attempt in range(100):
        job = [*(sys.executable, "-m", f"{__package__}.job"), str(folder.root)]
        with subprocess.Popen(
            [*job, str(num_shards), str(num_rows), str(attempt)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            # It works on while these lines are read, so the kill can hit any instruction.
            lines = [process.stdout.readline() for _ in range(draw.randrange(16))]
            if num_kills < 10:
                process.kill()
            lines += process.stdout.readlines()
        is_killed = process.returncode < 0
        for line in lines:
            if line.endswith("\n"):
                word, shard, row = line.split()
                whole = range(make_plan(num_shards, num_rows)[int(shard)].num_rows)
                promised[int(shard)] |= {int(row)} if word == "flushed" else set(whole)
        finished = check_promises(folder, num_shards, num_rows)
        assert all(promised[index] <= finished[index] for index in promised)
        if not is_killed:
            assert process.returncode == 0, "".join(lines)
            break
        num_kills += 1
    assert num_kills == 10
    plan = make_plan(num_shards, num_rows)
    assert read_data(folder).equals(undisturbed(plan, tmp_path / "plain"))
    assert [shard.index for shard in plan if folder.list_segments(shard.index)] == []


class Killed(BaseException):
    """Stands for SIGKILL: passes every `except`, and afterwards no call has an effect."""


class FaultPoint:
    """Counts the calls that change the disk, and lets the `fatal`-th one go wrong.

    Args:
        fatal: which call; -1: none.
        mode: `refused` (the call fails), `half` (it has effect, or half of it where it writes, and
            fails all the same), `killed` (the process dies before), `killed after`.
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
        if not is_fatal:
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
    for name in ("fsync", "replace", "link"):
        watch(os, name)
    for name in ("mkdir", "unlink", "rmdir"):
        watch(Path, name)
    monkeypatch.setattr(folder_module, "open", open_file, raising=False)
    yield points
    points.append(FaultPoint(-1, "refused"))


@pytest.mark.parametrize("mode", ["refused", "half", "killed", "killed after"])
def test_a_fault_at_every_call_in_turn(
    tmp_path: Path, fault_points: list[FaultPoint], mode: str
) -> None:
    num_shards, num_rows = 2, 5
    expected = undisturbed(make_plan(num_shards, num_rows), tmp_path / "plain")
    num_raised = 0
    for fatal in range(1000):
        point = FaultPoint(fatal, mode)
        folder = OutputFolder(tmp_path / str(fatal))
        fault_points.append(point)
        try:
            run_job(folder, num_shards, num_rows, seed=0)
        except (OutputError, Killed) as error:
            assert isinstance(error, Killed) == mode.startswith("killed")
            num_raised += 1
        fault_points.append(FaultPoint(-1, mode))
        if point.num_calls <= fatal:
            break
        check_promises(folder, num_shards, num_rows)
        run_job(OutputFolder(folder.root), num_shards, num_rows, seed=fatal)
        assert read_data(folder).equals(expected), f"call {fatal}"
        assert folder.list_segments(0) == folder.list_segments(1) == []
    # Of the calls that may fail unheard there are only those that clean up.
    assert fatal > 30
    assert num_raised > 0.6 * fatal


@pytest.mark.parametrize("mode", ["refused", "half"])
def test_after_a_fault_the_same_writer_may_go_on(
    tmp_path: Path, fault_points: list[FaultPoint], mode: str
) -> None:
    """A full disk that somebody clears: no row is forgotten and none is double."""
    plan = make_plan(1, 30)
    expected = undisturbed(plan, tmp_path / "plain")
    for fatal in range(1000):
        folder = OutputFolder(tmp_path / str(fatal))
        writer = open_writer(folder, plan, 0)
        point = FaultPoint(fatal, mode)
        fault_points.append(point)

        def insist(action: Any) -> None:
            try:
                action()
            except OutputError:
                action()

        for row in range(plan[0].num_rows):
            writer.add(make_result(plan[0], row))
            if row % 4 == 0:
                insist(writer.flush)
        insist(writer.commit)
        fault_points.append(FaultPoint(-1, mode))
        assert read_data(folder).equals(expected), f"call {fatal}"
        if point.num_calls <= fatal:
            break
    assert fatal > 20
