"""Several ranks, by srun, by accelerate launch and by hand: rows split, and one killed.

make test-slurm
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batchvlm.errors import ExitCode
from batchvlm.output.folder import OutputFolder
from batchvlm.output.verify import verify

from .conftest import NUM_ROWS, ROOT, ROWS_PER_SHARD, Job, Slurm, num_on_disk, wait_for

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]
MULTI = str(ROOT / "jobs" / "slurm" / "multi_gpu.sbatch")
TWO = [
    *("--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1"),
    *("--mem=100", "--time=10"),
]


def rows_by_rank(out: Path) -> dict[str, int]:
    """Rows that each rank answered, by what the ranks left in the folder."""
    counts: dict[str, int] = {}
    for path in out.glob("_batchvlm/metrics/*.json"):
        rank = path.name.partition("rank-")[2][:3]
        counts[rank] = counts.get(rank, 0) + json.loads(path.read_bytes())["num_rows"]
    return counts


def find_rank(out: Path, variable: str, rank: int) -> int:
    """The process of a rank at work on `out`."""

    def look() -> int | None:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().split(b"\0")
                environ = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            # The launchers name it too; their own process is none of python, or has no rank.
            is_worker = b"python" in line[0] and any(p.endswith(b"worker.py") for p in line[:3])
            is_ours = f"output.dir={out}".encode() in line
            if is_worker and is_ours and f"{variable}={rank}".encode() in environ:
                return int(path.name)
        return None

    pid: int = wait_for(f"rank {rank}", look)
    return pid


def test_srun_without_a_launcher(slurm: Slurm, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ranks = slurm.submit(*TWO, MULTI, *job.command(out), ROW_S="0.05")
    ((state, nodes, _),) = slurm.finish(ranks).values()
    assert state == "COMPLETED" and nodes == "n[1-2]", slurm.logs()
    job.check(out)
    counts = rows_by_rank(out)
    assert sorted(counts) == ["000", "001"] and sum(counts.values()) == NUM_ROWS
    assert min(counts.values()) >= ROWS_PER_SHARD
    # One bar for both: rank 0 counts the other's rows, up to the last.
    assert f"{NUM_ROWS} of {NUM_ROWS} rows (100%)" in slurm.log(ranks)
    assert slurm.log(ranks).count("(100%)") == 1


def test_a_rank_has_its_cpus_and_time_to_finish(slurm: Slurm) -> None:
    """Where srun takes nothing from the job, and a step ends soon after its first task."""
    task = "scontrol show step $SLURM_JOB_ID.$SLURM_STEP_ID; sleep $((6 * SLURM_PROCID)); echo end"
    two = [option for option in TWO if "cpus" not in option]
    ranks = slurm.submit(*two, "--cpus-per-task=2", MULTI, "bash", "-c", task, SLURM_EXACT="1")
    ((state, _, _),) = slurm.finish(ranks).values()
    assert state == "COMPLETED", slurm.logs()
    assert slurm.log(ranks).count("end\n") == 2
    assert "Nodes=2 CPUs=4 Tasks=2" in slurm.log(ranks)


def test_srun_with_rank_0_killed(slurm: Slurm, job: Job, tmp_path: Path) -> None:
    """It served the store: the other goes on without, and the next job does what is left."""
    out = tmp_path / "out"
    ranks = slurm.submit(*TWO, MULTI, *job.command(out), ROW_S="0.1")
    time_lines = (out / "_batchvlm" / "metrics").glob
    wait_for("both at work", lambda: len(list(time_lines("*.jsonl"))) == 2, log=slurm.logs)
    wait_for("rows", lambda: num_on_disk(out) >= 30, log=slurm.logs)
    os.kill(find_rank(out, "SLURM_PROCID", 0), signal.SIGKILL)
    before = num_on_disk(out)
    ((state, _, restarts),) = slurm.finish(ranks).values()
    assert (state, restarts) == ("FAILED", "0"), slurm.logs()
    assert "goes on without the others' store" in slurm.log(ranks)
    assert num_on_disk(out) > before + ROWS_PER_SHARD
    again = slurm.submit(*TWO, MULTI, *job.command(out), ROW_S="0")
    ((state, _, _),) = slurm.finish(again).values()
    assert state == "COMPLETED", slurm.logs()
    job.check(out)


@pytest.mark.parametrize("is_killed", [False, True])
def test_accelerate_launch(job: Job, tmp_path: Path, is_killed: bool) -> None:
    out = tmp_path / "out"
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "0"),
    ]
    command = launch + job.command(out)[1:]
    with (tmp_path / "log").open("w") as log:
        environ = os.environ | {"ROW_S": "0.1" if is_killed else "0.02"}
        process = subprocess.Popen(command, env=environ, cwd=tmp_path, stdout=log, stderr=log)
        if is_killed:
            wait_for("rows", lambda: num_on_disk(out) >= 30, log=(tmp_path / "log").read_text)
            os.kill(find_rank(out, "RANK", 1), signal.SIGKILL)
        code = process.wait(300)
    if is_killed:
        # The launcher ends the other rank, which brings its rows to disk.
        assert code != ExitCode.DONE and 30 <= num_on_disk(out) < NUM_ROWS
        environ = os.environ | {"ROW_S": "0"}
        subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True)
    else:
        assert code == ExitCode.DONE, (tmp_path / "log").read_text()
        counts = rows_by_rank(out)
        assert sorted(counts) == ["000", "001"] and sum(counts.values()) == NUM_ROWS
    job.check(out)


def test_resume_with_one_two_and_three_ranks_in_turn(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for world_size in (1, 2, 3):
        is_last = world_size == 3
        before = num_on_disk(out)
        base = {"ROW_S": "0" if is_last else "0.1", "WORLD_SIZE": str(world_size)}
        base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + os.getpid() % 12_000)}
        ranks = [
            subprocess.Popen(
                job.command(out), env=os.environ | base | {"RANK": str(rank)}, cwd=tmp_path,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        if not is_last:
            wait_for("rows", lambda before=before: num_on_disk(out) >= before + 20)
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        codes = {rank.wait(300) for rank in ranks}
        # A signal that comes before there is a handler ends a process as it always does.
        assert codes <= ({0} if is_last else {ExitCode.INTERRUPTED, -signal.SIGTERM})
        assert is_last or before + 20 <= num_on_disk(out) < NUM_ROWS
    job.check(out)


def test_a_sweep_as_slurm_jobs(slurm: Slurm, tmp_path: Path) -> None:
    """The real command with the demo model: two jobs that are done, and one that fails."""
    sweep = [
        *(sys.executable, "-m", "batchvlm", "run", "-m", "hydra/launcher=submitit_slurm"),
        *("hydra.launcher.gpus_per_node=null", "hydra.launcher.mem_gb=null"),
        *("hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"),
        *("runtime.num_workers=0", "engine.device=cpu", f"hydra.sweep.dir={tmp_path / 'sweep'}"),
        "output.dir=" + str(tmp_path) + "/${task.name}-${data.max_rows}",
    ]
    slurm(*sweep, "task=caption,vqa", "data.max_rows=6")
    for name in ("caption", "vqa"):
        assert verify(OutputFolder(tmp_path / f"{name}-6")).faults == []
    (tmp_path / "caption-7").write_text("a file is in the way")
    failed = slurm.run(*sweep, "task=caption", "data.max_rows=7,8")
    assert failed.returncode == ExitCode.FAILED, failed.stderr
    assert "Traceback" not in failed.stderr and "a job of the sweep failed" in failed.stderr
