"""Rows of a merged part answered again: the part is rewritten once for all of its shards."""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from batchvlm.config import RetryConfig
from batchvlm.errors import OutputError
from batchvlm.output import segments as segments_module
from batchvlm.output.compact import compact
from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import read_run
from batchvlm.output.schema import Provenance
from batchvlm.output.verify import verify
from batchvlm.output.writer import Answered, ShardWriter, update_part
from batchvlm.records import Status

from .faults import FaultPoint, Killed
from .make import SCHEMA, make_result, read_data, to_retry
from .test_compact import NUM_SHARDS, job, names
from .test_verify import last_byte

RETRY = RetryConfig(errors=["decode"])
FAILED = {3, 10, 17, 24}  # `make_result` says so; of shards 0, 2, 4 and 6


def merged(root: Path, *, target_rows: int = 80) -> OutputFolder:
    """A finished and compacted job."""
    folder = job(root)
    compact(folder, target_rows=target_rows)
    return folder


def about(folder: OutputFolder) -> Provenance:
    run = read_run(folder)
    assert run is not None
    return Provenance(model="m", fingerprint=run.fingerprint, run_id="again")


def shards_left(folder: OutputFolder) -> set[int]:
    run = read_run(folder)
    assert run is not None
    return to_retry(folder, run, range(NUM_SHARDS), RETRY)


def answer(
    folder: OutputFolder, indices: Iterable[int], *, flush: bool = False
) -> dict[int, Answered]:
    """What a process does with these shards before it rewrites their parts."""
    run = read_run(folder)
    assert run is not None
    answered = {}
    for index in indices:
        shard = run.plan[index]
        writer = ShardWriter(
            folder, shard, NUM_SHARDS, SCHEMA, about(folder), flush_every_s=1e9, retry=RETRY
        )
        for row in sorted(writer.attempts):
            values = {"status": Status.SUCCESS, "failure": None, "generated_text": "again"}
            writer.add(make_result(shard, row, attempts=writer.attempts[row], **values))
            if flush:
                writer.flush()
        if (waiting := writer.leave_to_update()) is not None:
            answered[index] = waiting
        else:
            writer.commit()
    return answered


def update(folder: OutputFolder, answered: dict[int, Answered]) -> None:
    """What it does in the end."""
    while answered:
        for index in update_part(folder, answered, NUM_SHARDS, SCHEMA, about(folder)):
            del answered[index]


def tried_twice(folder: OutputFolder) -> set[int]:
    rows = read_data(folder).to_pylist()
    assert [row["row_index"] for row in rows] == list(range(25))
    for row in rows:
        assert (row["attempts"] == 2) == (row["generated_text"] == "again")
    return {row["row_index"] for row in rows if row["attempts"] == 2}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the parts that were written since, each time."""
    commit_file, found = OutputFolder.commit_file, []

    def count(self: OutputFolder, write: Any, final: Path, **options: Any) -> bool:
        if final.parent == self.data:
            found.append(final.name)
        return commit_file(self, write, final, **options)

    monkeypatch.setattr(OutputFolder, "commit_file", count)
    return found


def test_each_merged_part_is_rewritten_once(tmp_path: Path, written: list[str]) -> None:
    folder = merged(tmp_path, target_rows=12)
    before = read_data(folder).to_pylist()
    assert names(folder) == [
        "part-00000-to-00002-of-00007.parquet",
        "part-00003-to-00005-of-00007.parquet",
        "part-00006-of-00007.parquet",
    ]
    written.clear()
    answered = answer(folder, [6, 4, 2, 0])
    # A part of one shard is written at once; the others wait, and nobody forgets them.
    assert written == ["part-00006-of-00007.parquet"]
    assert sorted(answered) == [0, 2, 4] and shards_left(folder) == {0, 2, 4}
    assert tried_twice(folder) == {24}
    with pytest.raises(OutputError, match="rows of 3 shards were answered again and wait"):
        compact(folder, target_rows=80)
    update(folder, answered)
    assert written[1:] == names(folder)[:2]
    assert tried_twice(folder) == FAILED and shards_left(folder) == set()
    for old, new in zip(before, read_data(folder).to_pylist(), strict=True):
        assert old["row_index"] in FAILED or new == old
    assert folder.shards_with_segments(is_retry=True) == []
    assert verify(folder).faults == []


def test_shards_without_new_answers_cost_nothing(tmp_path: Path, written: list[str]) -> None:
    folder = merged(tmp_path)
    written.clear()
    update(folder, answer(folder, [1, 3]))
    assert written == []


def test_a_shard_over_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(segments_module, "_MAX_GROUP_ROWS", 3)
        compact(folder, target_rows=80)
        before = read_data(folder)
        update(folder, answer(folder, range(NUM_SHARDS)))
    after = read_data(folder)
    assert tried_twice(folder) == FAILED
    is_old = [index not in FAILED for index in range(25)]
    assert after.filter(is_old).equals(before.filter(is_old))


def test_a_kill_between_flush_and_rewrite_loses_nothing(tmp_path: Path) -> None:
    folder = merged(tmp_path)
    before = read_data(folder)
    answer(folder, [0, 2, 4])  # and killed
    assert read_data(folder).equals(before)
    assert shards_left(folder) == {0, 2, 4, 6}
    job(folder.root)  # a run without `retry.errors` leaves them alone
    assert shards_left(folder) == {0, 2, 4, 6}
    run = read_run(folder)
    assert run is not None
    for index in (0, 2, 4):
        again = ShardWriter(
            folder, run.plan[index], 7, SCHEMA, about(folder), flush_every_s=1e9, retry=RETRY
        )
        assert again.attempts == {}
    update(folder, answer(folder, sorted(shards_left(folder))))
    assert tried_twice(folder) == FAILED and shards_left(folder) == set()


@pytest.mark.parametrize("seed", range(6))
def test_two_writers_of_one_merged_part(tmp_path: Path, seed: int) -> None:
    """With some shards in common: neither undoes the other's rows, whoever is first."""
    draw = random.Random(seed)
    folder = merged(tmp_path)
    todo = [draw.sample([0, 2, 4, 6], 3), draw.sample([0, 2, 4, 6], 3)]
    todo[1] += {0, 2, 4, 6} - {*todo[0], *todo[1]}
    answered: list[dict[int, Answered]] = [{}, {}]
    live = [0, 1]
    while live:
        i = draw.choice(live)
        if todo[i]:
            answered[i] |= answer(folder, [todo[i].pop()], flush=draw.random() < 0.5)
        else:
            update(folder, answered[i])
            live.remove(i)
    assert tried_twice(folder) == FAILED
    assert shards_left(folder) == set()
    assert folder.shards_with_segments(is_retry=True) == []


def test_rows_that_a_live_writer_has_not_finished_are_left_to_it(tmp_path: Path) -> None:
    folder = merged(tmp_path)
    ours, theirs = answer(folder, [0, 2]), answer(folder, [4, 6])
    update(folder, ours)
    assert tried_twice(folder) == {3, 10} and shards_left(folder) == {4, 6}
    update(folder, theirs)
    assert tried_twice(folder) == FAILED


def test_another_writer_merges_the_same_segments_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are no locks: segments vanish while the part is being written."""
    folder, other = merged(tmp_path), OutputFolder(tmp_path)
    answered = answer(folder, [0, 2, 4, 6])
    commit_file = OutputFolder.commit_file

    def late(self: OutputFolder, write: Any, final: Path, **options: Any) -> bool:
        def write_late(file: BinaryIO) -> None:
            if final.parent == self.data:
                monkeypatch.setattr(OutputFolder, "commit_file", commit_file)
                theirs = answer(other, [0, 2])
                monkeypatch.setattr(folder._files, "lock", lock)
                update(other, theirs)
            write(file)

        return commit_file(self, write_late, final, **options)

    lock = folder._files.lock
    monkeypatch.setattr(folder._files, "lock", lambda path: nullcontext())
    monkeypatch.setattr(OutputFolder, "commit_file", late)
    update(folder, answered)
    assert tried_twice(folder) == FAILED
    assert verify(folder).faults == []


def test_a_merged_part_that_was_merged_further_meanwhile(tmp_path: Path) -> None:
    """`compact` looked for waiting rows just before they were flushed."""
    folder = merged(tmp_path, target_rows=8)
    answered = answer(folder, [0, 2])
    folder.retries.rename(tmp_path / "aside")
    compact(folder, target_rows=80)
    (tmp_path / "aside").rename(folder.retries)
    update(folder, answered)
    assert tried_twice(folder) == {3, 10}


def test_a_damaged_merged_part_is_named(tmp_path: Path) -> None:
    folder = merged(tmp_path)
    (part,) = folder.data_files()
    answered = answer(folder, [0])
    content = bytearray(part.read_bytes())
    content[last_byte(part, "generated_text")] ^= 0xFF
    part.write_bytes(content)
    with pytest.raises(OutputError, match=r"part-00000-to-.* cannot be read.*delete it"):
        update(folder, answered)
    assert part.read_bytes() == content
    assert len(folder.list_segments(0, is_retry=True)) == 1


def test_an_own_segment_that_the_disk_damaged_is_named(tmp_path: Path) -> None:
    folder = merged(tmp_path)
    before = read_data(folder)
    answered = answer(folder, [0, 2])
    (path,) = folder.list_segments(2, is_retry=True)
    path.write_bytes(b"garbled by the disk")
    with pytest.raises(OutputError, match=rf"cannot read a segment any more: {path}"):
        update(folder, answered)
    assert read_data(folder).equals(before)
    # The next run computes its row again, and removes it.
    update(folder, answer(folder, [0, 2]))
    assert tried_twice(folder) == {3, 10}
    assert folder.shards_with_segments(is_retry=True) == []


def test_a_part_that_is_gone_is_an_error(tmp_path: Path) -> None:
    folder = merged(tmp_path)
    answered = answer(folder, [2])
    folder.data_files()[0].unlink()
    with pytest.raises(OutputError, match="the part of shard 2 was removed"):
        update(folder, answered)
    assert len(folder.list_segments(2, is_retry=True)) == 1


def test_a_full_disk_at_the_rewrite_leaves_the_rows_for_the_next_run(
    tmp_path: Path, fault_points: list[FaultPoint]
) -> None:
    folder = merged(tmp_path)
    before = read_data(folder)
    answered = answer(folder, [0, 2, 4, 6])
    fault_points.append(FaultPoint(0, "full"))
    with pytest.raises(OutputError, match=r"cannot write .*make room and run the same command"):
        update(folder, answered)
    fault_points.append(FaultPoint(-1, "full"))
    assert read_data(folder).equals(before)
    assert sorted(answered) == [0, 2, 4, 6] and shards_left(folder) == {0, 2, 4, 6}
    update(folder, answer(folder, [0, 2, 4, 6]))
    assert tried_twice(folder) == FAILED


@pytest.mark.kill
@pytest.mark.parametrize("mode", ["refused", "full", "half", "killed", "killed after"])
def test_a_fault_at_every_call(tmp_path: Path, fault_points: list[FaultPoint], mode: str) -> None:
    def again(folder: OutputFolder) -> None:
        update(folder, answer(folder, sorted(shards_left(folder)), flush=True))

    plain = merged(tmp_path / "plain", target_rows=16)
    old = read_data(plain)
    again(plain)
    new = read_data(plain)
    assert tried_twice(plain) == FAILED
    num_raised = 0
    for fatal in range(1000):
        folder = merged(tmp_path / str(fatal), target_rows=16)
        point = FaultPoint(fatal, mode)
        fault_points.append(point)
        try:
            again(folder)
        except (OutputError, Killed):
            num_raised += 1
        fault_points.append(FaultPoint(-1, mode))
        if point.num_calls <= fatal:
            break
        # Each part is the old one or the new one.
        rows = zip(*(table.to_pylist() for table in (read_data(folder), old, new)), strict=True)
        assert all(row in (before, after) for row, before, after in rows), f"call {fatal}"
        assert verify(folder).faults == []
        again(OutputFolder(folder.root))
        assert read_data(folder).equals(new), f"call {fatal}"
        assert not list(folder.retries.rglob("*.parquet"))
        compact(folder, target_rows=80)
    assert fatal > 20 and num_raised > 0.4 * fatal
