"""A real Slurm for the tests here, and what they do with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchvlm.output.folder import OutputFolder
from batchvlm.output.verify import verify
from tests.test_kills import write_input

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "slurm" / "worker.py"
CLUSTER = Path(__file__).with_name("cluster.sh")
NUM_ROWS = 160
ROWS_PER_SHARD = 5
MAX_WAIT_S = 240.0
"""Nothing here takes so long, however busy the machine."""
_COLUMNS = "JobArrayID:24,State:14,NodeList:20,RestartCnt:6"


def wait_for(what: str, is_there: Callable[[], Any], *, log: Callable[[], str] = str) -> Any:
    """Look again and again until something is there."""
    end = time.monotonic() + MAX_WAIT_S
    while not (found := is_there()):
        assert time.monotonic() < end, f"{what} never came; {log()}"
        time.sleep(0.1)
    return found


def settled(out: Path) -> list[dict[str, Any]]:
    """The rows without what differs between two runs of one job."""
    rows = ds.dataset(out / "data").to_table().to_pylist()
    return [{k: v for k, v in row.items() if k not in ("run_id", "latency_s")} for row in rows]


def num_on_disk(out: Path) -> int:
    """Rows in parts and segments, as far as they can be read at this instant."""
    count = 0
    # Not pathlib's: before Python 3.13 it fails where a folder is removed meanwhile.
    for path in glob(f"{out}/data/*") + glob(f"{out}/_batchvlm/segments/*/*"):
        try:
            count += pq.read_metadata(path).num_rows
        except FileNotFoundError:
            continue  # a shard was just finished
    return count


@dataclass
class Job:
    """A dataset to work on, and where."""

    folder: Path
    expected: list[dict[str, Any]]
    """The rows of an undisturbed run."""

    def command(self, out: Path, *more: str) -> list[str]:
        return [
            *(sys.executable, str(WORKER), "run", "task=vqa", "data=parquet"),
            *(f"data.path={self.folder / 'in.parquet'}", "data.columns.id=id"),
            *(f"output.rows_per_shard={ROWS_PER_SHARD}", "output.flush_every_rows=2"),
            *("engine.device=cpu", "runtime.num_workers=0", f"output.dir={out}"),
            *("batching.sort_window=1", *more),
        ]

    def check(self, out: Path) -> None:
        """The output is whole, and that of an undisturbed run."""
        assert verify(OutputFolder(out)).faults == []
        assert settled(out) == self.expected
        assert not list((out / "_batchvlm" / "segments").glob("*"))


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """160 rows, six of them broken, and what becomes of them when nothing happens."""
    folder = tmp_path_factory.mktemp("slurm")
    write_input(folder / "in.parquet", num_rows=NUM_ROWS)
    job = Job(folder, [])
    plain = folder / "plain"
    subprocess.run(job.command(plain), cwd=folder, check=True, capture_output=True)
    job.expected = settled(plain)
    assert [row["row_index"] for row in job.expected] == list(range(NUM_ROWS))
    return job


class Slurm:
    """The cluster, by its commands."""

    def __init__(self, conf: str, folder: Path) -> None:
        self._environ = os.environ | {"SLURM_CONF": conf}
        self.folder = folder

    def run(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command that finds the cluster."""
        return subprocess.run(
            command, env=self._environ | environ, cwd=self.folder, capture_output=True, text=True
        )

    def __call__(self, *command: str, **environ: str) -> str:
        """What a command says, which must go well."""
        done = self.run(*command, **environ)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *command: str, **environ: str) -> str:
        """Submit by sbatch, and return the job's number."""
        return self("sbatch", "--parsable", *command, **environ)

    def states(self, job: str) -> dict[str, tuple[str, str, str]]:
        """Of each element or job: state, node, restarts."""
        lines = self("squeue", "-h", "-a", "-r", "-t", "all", "-j", job, "-O", _COLUMNS)
        found = {}
        for line in lines.splitlines():
            found[line[:24].strip()] = (
                line[24:38].strip(),
                line[38:58].strip(),
                line[58:].strip(),
            )
        return found

    def finish(self, job: str) -> dict[str, tuple[str, str, str]]:
        """Wait until nothing of a job is left to run."""
        over = re.compile(r"COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|PREEMPTED")

        def all_over() -> Any:
            states = self.states(job)
            is_over = all(over.match(state) for state, _, _ in states.values())
            return states if states and is_over else None

        found: dict[str, tuple[str, str, str]] = wait_for(
            f"the end of {job}", all_over, log=lambda: f"{self.states(job)} {self.logs()}"
        )
        return found

    def running(self, job: str, count: int) -> dict[str, str]:
        """Wait until `count` elements run; node -> element."""

        def all_run() -> dict[str, str] | None:
            nodes = {n: e for e, (s, n, _) in self.states(job).items() if s == "RUNNING"}
            return nodes if len(nodes) == count else None

        nodes: dict[str, str] = wait_for(
            f"{count} running elements of {job}", all_run, log=lambda: str(self.states(job))
        )
        return nodes

    def resume(self, node: str) -> None:
        """Bring a node back, unless it has registered by itself."""
        if "down" in self("sinfo", "-h", "-N", "-n", node, "-o", "%T"):
            self("scontrol", "update", f"nodename={node}", "state=resume")

    def log(self, job: str) -> str:
        """What a job without elements has said."""
        return (self.folder / f"batchvlm-{job}.log").read_text()

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log")
        )


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four nodes on this machine; a skip with the reason where they cannot be had."""
    # Whoever has a cluster up already keeps it.
    was_up = (Path("/run/batchvlm-slurm") / "slurm.conf").exists()
    start: Sequence[str] = ("bash", str(CLUSTER), "start")
    done = subprocess.run(start, capture_output=True, text=True)
    if done.returncode == 3 and not os.environ.get("REQUIRE_SLURM"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    try:
        yield Slurm(done.stdout.strip(), tmp_path_factory.mktemp("jobs"))
    finally:
        if not was_up:
            subprocess.run(["bash", str(CLUSTER), "stop"], check=True)
