"""Rows with an error, answered again: the part is the old one or the new one, never neither."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchvlm.config import RetryConfig
from batchvlm.errors import ErrorType, OutputError
from batchvlm.output import writer as writer_module
from batchvlm.output.folder import OutputFolder
from batchvlm.output.parts import failures_in_parts, shards_to_retry
from batchvlm.output.writer import ShardWriter
from batchvlm.records import Failure, Result, Shard, Status

from .faults import FaultPoint, Killed
from .make import PROVENANCE, make_plan, make_result, open_writer, read_data

PLAN = make_plan(2, 21)
SHARD = PLAN[0]
FAILED = {row for row in range(21) if row % 7 == 3}  # `make_result` says so: 3, 10, 17
RETRY = RetryConfig(errors=["oom"], max_attempts=3)


def failed(row: int, kind: ErrorType = ErrorType.OOM, **changes: Any) -> Result:
    failure = Failure(error_type=kind, message="told to")
    changes = {"status": Status.ERROR, "failure": failure} | changes
    return make_result(SHARD, row, generated_text=None, **changes)


def mended(row: int) -> Result:
    return make_result(
        SHARD, row, status=Status.SUCCESS, failure=None, generated_text=f"again {row}"
    )


def finish(folder: OutputFolder, shard: Shard = SHARD) -> None:
    """A part with three rows that ran out of memory, and one that is no image."""
    writer = open_writer(folder, PLAN, shard.index)
    for row in range(shard.num_rows):
        if row in FAILED:
            writer.add(failed(row))
        elif row == 5:
            writer.add(failed(row, ErrorType.DECODE))
        else:
            writer.add(make_result(shard, row))
    writer.commit()


def retry(folder: OutputFolder, policy: RetryConfig = RETRY) -> ShardWriter:
    return open_writer(folder, PLAN, 0, retry=policy)


def needs_retry(folder: OutputFolder, policy: RetryConfig) -> bool:
    failures = failures_in_parts(folder, PLAN, PROVENANCE.fingerprint, {0})
    return shards_to_retry(folder, failures, {0}, policy) == {0}


def answer(writer: ShardWriter, rows: list[int], *, flush: bool = False) -> None:
    for row in rows:
        values = vars_of(mended(row)) | {"attempts": writer.attempts[row]}
        writer.add(Result(**values))
        if flush:
            writer.flush()


def vars_of(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__slots__}


def column(folder: OutputFolder, name: str) -> list[Any]:
    values: list[Any] = read_data(folder)[name].to_pylist()
    return values


def test_a_retry_supersedes_the_rows_it_names_and_no_other(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    finish(folder)
    before = read_data(folder)
    assert needs_retry(folder, RETRY)
    assert not needs_retry(folder, RetryConfig(errors=["timeout"]))
    writer = retry(folder)
    assert writer.finished_rows == set(range(21)) - FAILED
    assert writer.attempts == dict.fromkeys(FAILED, 2)
    answer(writer, sorted(FAILED), flush=True)
    assert read_data(folder).equals(before)  # readers see the old part until the new one is there
    writer.commit()
    after = read_data(folder)
    for old, new in zip(before.to_pylist(), after.to_pylist(), strict=True):
        if old["row_index"] in FAILED:
            assert (new["status"], new["error_type"], new["attempts"]) == ("success", None, 2)
            assert new["generated_text"] == f"again {new['row_index']}"
        else:
            assert new == old
    assert not needs_retry(folder, RETRY)
    assert folder.shards_with_segments(is_retry=True) == []


def test_a_killed_retry_is_taken_up_where_it_was(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    finish(folder)
    answer(retry(folder), [3, 10], flush=True)  # and killed
    # A run that does not retry leaves them alone, and so does its tidying up.
    plain = open_writer(folder, PLAN, 0)
    assert plain.finished_rows == set(range(21))
    plain.commit()
    folder.remove_leftovers(2)
    writer = retry(folder)
    assert writer.attempts == {17: 2}
    answer(writer, [17])
    writer.commit()
    assert [i for i, n in enumerate(column(folder, "attempts")) if n == 2] == sorted(FAILED)


def test_rows_that_were_all_answered_before_the_kill_only_need_the_commit(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    finish(folder)
    answer(retry(folder), sorted(FAILED), flush=True)
    # Whatever errors the next run names: it would otherwise leave the answers where they are.
    other = RetryConfig(errors=["timeout"])
    assert needs_retry(folder, other)
    writer = retry(folder, other)
    assert writer.finished_rows == set(range(21))
    writer.commit()
    assert column(folder, "status").count("error") == 1


def test_a_row_is_given_up_after_max_attempts(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    finish(folder)
    for attempts in (2, 3):
        writer = retry(folder)
        assert set(writer.attempts.values()) == {attempts}
        for row in writer.attempts:
            writer.add(failed(row, attempts=attempts))
        writer.commit()
        assert column(folder, "attempts").count(attempts) == 3
    assert not needs_retry(folder, RETRY)
    assert retry(folder).attempts == {}


def test_a_retry_of_an_unfinished_shard(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    writer = open_writer(folder, PLAN, 0)
    for row in (2, 3, 4):
        writer.add(failed(row) if row in FAILED else make_result(SHARD, row))
    writer.flush()
    again = retry(folder)
    assert (again.finished_rows, again.attempts) == ({2, 4}, {3: 2})
    answer(again, [3], flush=True)
    assert retry(folder).finished_rows == {2, 3, 4}
    last = open_writer(folder, PLAN, 0)
    assert last.finished_rows == {2, 3, 4}
    for row in set(range(21)) - last.finished_rows:
        last.add(make_result(SHARD, row))
    last.commit()
    assert column(folder, "generated_text")[3] == "again 3"
    assert column(folder, "attempts")[3] == 2


def test_another_process_finishes_the_shard_while_a_row_of_it_is_put_into_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path)
    first = open_writer(folder, PLAN, 0)
    first.add(failed(3))
    first.flush()
    again, other = retry(folder), open_writer(folder, PLAN, 0)
    for row in range(21):
        if row not in again.finished_rows and row != 3:
            again.add(make_result(SHARD, row))
    again.flush()
    answer(again, [3])
    for row in set(range(21)) - {3}:
        other.add(make_result(SHARD, row))
    other.commit()
    # As it is before the other one has removed the segments.
    late = folder.segment(0, "20990101T000000-00000000", 0)
    late.parent.mkdir(parents=True)
    late.write_bytes(b"")
    again._segments = [replace(segment, path=late) for segment in again._segments]
    replace_rows = writer_module.replace_rows

    def remove_then_replace(*args: Any) -> Iterator[Any]:
        folder.remove_segments(0)
        return replace_rows(*args)

    monkeypatch.setattr(writer_module, "replace_rows", remove_then_replace)
    again.commit()
    assert column(folder, "generated_text")[3] == "again 3"
    assert column(folder, "row_index") == list(range(21))


def test_segments_that_a_kill_left_behind_take_no_newer_rows_place(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    finish(folder)
    writer = retry(folder)
    for row in FAILED:
        writer.add(failed(row, attempts=2))
    writer.flush()
    (left,) = folder.list_segments(0, is_retry=True)
    content = left.read_bytes()
    writer.commit()
    second = retry(folder)
    assert set(second.attempts.values()) == {3}
    answer(second, sorted(FAILED))
    second.commit()
    done = read_data(folder)
    folder.commit_file(lambda file: file.write(content), left)  # back from the dead
    third = retry(folder)
    assert third.attempts == {}
    third.commit()
    assert read_data(folder).equals(done)
    assert folder.shards_with_segments(is_retry=True) == []


@pytest.mark.parametrize("seed", range(6))
def test_two_retries_of_one_part_at_once(tmp_path: Path, seed: int) -> None:
    """Each of its own error types: neither may undo the other's rows."""
    draw = random.Random(seed)
    folder = OutputFolder(tmp_path)
    finish(folder)
    writers = [retry(folder), retry(folder, RetryConfig(errors=["decode", "oom"]))]
    todo = [sorted(writer.attempts) for writer in writers]
    live = [0, 1]
    while live:
        i = draw.choice(live)
        if todo[i]:
            answer(writers[i], [todo[i].pop()], flush=draw.random() < 0.5)
        else:
            writers[i].commit()
            live.remove(i)
    assert column(folder, "row_index") == list(range(21))
    assert column(folder, "status") == ["success"] * 21
    assert column(folder, "attempts") == [2 if i in FAILED | {5} else 1 for i in range(21)]


def test_a_damaged_segment_waits_for_nobody(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    finish(folder)
    path = folder.segment(SHARD.index, "20260101T000000-00000000", 0, is_retry=True)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbled by the disk")
    writer = retry(folder)
    answer(writer, sorted(writer.attempts))
    writer.commit()
    assert folder.list_segments(SHARD.index, is_retry=True) == []
    assert not path.parent.exists()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    finish(folder)
    part = folder.part(0, 2)
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"part-00000.* cannot be read"):
        needs_retry(folder, RETRY)
    with pytest.raises(OutputError, match=r"part-00000.* cannot be read.*computed again"):
        retry(folder)


@pytest.mark.kill
@pytest.mark.parametrize("mode", ["refused", "full", "half", "killed", "killed after"])
def test_a_fault_at_every_call_of_a_retry(
    tmp_path: Path, fault_points: list[FaultPoint], mode: str
) -> None:
    def job(folder: OutputFolder) -> None:
        writer = retry(folder)
        for row in sorted(writer.attempts):
            answer(writer, [row], flush=True)
        writer.commit()

    plain = OutputFolder(tmp_path / "plain")
    finish(plain)
    old = read_data(plain)
    job(plain)
    new = read_data(plain)
    num_raised = 0
    for fatal in range(1000):
        point = FaultPoint(fatal, mode)
        folder = OutputFolder(tmp_path / str(fatal))
        finish(folder)
        fault_points.append(point)
        try:
            job(folder)
        except (OutputError, Killed):
            num_raised += 1
        fault_points.append(FaultPoint(-1, mode))
        if point.num_calls <= fatal:
            break
        there = read_data(folder)
        assert there.equals(old) or there.equals(new), f"call {fatal}"
        job(OutputFolder(folder.root))
        assert read_data(folder).equals(new), f"call {fatal}"
        assert folder.shards_with_segments(is_retry=True) == []
    assert fatal > 20 and num_raised > 0.5 * fatal
