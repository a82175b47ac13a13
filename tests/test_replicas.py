"""Processes that hold one model together, as launched: their answers, and what their ends cost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.demo.questions import held_out
from batchvlm.errors import ConfigError, ExitCode
from batchvlm.output.folder import OutputFolder
from batchvlm.output.verify import verify
from batchvlm.pipeline.pipeline import run_job
from batchvlm.runtime.launch import Launch
from batchvlm.runtime.replicas import Replica, find_replica
from batchvlm.settings.compose import compose
from tests.conftest import IMAGE
from tests.pipeline.test_pipeline import answers, rows_of
from tests.slurm.conftest import num_on_disk, wait_for
from tests.test_ranks_launched import WORKER, rows_by_rank

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SETTINGS = ["data=parquet", "runtime.num_workers=0", "model.tp_plan=auto"]


def of_rank(rank: int, num_ranks: int, num_machines: int = 1) -> Launch:
    return Launch(
        rank=rank,
        world_size=num_ranks * num_machines,
        local_rank=rank % num_ranks,
        local_world_size=num_ranks,
        host="node1",
    )


def tp(gpus_per_replica: int | None = None) -> Any:
    size = "null" if gpus_per_replica is None else gpus_per_replica
    return compose("run", ["model.tp_plan=auto", f"model.gpus_per_replica={size}"]).model


def test_who_leads_whom() -> None:
    assert find_replica(of_rank(3, 8), compose("run").model) is None
    found = [find_replica(of_rank(rank, 4, 2), tp(2)) for rank in range(8)]
    assert all(isinstance(one, Replica) for one in found)
    assert [(r.index, r.rank) for r in found if r] == [(i, k) for i in range(4) for k in (0, 1)]
    leaders = [r.leaders for r in found if r and r.rank == 0]
    assert [(one.rank, one.world_size) for one in leaders] == [(i, 4) for i in range(4)]
    assert [(one.local_rank, one.local_world_size) for one in leaders] == [(0, 2), (1, 2)] * 2
    whole = find_replica(of_rank(7, 4, 2), tp())
    assert whole is not None and (whole.index, whole.rank, whole.size) == (1, 3, 4)


@pytest.mark.parametrize(
    ("launch", "size", "message"),
    [
        (Launch(), None, "among several processes of a launch, and a replica has one; start one"),
        (of_rank(1, 8), 3, "the 8 processes of this machine, of 8, do not divide into replicas"),
        (of_rank(1, 2, 2), 4, "the 2 processes of this machine, of 4, do not divide"),
        (
            Launch(rank=2, world_size=4, local_rank=1, local_world_size=2),
            None,
            "on each machine; srun",
        ),
        (Launch(rank=1, world_size=2, local_rank=1, local_world_size=2), None, "set MASTER_ADDR"),
    ],
)
def test_processes_that_make_no_replicas(launch: Launch, size: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_replica(launch, tp(size))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def write_captions(path: Path, num_rows: int) -> list[str]:
    """An input of captions, again and again, and their true answers."""
    found = [item for item in held_out(24) if item.kind == "caption"]
    items = [found[i % len(found)] for i in range(num_rows)]
    images = pa.array([{"bytes": item.images[0], "path": None} for item in items], IMAGE)
    pq.write_table(pa.table({"image": images}), path)
    return [item.answer for item in items]


def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    """In float32, token by token, held to a schema."""
    settings = ["task=extract", "data.max_rows=8", "output.token_ids=true"]
    settings += ["runtime.num_workers=0", "batching.max_batch_size=4"]
    run_job(compose("run", [*settings, "engine=generate", f"output.dir={tmp_path / 'alone'}"]))
    command = [*TORCHRUN, "2", "-m", "batchvlm", "run", *settings, "model.tp_plan=auto"]
    command.append(f"output.dir={tmp_path / 'out'}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "runs by generate(): model.tp_plan is asked for" in done.stderr
    assert done.stdout.count("rows     8: ") == 1  # the other has nothing to say
    assert verify(OutputFolder(tmp_path / "out")).faults == []
    assert answers(tmp_path / "out") == answers(tmp_path / "alone")
    held_to = {row["constraint"] for row in rows_of(tmp_path / "out") if row["status"] == "success"}
    assert held_to == {"strict"}


@pytest.mark.kill
def test_two_replicas_of_two_processes_divide_the_shards(tmp_path: Path) -> None:
    truth = write_captions(tmp_path / "in.parquet", 40)
    (tmp_path / "meeting").mkdir()
    settings = [*SETTINGS, f"data.path={tmp_path / 'in.parquet'}", "model.gpus_per_replica=2"]
    settings += ["output.rows_per_shard=4", f"output.dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [*TORCHRUN, "4", str(WORKER), "run", *settings],
        env=os.environ | {"MEETING": str(tmp_path / "meeting"), "MEETING_SIZE": "2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert verify(OutputFolder(tmp_path / "out")).faults == []
    counts = rows_by_rank(tmp_path / "out")
    assert len(counts) == 2 and sum(counts) == 40 and min(counts) >= 4
    right = [row["generated_text"] == t for row, t in zip(rows_of(tmp_path / "out"), truth)]  # noqa: B905
    assert sum(right) >= 36


class Pair:
    """The two processes of a replica, by no launcher that would end one with the other."""

    def __init__(self, folder: Path, settings: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environ = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "batchvlm", "run", *settings],
                        **{"env": os.environ | environ, "cwd": folder},
                        **{"stdout": file, "stderr": file},
                    )
                )

    def log(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def codes(self, limit_s: float) -> list[int]:
        end = time.monotonic() + limit_s
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]


@contextmanager
def pair(folder: Path, settings: Sequence[str]) -> Iterator[Pair]:
    both = Pair(folder, settings)
    try:
        yield both
    finally:
        for process in both.processes:
            process.kill()
            process.wait()


LEADER, FOLLOWER = 0, 1
INTERRUPTED = int(ExitCode.INTERRUPTED)
ENDS = {
    "a follower killed": ([FOLLOWER], signal.SIGKILL, [INTERRUPTED, -signal.SIGKILL]),
    "a leader killed": ([LEADER], signal.SIGKILL, [-signal.SIGKILL, INTERRUPTED]),
    "a follower told to end": ([FOLLOWER], signal.SIGTERM, [INTERRUPTED, INTERRUPTED]),
    "both told to end": ([LEADER, FOLLOWER], signal.SIGTERM, [INTERRUPTED, INTERRUPTED]),
    "a follower that hangs": ([FOLLOWER], signal.SIGSTOP, [INTERRUPTED, -signal.SIGKILL]),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "a follower killed" else pytest.param(n, marks=pytest.mark.kill) for n in ENDS],
)
def test_the_end_of_one_is_the_end_of_both_and_costs_no_row(tmp_path: Path, name: str) -> None:
    victims, number, expected = ENDS[name]
    out, num_rows = tmp_path / "out", 400
    write_captions(tmp_path / "in.parquet", num_rows)
    settings = [*SETTINGS, f"data.path={tmp_path / 'in.parquet'}", f"output.dir={out}"]
    settings += ["output.rows_per_shard=20", "output.flush_every_rows=4"]
    settings += ["batching.max_batch_size=4", "batching.sort_window=20"]
    stall = ["runtime.stall_timeout_s=8"] if number == signal.SIGSTOP else []
    with pair(tmp_path, [*settings, *stall]) as both:
        wait_for("rows", lambda: num_on_disk(out) >= 12, log=both.log)
        for victim in victims:
            both.processes[victim].send_signal(number)
        code = both.processes[LEADER].wait(60)
        if number == signal.SIGSTOP:
            # It would see that it is alone, were it woken up.
            both.processes[FOLLOWER].kill()
        assert [code, both.processes[FOLLOWER].wait(60)] == expected, both.log()
        log = both.log()
    assert "Traceback" not in log
    if name == "a follower killed":
        assert log.count("batchvlm: error: process 1 of those that hold the model") == 1, log
    before = num_on_disk(out)
    assert 12 <= before < num_rows
    found = [row["status"] for row in rows_of(out)] if list(out.glob("data/*")) else []
    assert set(found) <= {"success"}  # no row is charged with it
    # One process alone goes on where they stopped: where a model lies is no part of an answer.
    rest = [s for s in settings if s != "model.tp_plan=auto"]
    summary = run_job(compose("run", rest))
    assert summary.metrics.num_rows <= num_rows - before
    assert verify(OutputFolder(out)).faults == []
    assert [row["row_index"] for row in rows_of(out)] == list(range(num_rows))
    assert {row["status"] for row in rows_of(out)} == {"success"}


@pytest.mark.kill
def test_a_follower_that_waits_for_the_leader_ends_when_it_is_told_to(tmp_path: Path) -> None:
    """It is within a collective of torch, where no signal is heard."""
    out = tmp_path / "out"
    write_captions(tmp_path / "in.parquet", 400)
    settings = [*SETTINGS, f"data.path={tmp_path / 'in.parquet'}", f"output.dir={out}"]
    settings += ["output.flush_every_rows=4", "batching.max_batch_size=4", "runtime.grace_s=2"]
    with pair(tmp_path, settings) as both:
        wait_for("rows", lambda: num_on_disk(out) >= 12, log=both.log)
        both.processes[LEADER].send_signal(signal.SIGSTOP)
        seen: list[str] = []

        def is_idle() -> bool:
            stat = Path(f"/proc/{both.processes[FOLLOWER].pid}/stat").read_text()
            seen.append(stat.rpartition(")")[2].split()[11])  # its time on a core
            return len(seen) > 10 and len({*seen[-10:]}) == 1

        wait_for("the follower's waiting", is_idle, log=both.log)
        both.processes[FOLLOWER].send_signal(signal.SIGTERM)
        assert both.processes[FOLLOWER].wait(60) == INTERRUPTED, both.log()
