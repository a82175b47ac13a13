"""How far a job is, from its folder alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.config import RetryConfig
from batchvlm.errors import InputError
from batchvlm.output.folder import OutputFolder
from batchvlm.output.status import status

from . import test_retry
from .make import make_result, open_writer
from .test_overwrite import run_job


def test_a_dead_job_half_way(tmp_path: Path) -> None:
    run_job(tmp_path, "ours", stop_after=7)
    folder = OutputFolder(tmp_path)
    # A file that a kill of the machine cut short, and one row that two writers have.
    (damaged,) = folder.list_segments(1)
    damaged.with_name("x-00000.parquet").write_bytes(b"PAR1")
    damaged.with_name("y-00000.parquet").write_bytes(damaged.read_bytes())
    found = status(folder)
    assert (found.num_rows, found.num_done, found.num_in_segments) == (8, 7, 1)
    assert (found.num_shards, found.num_finished) == (2, 1)
    assert found.errors == {"decode": 1}
    assert (found.num_live, found.rows_per_s) == (0, 0)
    assert found.written_s_ago is not None and found.written_s_ago < 3600


def test_a_truncated_part_is_named_and_its_rows_are_not_done(tmp_path: Path) -> None:
    run_job(tmp_path, "ours")
    folder = OutputFolder(tmp_path)
    part = folder.part(0, 2)
    part.write_bytes(part.read_bytes()[:-9])
    found = status(folder)
    assert found.damaged == [part.name]
    assert (found.num_done, found.num_finished, found.errors) == (2, 1, {})


def test_live_processes_and_their_rate(tmp_path: Path) -> None:
    run_job(tmp_path, "ours", stop_after=3)
    folder = OutputFolder(tmp_path)
    folder.metrics.mkdir()
    now = time.time()
    for name, rate, is_over, age_s in [
        ("task-00000-rank-000-20260101T000000-a", 100.0, False, 9000),
        ("task-00000-rank-000-20260102T000000-a", 2.5, False, 5),
        ("task-00000-rank-001-20260102T000000-b", 4.0, False, 30),
        ("task-00001-rank-000-20260102T000000-c", 100.0, True, 5),
        ("task-00002-rank-000-20260102T000000-d", 100.0, False, 4000),
        ("task-00003-rank-000-20260102T000000-e", 100.0, False, 5000),
    ]:
        path = folder.metrics / f"{name}.json"
        counts = {"rows_per_s": rate, "is_over": is_over, "where": f"n{name[-1]}, job 7"}
        path.write_text(json.dumps(counts))
        os.utime(path, (now - age_s, now - age_s))
    (folder.metrics / "task-00004-rank-000-20260102T000000-f.json").write_text('{"rows')
    found = status(folder, now_s=lambda: now)
    assert (found.num_live, found.num_over, found.rows_per_s) == (2, 1, 6.5)
    # The first of all died as well, but somebody has taken its place.
    assert [(silent.name, silent.where) for silent in found.silent] == [
        ("task 3 rank 0", "ne, job 7"),
        ("task 2 rank 0", "nd, job 7"),
    ]
    # A clock that was set back is no negative age.
    assert status(folder, now_s=lambda: now - 1e6).written_s_ago == 0


def test_a_process_that_flushes_rarely_is_not_silent_for_that(tmp_path: Path) -> None:
    run_job(tmp_path, "ours", stop_after=3)
    folder = OutputFolder(tmp_path)
    folder.metrics.mkdir()
    now = time.time()
    for rank, every_s in enumerate([30, 600, 600]):
        path = folder.metrics / f"task-00000-rank-{rank:03d}-20260101T000000-a.json"
        path.write_text(json.dumps({"flush_every_s": every_s}))
        os.utime(path, (now - 100 - 1000 * rank, now - 100 - 1000 * rank))
    found = status(folder, now_s=lambda: now)
    assert found.num_live == 1
    assert [silent.name for silent in found.silent] == ["task 0 rank 2", "task 0 rank 0"]


def test_rows_that_were_answered_again_wait(tmp_path: Path) -> None:
    run_job(tmp_path, "ours")
    folder = OutputFolder(tmp_path)
    plan = test_retry.PLAN
    other = OutputFolder(tmp_path / "other")
    test_retry.finish(other)
    writer = open_writer(other, plan, 0, retry=RetryConfig(errors=["oom"]))
    writer.add(make_result(plan[0], 3, attempts=2))
    writer.flush()
    (segment,) = other.list_segments(0, is_retry=True)
    folder.commit_file(
        lambda file: file.write(segment.read_bytes()), folder.segment(0, "a", 0, is_retry=True)
    )
    assert status(folder).num_waiting == 1


def test_of_two_answers_to_a_row_the_one_that_the_part_takes_is_counted(tmp_path: Path) -> None:
    """Two live writers had the shard in common: of their segments the earlier one counts."""
    run_job(tmp_path, "ours", stop_after=1)
    folder = OutputFolder(tmp_path)
    (first,) = folder.list_segments(0)
    table = pq.read_table(first)
    place = table.schema.get_field_index("error_type")
    kinds = pa.array(["fetch"], table.schema.field(place).type)
    pq.write_table(table.set_column(place, "error_type", kinds), first.with_name("z-00000.parquet"))
    assert status(folder).errors == {}
    first.rename(first.with_name("zz-00000.parquet"))
    assert status(folder).errors == {"fetch": 1}


def test_nothing_done_yet_and_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        status(OutputFolder(tmp_path / "none"))
    run_job(tmp_path, "ours", stop_after=0)
    found = status(OutputFolder(tmp_path))
    assert (found.num_done, found.written_s_ago) == (0, None)
