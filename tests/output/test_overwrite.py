"""One folder, two questions: refused, put beside it, or overwritten without ever being mixed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from batchvlm.errors import FingerprintError, OutputError
from batchvlm.output.folder import OutputFolder
from batchvlm.output.overwrite import finish_replacing
from batchvlm.output.run_file import RunFile, find_run, read_run, save_run
from batchvlm.output.schema import Provenance
from batchvlm.output.writer import ShardWriter

from .faults import FaultPoint, Killed
from .make import SCHEMA, make_plan, make_result

NUM_ROWS = 6


def find(folder: OutputFolder, prompt: str, *, overwrite: bool = False) -> RunFile:
    return find_run(
        folder,
        identity={"task": {"prompt": prompt}},
        layout={"rows_per_shard": NUM_ROWS},
        settings={},
        packages={},
        plan=make_plan(2, NUM_ROWS),
        overwrite=overwrite,
    )


def run_job(root: Path, prompt: str, *, overwrite: bool = False, stop_after: int = 99) -> None:
    """Answer every row with the prompt itself; one part and a segment are there half-way."""
    folder = OutputFolder(root)
    run = find(folder, prompt, overwrite=overwrite)
    save_run(folder, run, overwrite=overwrite)
    about = Provenance(model="m", fingerprint=run.fingerprint, run_id="r")
    finished = folder.finished_shards(len(run.plan))
    num_rows = 0
    for shard in run.plan:
        if shard.index in finished:
            continue
        writer = ShardWriter(folder, shard, len(run.plan), SCHEMA, about, flush_every_s=1e9)
        for row in range(shard.num_rows):
            if row in writer.finished_rows:
                continue
            if num_rows == stop_after:
                return
            num_rows += 1
            writer.add(make_result(shard, row, generated_text=prompt))
            writer.flush()
        writer.commit()


def texts(root: Path) -> set[str]:
    """The answers that a reader finds in whole and partial output."""
    if not list((root / "data").glob("*.parquet")):
        return set()
    return set(ds.dataset(root / "data").to_table()["generated_text"].to_pylist())


def content(root: Path) -> pa.Table:
    return ds.dataset(root / "data").to_table().replace_schema_metadata()


def test_an_old_run_gives_way_with_all_that_it_wrote(tmp_path: Path) -> None:
    run_job(tmp_path, "old", stop_after=7)  # one part, one segment
    (tmp_path / "notes.txt").write_text("mine")
    folder = OutputFolder(tmp_path)
    assert folder.list_segments(1)
    with pytest.raises(FingerprintError, match="'old' -> 'new'"):
        find(folder, "new")
    run_job(tmp_path, "new", overwrite=True)
    assert texts(tmp_path) == {"new"}
    assert content(tmp_path)["row_index"].to_pylist() == list(range(8))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(folder.inner.glob("replaced-*"))
    # From now on it is this run's: going on overwrites nothing.
    before = {path: path.stat().st_ino for path in folder.data.iterdir()}
    run_job(tmp_path, "new", overwrite=True)
    assert before == {path: path.stat().st_ino for path in folder.data.iterdir()}


def test_the_old_runs_live_process_writes_nothing_more(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    run = save_run(folder, find(folder, "old"))
    about = Provenance(model="m", fingerprint=run.fingerprint, run_id="r")
    writer = ShardWriter(folder, run.plan[0], 2, SCHEMA, about, flush_every_s=1e9)
    for row in range(NUM_ROWS):
        writer.add(make_result(run.plan[0], row, generated_text="old"))
    run_job(tmp_path, "new", overwrite=True, stop_after=0)
    for write in (writer.flush, writer.commit):
        with pytest.raises(OutputError, match="was given to another run meanwhile"):
            write()
    assert texts(tmp_path) == set()


def test_ranks_that_overwrite_at_once_overwrite_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"from {__package__}.test_overwrite import *\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        f"run_job(Path({str(tmp_path)!r}), 'new', overwrite=True)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    run_job(tmp_path, "old")
    pipe: Any = subprocess.PIPE
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        for _ in range(3)
    ]
    for rank in ranks:
        assert rank.stdout and rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin
        rank.stdin.write("go\n")
        rank.stdin.flush()
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 3, said
    assert texts(tmp_path) == {"new"}
    assert content(tmp_path)["row_index"].to_pylist() == list(range(8))


@pytest.mark.kill
@pytest.mark.parametrize("mode", ["refused", "full", "half", "killed", "killed after"])
def test_a_fault_at_every_call_mixes_nothing(
    tmp_path: Path, fault_points: list[FaultPoint], mode: str
) -> None:
    run_job(tmp_path / "plain old", "old")
    run_job(tmp_path / "plain new", "new")
    num_raised = num_undone = num_renewed = 0
    for fatal in range(1000):
        point = FaultPoint(fatal, mode)
        root = tmp_path / str(fatal)
        run_job(root, "old", stop_after=7)
        fault_points.append(point)
        try:
            run_job(root, "new", overwrite=True, stop_after=1)
        except (OutputError, Killed):
            num_raised += 1
        fault_points.append(FaultPoint(-1, mode))
        if point.num_calls <= fatal:
            break
        folder = OutputFolder(root)
        run = read_run(folder)
        assert run is not None
        owner = run.identity["task"]["prompt"]
        assert texts(root) <= {owner}, f"call {fatal}"
        if fatal % 2:
            # Whoever started the overwriting goes on with it.
            run_job(root, "new", overwrite=True)
            assert content(root).equals(content(tmp_path / "plain new")), f"call {fatal}"
            continue
        finish_replacing(folder)
        if owner == "old":
            num_undone += 1
            # The old data is all there again: what was finished is not computed anew.
            assert content(root).num_rows == 6, f"call {fatal}"
            assert len(folder.list_segments(1)) == 1
        else:
            num_renewed += 1
        run_job(root, owner)
        assert content(root).equals(content(tmp_path / f"plain {owner}")), f"call {fatal}"
        assert not list(folder.inner.glob("replaced-*"))
    assert num_undone >= 5 and num_renewed >= 4
    assert num_raised > 0.4 * fatal
