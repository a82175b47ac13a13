"""The command interrupted as on real machines: killed, a signal, a closed terminal, two Ctrl-Cs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm import cli, demo
from batchvlm.errors import ConfigError, ExitCode, OutputError
from batchvlm.runtime.signals import Interrupted
from tests.test_cli import BATCHVLM, command, rows_of

NUM_LONG = 400


def long_job(folder: Path, images: int = NUM_LONG) -> list[str]:
    """A job of some seconds, in small shards, flushed often."""
    sample = [
        row for row in pq.read_table(demo.SAMPLES_PATH).to_pylist() if row["id"].startswith("scene")
    ]
    rows = [sample[i % len(sample)] | {"id": f"row-{i}"} for i in range(images)]
    rows[7]["image"] = {"bytes": b"no image", "path": None}
    schema = pq.read_schema(demo.SAMPLES_PATH)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "in.parquet")
    return [
        "run", "task=vqa", "data=parquet", f"data.path={folder / 'in.parquet'}",
        "data.columns.id=id", "generation.max_new_tokens=8", "output.rows_per_shard=100",
        "output.flush_every_s=0.2", "batching.max_batch_size=8", "batching.sort_window=32",
        "runtime.num_workers=1",
    ]  # fmt: skip


def settled(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in {"run_id", "latency_s"}} for row in rows_of(out)
    ]


def num_on_disk(out: Path) -> int:
    """Different rows in parts and segments; a file may vanish while we look."""
    found: set[int] = set()
    # Not pathlib's: before Python 3.13 it fails where a folder is removed meanwhile.
    for path in glob(f"{out}/data/*.parquet") + glob(f"{out}/_batchvlm/segments/*/*.parquet"):
        try:
            found.update(pq.read_table(path, columns=["row_index"])["row_index"].to_pylist())
        except (OSError, ValueError):
            continue
    return len(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the input of `long_job`, and in `undisturbed` what comes out of it."""
    folder = tmp_path_factory.mktemp("long")
    done = command(*long_job(folder), f"output.dir={folder / 'undisturbed'}", cwd=folder)
    assert done.returncode == ExitCode.DONE, done.stderr
    return folder


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.kill),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.kill),
    ],
)
def test_killed_half_way_and_run_again(
    tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    job = long_job(undisturbed)
    out = tmp_path / "out"
    chance = random.Random(int(number))
    aim = chance.randrange(40, NUM_LONG * 3 // 4)
    with subprocess.Popen(
        [*BATCHVLM, *job, f"output.dir={out}"], cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and num_on_disk(out) < aim:
            time.sleep(0.02)
        process.send_signal(number)
        if number == signal.SIGINT:
            process.send_signal(signal.SIGTERM)  # as launchers do
        code = process.wait(60)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else ExitCode.INTERRUPTED)
    before = num_on_disk(out)
    assert 40 <= before < NUM_LONG
    done = command(*job, f"output.dir={out}", cwd=tmp_path)
    assert done.returncode == ExitCode.DONE, done.stderr
    assert "were there already" in done.stdout
    assert settled(out) == settled(undisturbed / "undisturbed")
    assert [row["id"] for row in rows_of(out)] == [f"row-{i}" for i in range(NUM_LONG)]
    last_run = max((out / "_batchvlm" / "metrics").glob("*.json"))
    assert json.loads(last_run.read_text())["num_rows"] <= NUM_LONG - before
    assert not any((out / "_batchvlm" / "segments").iterdir())


@pytest.mark.kill
@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_terminal_that_is_closed(tmp_path: Path, undisturbed: Path, is_ignored: bool) -> None:
    """The run ends as by any signal; one that nohup started goes on, and is as good as any."""
    out = tmp_path / "out"
    job = [*long_job(undisturbed), f"output.dir={out}"]
    at_hangup = signal.SIG_IGN if is_ignored else signal.SIG_DFL
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [*BATCHVLM, *job],
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, at_hangup),
    ) as process:
        os.close(theirs)
        while process.poll() is None and num_on_disk(out) < 100:
            time.sleep(0.02)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        code = process.wait(120)
    assert code == (ExitCode.DONE if is_ignored else ExitCode.INTERRUPTED)
    before = num_on_disk(out)
    assert (before == NUM_LONG) is is_ignored
    assert command(*job, cwd=tmp_path).returncode == ExitCode.DONE
    assert settled(out) == settled(undisturbed / "undisturbed")


def children_of(pid: int) -> set[int]:
    return {
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if stat.exists() and int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid
    }


SLOW_FLUSH = """
import sys, time
from batchvlm.pipeline import collector
from batchvlm.cli import program
close = collector.Collector.close
def slow(self):
    print("closing", file=sys.stderr, flush=True)
    time.sleep(SECONDS)
    close(self)
collector.Collector.close = slow
if __name__ == "__main__":
    program()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("is_impatient", [pytest.param(True, marks=pytest.mark.kill), False])
def test_a_flush_that_takes_too_long(tmp_path: Path, is_impatient: bool) -> None:
    """A second Ctrl-C exits at once and says so; else the watchdog does, after `grace_s`."""
    program = tmp_path / "slow.py"
    program.write_text(SLOW_FLUSH.replace("SECONDS", "600"))
    out = tmp_path / "out"
    job = [*long_job(tmp_path), f"output.dir={out}", "runtime.grace_s=1"]
    if is_impatient:
        job[-1] = "runtime.grace_s=600"
    with subprocess.Popen(
        [sys.executable, str(program), *job], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and num_on_disk(out) < 30:
            time.sleep(0.02)
        children = children_of(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line == "closing\n" and is_impatient:
                process.send_signal(signal.SIGINT)
        code = process.wait(60)
    if is_impatient:
        assert code == ExitCode.STOPPED == 130
        assert "stopped at once; rows that were not on disk yet" in said
    else:
        assert code == ExitCode.INTERRUPTED, said
        assert "still busy runtime.grace_s=1 after the signal" in said
        assert "finished rows are on disk; run the same command again" in said
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "a worker outlived the run"
        time.sleep(0.05)
    assert not list((out / "data").glob("*[!t]"))  # nothing but .parquet
    assert num_on_disk(out) >= 30


@pytest.mark.kill  # tests/test_ranks.py has ranks of one launch
def test_two_ranks_share_the_shards(tmp_path: Path) -> None:
    """What `accelerate launch` sets, set by hand: two processes on one machine."""
    job = [
        *long_job(tmp_path, images=120),
        "output.rows_per_shard=20",
        f"output.dir={tmp_path / 'out'}",
        "engine.device=cpu",
    ]
    ranks = [
        subprocess.Popen(
            [*BATCHVLM, *job], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                              "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": str(20000 + os.getpid() % 20000)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [row["row_index"] for row in rows_of(tmp_path / "out")] == list(range(120))
    counts = [
        json.loads(p.read_text())["num_rows"]
        for p in (tmp_path / "out" / "_batchvlm" / "metrics").glob("*.json")
    ]
    assert sum(counts) == 120 and len(counts) == 2


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AttributeError("_flags"), ExitCode.INTERRUPTED),
        (ConfigError("defaults: '_flags'"), ExitCode.INTERRUPTED),  # by OmegaConf, in a finally
        (OSError("disk full"), ExitCode.FAILED),
        (OutputError("disk full"), ExitCode.FAILED),
    ],
)
def test_what_an_interruption_breaks_in_a_clean_up_is_no_error(
    error: Exception, expected: ExitCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> int:
        try:
            raise Interrupted
        finally:
            raise error

    monkeypatch.setattr(cli, "_run_hydra", interrupted)
    monkeypatch.setattr(cli, "catch_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["batchvlm"])
    assert cli.run_app("run", []) == expected
