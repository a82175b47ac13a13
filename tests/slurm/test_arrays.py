"""Job arrays on a real Slurm: whatever happens to them, one dataset, each row once.

    make test-slurm

Elements take both CPUs of a node, so four of them are on four nodes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from batchvlm.output.folder import OutputFolder
from batchvlm.output.status import status

from .conftest import NUM_ROWS, ROOT, Job, Slurm, num_on_disk, wait_for

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(sys.platform != "linux", reason="Slurm runs on Linux"),
]
ARRAY = str(ROOT / "jobs" / "slurm" / "array.sbatch")
# What the script asks of a real cluster, in the measure of this one.
SMALL = ["--gres=none", "--mem=100", "--time=10"]
WIDE = [*SMALL, "--cpus-per-task=2"]


def submit(slurm: Slurm, job: Job, out: Path, *options: str, row_s: float) -> str:
    return slurm.submit(
        *(*WIDE, "--array=0-3", *options, ARRAY, *job.command(out)),
        **{"ROW_S": str(row_s), "NUM_SLICES": "4"},
    )


def test_an_array_finishes_one_dataset(slurm: Slurm, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    array = submit(slurm, job, out, row_s=0.01)
    states = slurm.finish(array)
    assert {state for state, _, _ in states.values()} == {"COMPLETED"}, slurm.logs()
    assert len({node for _, node, _ in states.values()}) == 4
    job.check(out)
    found = status(OutputFolder(out))
    assert (found.num_done, found.num_finished) == (NUM_ROWS, found.num_shards)


def test_requeue_node_down_usr1_preemption_and_a_second_live_writer(
    slurm: Slurm, job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    array = submit(slurm, job, out, row_s=0.25)
    nodes = slurm.running(array, 4)
    # The same slice once more, as after the failure of a node that did not die: two live writers.
    twin = slurm.submit(
        *(*SMALL, "--cpus-per-task=1", "--array=1", ARRAY, *job.command(out)),
        **{"ROW_S": "0.25", "NUM_SLICES": "4"},
    )
    wait_for("rows", lambda: num_on_disk(out) >= 12, log=slurm.logs)
    requeued, down, preempted, signalled = sorted(nodes)
    slurm("scontrol", "requeue", nodes[requeued])
    slurm("scancel", "--batch", "--signal=USR1", nodes[signalled])
    high = slurm.submit(
        *("--partition=high", f"--nodelist={preempted}", "--cpus-per-task=2", "--wrap=true")
    )
    slurm("scontrol", "update", f"nodename={down}", "state=down", "reason=test")
    try:
        states = slurm.finish(array)
    finally:
        slurm.resume(down)
    assert {state for state, _, _ in states.values()} == {"COMPLETED"}, slurm.logs()
    assert {restarts for _, _, restarts in states.values()} == {"1"}, states
    slurm.finish(high)
    slurm.finish(twin)
    job.check(out)
    # Logs are appended: what an element said before its restart is still there.
    for element in nodes.values():
        log = (slurm.folder / f"batchvlm-{element}.log").read_text()
        assert "restart 0" in log and "restart 1" in log, log


def test_grace_time_limit_and_cancelling(slurm: Slurm, job: Job, tmp_path: Path) -> None:
    out, short = tmp_path / "out", tmp_path / "short"
    # A real time limit is a minute at least: this one runs beside the others.
    limited = slurm.submit(
        *(*SMALL, "--partition=high", "--cpus-per-task=1", "--time=1", "--signal=B:USR1@20"),
        *("--array=0", ARRAY, *job.command(short, "runtime.walltime_margin_s=0")),
        **{"ROW_S": "0.3", "NUM_SLICES": "1"},
    )
    array = submit(slurm, job, out, "--partition=grace", row_s=0.25)
    nodes = slurm.running(array, 4)
    (busy,) = slurm.running(limited, 1)
    wait_for("rows", lambda: num_on_disk(out) >= 12, log=slurm.logs)
    preempted, cancelled, *_ = sorted(nodes.keys() - {busy})
    slurm("scancel", nodes[cancelled])
    high = slurm.submit(
        *("--partition=high", f"--nodelist={preempted}", "--cpus-per-task=2", "--wrap=true")
    )
    states = slurm.finish(array)
    others = [state for element, state in states.items() if element != nodes[cancelled]]
    assert {state for state, _, _ in others} == {"COMPLETED"}, slurm.logs()
    assert states[nodes[preempted]][2] == "1"
    assert states[nodes[cancelled]][0].startswith("CANCELLED"), "it must not rise again"
    slurm.finish(high)
    # Told in time, the limited one requeued itself. From here on it has time, or on a busy machine
    # it might be told again and again before its first row.
    ((element, _),) = slurm.states(limited).items()
    wait_for("its requeue", lambda: slurm.states(limited)[element][2] != "0", log=slurm.logs)
    slurm("scontrol", "update", f"jobid={element}", "timelimit=30")
    assert num_on_disk(out) < NUM_ROWS
    again = nodes[cancelled].partition("_")[2]
    rerun = submit(slurm, job, out, f"--array={again}", row_s=0.0)
    assert [state for state, _, _ in slurm.finish(rerun).values()] == ["COMPLETED"], slurm.logs()
    job.check(out)
    ((state, _, restarts),) = slurm.finish(limited).values()
    assert state == "COMPLETED" and int(restarts) >= 1, slurm.logs()
    job.check(short)


def test_restarts_are_capped(slurm: Slurm) -> None:
    """A job that never gets on goes round so often and no more, also where 75 is requeued."""
    never = slurm.submit(
        *(*SMALL, "--cpus-per-task=1", "--array=0", ARRAY, "bash", "-c", "exit 75"),
        MAX_RESTARTS="1",
    )
    ((state, _, restarts),) = slurm.finish(never).values()
    assert (state, restarts) == ("FAILED", "1"), slurm.logs()
