"""Two processes that write one shard at the same time waste work, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchvlm.output.folder import OutputFolder

from .make import make_plan, open_writer, read_data, undisturbed


@pytest.mark.parametrize("num_shards", [1, 3])
def test_two_processes_with_every_shard_in_common(tmp_path: Path, num_shards: int) -> None:
    """Both go through all shards; they start as one and flush every other row."""
    out, num_rows = tmp_path / "out", 60
    job = [*(sys.executable, "-m", f"{__package__}.job"), str(out), str(num_shards), str(num_rows)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    processes = [
        subprocess.Popen(
            [*job, seed, "wait"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # Both were at it: else this test would say nothing.
    assert all(any(line.startswith("flushed") for line in lines) for lines in said)
    folder, plan = OutputFolder(out), make_plan(num_shards, num_rows)
    assert read_data(folder).equals(undisturbed(plan, tmp_path / "plain"))
    assert [shard.index for shard in plan if folder.list_segments(shard.index)] == []
    assert all(open_writer(folder, plan, s.index).finished_rows for s in plan)
