"""The real command, killed at random instants until it is done: the output of an undisturbed run.

    pytest -m kill tests/test_kills.py --kills 500 --kill-seed 7

The instants are drawn over a whole run's length, so they fall on imports, loading, the run and its
commits. Most commands are forked from a process that has done the imports (`zygote.py`): a
restart costs a second. Others are started as a person does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchvlm import demo
from batchvlm.errors import ExitCode
from batchvlm.output.folder import OutputFolder
from batchvlm.output.verify import verify

pytestmark = [
    pytest.mark.kill,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc"),
]
ROOT = Path(__file__).parents[1]
GRACEFUL = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Shares of `--kills`: forked commands are cheap, those with worker processes are not.
SHARES = {
    **{"fake": 0.35, "demo": 0.15, "spawn": 0.05},
    **{"retry": 0.1, "overwrite": 0.1, "compact": 0.1, "dialog": 0.1},
}
NUM_ROWS = 64


@dataclass
class Commands:
    """Runs the command, whole or until it is killed."""

    folder: Path
    zygote: subprocess.Popen[str]
    durations_s: dict[str, float] = field(default_factory=dict)

    def run(self, argv: list[str], *, kind: str, signal_after: tuple[int, float] | None) -> int:
        """Run `batchvlm argv` and return its exit code; perhaps send it a signal on the way."""
        if kind == "spawn":
            with (self.folder / "log").open("a") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "batchvlm", *argv],
                    cwd=self.folder,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    stdout=log,
                    stderr=log,
                )
            if signal_after is not None:
                number, after_s = signal_after
                # Not a wait for something: an instant is what this is about.
                time.sleep(after_s)
                process.send_signal(number)
            code = process.wait(300)
        else:
            order: dict[str, Any] = {
                "argv": argv,
                "cwd": str(self.folder),
                "log": str(self.folder / "log"),
            }
            assert self.zygote.stdin and self.zygote.stdout
            order |= {"is_fake": kind != "demo", "signal_after": signal_after}
            self.zygote.stdin.write(json.dumps(order) + "\n")
            self.zygote.stdin.flush()
            code = int(self.zygote.stdout.readline().split()[1])
        if signal_after is None:
            assert code == ExitCode.DONE, (self.folder / "log").read_text()[-3000:]
        return code


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("kills")
    write_input(folder / "in.parquet", num_rows=NUM_ROWS)
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "zygote.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as zygote:
        assert zygote.stdout and zygote.stdout.readline() == "ready\n"
        yield Commands(folder, zygote)
        assert zygote.stdin
        zygote.stdin.close()


def write_input(path: Path, num_rows: int) -> None:
    sample = [r for r in pq.read_table(demo.SAMPLES_PATH).to_pylist() if r["id"][:5] == "scene"]
    rows = [sample[i % len(sample)] | {"id": f"row-{i}"} for i in range(num_rows)]
    for i in range(7, num_rows, 25):
        rows[i]["image"] = {"bytes": b"no image", "path": None}
    table = pa.Table.from_pylist(rows, schema=pq.read_schema(demo.SAMPLES_PATH))
    pq.write_table(table, path, row_group_size=16)


def job(commands: Commands, out: Path, *more: str, workers: int = 0) -> list[str]:
    return [
        "run", "task=vqa", "data=parquet", f"data.path={commands.folder / 'in.parquet'}",
        "data.columns.id=id", "generation.max_new_tokens=8", "output.rows_per_shard=16",
        "output.flush_every_rows=5", "output.flush_every_s=0.3", "batching.max_batch_size=8",
        "batching.sort_window=16", f"runtime.num_workers={workers}", f"output.dir={out}", *more,
    ]  # fmt: skip


def settled(out: Path) -> list[dict[str, Any]]:
    """The rows without what differs between two runs of one job."""
    rows = ds.dataset(out / "data").to_table().to_pylist()
    volatile = {"run_id", "latency_s"}
    return [{k: v for k, v in row.items() if k not in volatile} for row in rows]


def check_instant(out: Path) -> None:
    """What holds at every instant: rows may be missing, but none is double, foreign or broken."""
    if not (out / "_batchvlm" / "run.json").exists():
        assert not list(out.glob("data/*"))
        return
    faults = verify(OutputFolder(out)).faults
    assert all(fault.startswith(("missing ", "unfinished ")) for fault in faults), faults


def others_alive(out: Path) -> list[str]:
    """Processes that belong to a run of this output, or to a parent that is gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(out) in line:
            found.append(f"{path.name} {line}")
    return found


def num_kills(request: pytest.FixtureRequest, kind: str) -> int:
    return max(1, round(request.config.getoption("--kills") * SHARES[kind]))


def kill_until(
    commands: Commands,
    request: pytest.FixtureRequest,
    kind: str,
    start_over: Any,
    check: Any,
    engine: str,
) -> None:
    """Kill jobs as often as was asked for, restarting each until it is done.

    Args:
        kind: which share of the kills.
        start_over: makes a fresh job of a number; returns its output folder and command.
        check: looks at a finished one.
        engine: how to run it, see `Commands.run`.
    """
    draw = random.Random(f"{request.config.getoption('--kill-seed')} {kind}")
    left = num_kills(request, kind)
    counts = {"jobs": 0, "kills": 0, "graceful": 0, "restarts": 0}
    while left:
        out, argv = start_over(counts["jobs"])
        counts["jobs"] += 1
        while True:
            length_s = commands.durations_s[f"{kind} whole"]
            number = draw.choice(GRACEFUL) if draw.random() < 0.2 else signal.SIGKILL
            # At most so often in one job, or it would never get to its last commits.
            is_left_alone = not left or draw.random() < 0.15
            # Some early ones: other work on the machine may have made that run the longer.
            latest_s = length_s * draw.choice((0.5, 1.05))
            after_s = None if is_left_alone else (number, draw.uniform(0, latest_s))
            code = commands.run(argv, kind=engine, signal_after=after_s)
            counts["restarts"] += 1
            check_instant(out)
            if code == ExitCode.DONE:
                break
            assert after_s is not None
            if number == signal.SIGKILL:
                assert code == -signal.SIGKILL
                counts["kills"] += 1
                left -= 1
            else:
                # A signal before there is a handler ends the process as it always does.
                assert code in (ExitCode.INTERRUPTED, -number), f"exit code {code}"
                counts["graceful"] += 1
        assert verify(OutputFolder(out)).faults == []
        check(out)
    print(f"{kind}: {counts}")


def timed(commands: Commands, kind: str, argv: list[str], engine: str) -> None:
    start = time.monotonic()
    commands.run(argv, kind=engine, signal_after=None)
    commands.durations_s[f"{kind} whole"] = time.monotonic() - start


@pytest.mark.parametrize(
    ("kind", "workers"), [("fake", 0), ("demo", 0), ("spawn", 1), ("spawn", 2)]
)
def test_killed_jobs_end_like_undisturbed_ones(
    commands: Commands, request: pytest.FixtureRequest, kind: str, workers: int
) -> None:
    name = f"{kind}-{workers}"
    plain = commands.folder / f"plain-{name}"
    timed(commands, kind, job(commands, plain, workers=workers), kind)
    expected = settled(plain)
    assert [row["row_index"] for row in expected] == list(range(NUM_ROWS))

    def start_over(number: int) -> tuple[Path, list[str]]:
        out = commands.folder / f"{name}-{number}"
        return out, job(commands, out, workers=workers)

    def check(out: Path) -> None:
        assert settled(out) == expected
        assert not list((out / "_batchvlm" / "segments").glob("*"))
        end = time.monotonic() + 30
        while others_alive(out):
            assert time.monotonic() < end, others_alive(out)
            time.sleep(0.1)

    kill_until(commands, request, kind, start_over, check, kind)


def test_killed_dialogs(commands: Commands, request: pytest.FixtureRequest) -> None:
    """A row whose dialog was broken off is answered from its first turn."""
    turns = [[f"turn {n}" for n in range(1 + row % 4)] for row in range(NUM_ROWS)]
    path = commands.folder / "dialog.parquet"
    pq.write_table(pa.table({"id": [str(row) for row in range(NUM_ROWS)], "turns": turns}), path)
    more = ["task=dialog", "data.columns.turns=turns", "data.columns.image=null"]
    more += [f"data.path={path}"]
    plain = commands.folder / "plain-dialog"
    timed(commands, "dialog", job(commands, plain, *more), "fake")
    expected = settled(plain)
    assert [len(row["generated_texts"]) for row in expected] == [len(turn) for turn in turns]

    def start_over(number: int) -> tuple[Path, list[str]]:
        out = commands.folder / f"dialog-{number}"
        return out, job(commands, out, *more)

    def check(out: Path) -> None:
        assert settled(out) == expected

    kill_until(commands, request, "dialog", start_over, check, "fake")


@pytest.mark.parametrize("is_merged", [False, True], ids=["parts", "merged parts"])
def test_killed_retries(
    commands: Commands, request: pytest.FixtureRequest, is_merged: bool
) -> None:
    """Rows that failed are tried once more, no matter how often that is interrupted."""
    retry = ["retry.errors=[decode]", "retry.max_attempts=2"]

    def finish(name: str) -> Path:
        out = commands.folder / f"{name}-{'merged' if is_merged else 'alone'}"
        commands.run(job(commands, out), kind="fake", signal_after=None)
        if is_merged:
            commands.run(["compact", str(out), "--rows", "32"], kind="fake", signal_after=None)
        return out

    plain = finish("plain-retry")
    timed(commands, "retry", job(commands, plain, *retry), "fake")
    expected = settled(plain)
    assert {row["attempts"] for row in expected if row["status"] == "error"} == {2}
    assert {row["attempts"] for row in expected if row["status"] == "success"} == {1}

    def start_over(number: int) -> tuple[Path, list[str]]:
        out = finish(f"retry-{number}")
        return out, job(commands, out, *retry)

    def check(out: Path) -> None:
        assert settled(out) == expected
        assert not list((out / "_batchvlm").glob("retries/*"))

    kill_until(commands, request, "retry", start_over, check, "fake")


def test_killed_overwriting(commands: Commands, request: pytest.FixtureRequest) -> None:
    """The folder holds the old answers or new ones, never both."""
    new = ['task.prompt="Is it {{ question }}?"', "output.on_mismatch=overwrite"]
    plain = commands.folder / "plain-overwrite"
    timed(commands, "overwrite", job(commands, plain, *new), "fake")
    expected = settled(plain)

    def start_over(number: int) -> tuple[Path, list[str]]:
        out = commands.folder / f"overwrite-{number}"
        commands.run(job(commands, out), kind="fake", signal_after=None)
        return out, job(commands, out, *new)

    def check(out: Path) -> None:
        assert settled(out) == expected
        assert not list((out / "_batchvlm").glob("replaced-*"))

    kill_until(commands, request, "overwrite", start_over, check, "fake")


def test_killed_compacting(commands: Commands, request: pytest.FixtureRequest) -> None:
    """A reader finds every row once, whenever it looks."""
    source = commands.folder / "compact-source"
    commands.run(job(commands, source), kind="fake", signal_after=None)
    expected = settled(source)
    compact = commands.folder / "compact"
    commands.run(job(commands, compact), kind="fake", signal_after=None)
    timed(commands, "compact", ["compact", str(compact), "--rows", "32"], "fake")
    assert settled(compact) == expected

    def start_over(number: int) -> tuple[Path, list[str]]:
        out = commands.folder / f"compact-{number}"
        commands.run(job(commands, out), kind="fake", signal_after=None)
        return out, ["compact", str(out), "--rows", "32"]

    def check(out: Path) -> None:
        assert settled(out) == expected
        assert len(list(out.glob("data/*"))) == 2
        commands.run(job(commands, out), kind="fake", signal_after=None)
        assert len(list(out.glob("data/*"))) == 2

    kill_until(commands, request, "compact", start_over, check, "fake")
