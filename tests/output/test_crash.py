"""Kills and faults: whatever happens, going on gives the output of a job that nothing hit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchvlm.errors import OutputError
from batchvlm.output.folder import OutputFolder

from .faults import FaultPoint, Killed
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


@pytest.mark.parametrize("mode", ["refused", "full", "half", "killed", "killed after"])
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
