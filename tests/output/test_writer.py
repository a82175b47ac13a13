"""One shard, in one process: what the writer takes, keeps and leaves."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.errors import OutputError
from batchvlm.output import disk as disk_module
from batchvlm.output import writer as writer_module
from batchvlm.output.folder import OutputFolder
from batchvlm.output.schema import output_schema
from batchvlm.output.writer import ShardWriter
from batchvlm.records import Shard

from .make import PROVENANCE, make_plan, make_result, open_writer, read_data, undisturbed

PLAN = make_plan(1, 90)  # One shard, of 30 rows.
SHARD = PLAN[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The output of a job that nothing happens to."""
    return undisturbed(PLAN, tmp_path_factory.mktemp("plain"))


def fill(writer: ShardWriter, shard: Shard = SHARD) -> None:
    for row in range(shard.num_rows):
        if row not in writer.finished_rows:
            writer.add(make_result(shard, row))


def test_a_part_says_what_it_is(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    writer = open_writer(folder, PLAN, 0)
    fill(writer)
    path = writer.commit()
    assert path == folder.part(0, 1)
    metadata = pq.read_metadata(path)
    assert metadata.metadata[b"batchvlm.fingerprint"] == b"0123456789abcdef"
    assert metadata.metadata[b"batchvlm.shard"] == b"0"
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {
        path,
        folder.inner / "lock",
    }


def test_row_groups_are_of_moderate_size(tmp_path: Path) -> None:
    shard = Shard(index=0, source_file="x", first_row=0, num_rows=2500, first_row_index=0)
    schema = output_schema([], token_ids=False)
    writer = ShardWriter(OutputFolder(tmp_path), shard, 1, schema, PROVENANCE, flush_every_s=1e9)
    for row in reversed(range(2500)):
        writer.add(make_result(shard, row))
    metadata = pq.read_metadata(writer.commit())
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [1024, 1024, 452]


def test_an_empty_shard_is_a_part_without_rows(tmp_path: Path) -> None:
    shard = Shard(index=0, source_file="x", first_row=0, num_rows=0, first_row_index=0)
    writer = open_writer(OutputFolder(tmp_path), [shard], 0)
    assert pq.read_table(writer.commit()).num_rows == 0


def test_flushes_when_the_clock_says_so(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    now = [100.0]
    writer = open_writer(folder, PLAN, 0, flush_every_s=10, clock=lambda: now[0])
    for row, at_s, num_segments in [
        (5, 109.9, 0),
        (1, 110.0, 1),  # With the row before.
        (2, 119.9, 1),
        (0, 500.0, 2),
        (3, 509.0, 2),  # Ten seconds after the last flush, not after the one before.
    ]:
        now[0] = at_s
        writer.add(make_result(SHARD, row))
        assert len(folder.list_segments(0)) == num_segments
    writer.flush()
    writer.flush()  # Nothing new: no file.
    assert len(folder.list_segments(0)) == 3
    assert open_writer(folder, PLAN, 0).finished_rows == {0, 1, 2, 3, 5}


def test_flushes_when_enough_rows_wait(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    writer = open_writer(folder, PLAN, 0, flush_every_rows=3)
    for row in range(8):
        writer.add(make_result(SHARD, row))
        assert len(folder.list_segments(0)) == (row + 1) // 3


def test_large_kept_values_are_flushed_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_MAX_PENDING_BYTES", 100)
    folder = OutputFolder(tmp_path)
    writer = open_writer(folder, PLAN, 0, flush_every_s=1e9)
    for row in range(6):
        writer.add(make_result(SHARD, row, kept={"image": {"bytes": b"x" * 30, "path": "a.png"}}))
    # 35 bytes a row: the third one reaches the limit, and so does the sixth.
    assert len(folder.list_segments(0)) == 2


def test_wrong_rows_are_our_own_mistake(tmp_path: Path) -> None:
    writer = open_writer(OutputFolder(tmp_path), PLAN, 0)
    writer.add(make_result(SHARD, 3))
    for wrong in (
        make_result(SHARD, 3),
        make_result(SHARD, -1),
        make_result(SHARD, 30),
        make_result(SHARD, 4, row_index=5),
    ):
        with pytest.raises(AssertionError):
            writer.add(wrong)
    with pytest.raises(AssertionError, match="lacks 29 rows"):
        writer.commit()
    assert not (tmp_path / "data").exists()
    writer.flush()
    with pytest.raises(AssertionError):
        open_writer(OutputFolder(tmp_path), PLAN, 0).add(make_result(SHARD, 3))


@settings(max_examples=40)
@given(
    order=st.permutations(range(30)),
    steps=st.lists(st.sampled_from(["add", "flush", "restart"]), max_size=60),
)
def test_every_row_once_whatever_the_order(
    plain: pa.Table, order: list[int], steps: list[str]
) -> None:
    with TemporaryDirectory() as root:
        folder = OutputFolder(Path(root) / "out")
        writer = open_writer(folder, PLAN, 0)
        todo, flushed, unflushed = list(order), set(), set()
        for step in steps:
            if step == "add" and todo:
                unflushed.add(todo[-1])
                writer.add(make_result(SHARD, todo.pop()))
            elif step == "flush":
                writer.flush()
                flushed |= unflushed
                unflushed = set()
            elif step == "restart":
                writer = open_writer(folder, PLAN, 0)
                assert writer.finished_rows == flushed
                todo += unflushed
                unflushed = set()
        for row in todo:
            writer.add(make_result(SHARD, row))
        writer.commit()
        assert read_data(folder).equals(plain)
        assert folder.list_segments(0) == []


def test_a_finished_shard_has_nothing_left_to_do(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    first = open_writer(folder, PLAN, 0)
    fill(first)
    path = first.commit()
    content = path.read_bytes()
    # As after a kill between the rename and the removal.
    folder.commit_file(lambda file: file.write(b"left over"), folder.segment(0, "a", 0))
    again = open_writer(folder, PLAN, 0)
    assert again.finished_rows == set(range(30))
    assert folder.list_segments(0) == []
    assert first.commit() == again.commit() == path
    assert path.read_bytes() == content


def test_the_part_that_is_there_first_stays(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    first, second = open_writer(folder, PLAN, 0), open_writer(folder, PLAN, 0)
    fill(first)
    fill(second)
    inode = first.commit().stat().st_ino
    assert second.commit().stat().st_ino == inode


@pytest.mark.parametrize("seed", range(8))
def test_two_live_writers_of_a_shard_leave_a_right_part(tmp_path: Path, seed: int) -> None:
    """Both add, flush, read the other's segments, commit and clean up, in any interleaving."""
    draw = random.Random(seed)
    folder = OutputFolder(tmp_path / "out")
    writers = [open_writer(folder, PLAN, 0)]
    writers[0].add(make_result(SHARD, 7))
    writers[0].flush()
    writers.append(open_writer(folder, PLAN, 0))  # Has read a segment of the first.
    assert writers[1].finished_rows == {7}
    todo = [[row for row in draw.sample(range(30), 30) if row != 7] for _ in writers]
    live = [0, 1]
    while live:
        i = draw.choice(live)
        if todo[i]:
            writers[i].add(make_result(SHARD, todo[i].pop()))
            if draw.random() < 0.3:
                writers[i].flush()
        else:
            assert writers[i].commit() == folder.part(0, 1)
            live.remove(i)
    assert read_data(folder).equals(undisturbed(PLAN, tmp_path / "plain"))
    assert open_writer(folder, PLAN, 0).finished_rows == set(range(30))
    assert folder.list_segments(0) == []


def test_the_other_writer_finishes_while_this_one_writes_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path / "out")
    before = open_writer(folder, PLAN, 0)
    before.add(make_result(SHARD, 7))
    before.flush()
    first, second = open_writer(folder, PLAN, 0), open_writer(folder, PLAN, 0)
    fill(first)
    fill(second)
    open_file = OutputFolder.open

    def open_after_the_first_is_done(self: OutputFolder, path: Path) -> object:
        monkeypatch.setattr(OutputFolder, "open", open_file)
        first.commit()
        return open_file(self, path)

    monkeypatch.setattr(OutputFolder, "open", open_after_the_first_is_done)
    assert second.commit() == folder.part(0, 1)
    assert read_data(folder).equals(undisturbed(PLAN, tmp_path / "plain"))


def test_the_other_writer_finishes_while_this_one_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path / "out")
    first, second = open_writer(folder, PLAN, 0), open_writer(folder, PLAN, 0)
    fill(first)
    second.add(make_result(SHARD, 7))
    publish = disk_module._publish

    def publish_then_lose_the_folder(*args: Any, **options: Any) -> bool:
        monkeypatch.setattr(disk_module, "_publish", publish)
        is_ours = publish(*args, **options)
        first.commit()
        return is_ours

    monkeypatch.setattr(disk_module, "_publish", publish_then_lose_the_folder)
    second.flush()
    for row in set(range(30)) - {7}:
        second.add(make_result(SHARD, row))
    assert second.commit() == folder.part(0, 1)
    assert folder.list_segments(0) == []
    assert read_data(folder).equals(undisturbed(PLAN, tmp_path / "plain"))


def test_a_segment_that_is_lost_before_the_commit_costs_its_rows_only(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    writer = open_writer(folder, PLAN, 0)
    writer.add(make_result(SHARD, 7))
    writer.flush()
    writer.add(make_result(SHARD, 8))
    writer.flush()
    lost, _ = folder.list_segments(0)
    lost.write_bytes(lost.read_bytes()[:-5])
    fill_rest = [row for row in range(30) if row not in (7, 8)]
    for row in fill_rest:
        writer.add(make_result(SHARD, row))
    with pytest.raises(OutputError, match=r"cannot read a segment.*run the same command again"):
        writer.commit()
    assert not folder.part(0, 1).exists()
    assert list(folder.tmp.iterdir()) == []
    again = open_writer(folder, PLAN, 0)
    assert again.finished_rows == {8}
    fill(again)
    again.commit()
    assert read_data(folder).equals(undisturbed(PLAN, tmp_path / "plain"))


def test_readers_see_finished_shards_only_while_the_job_runs(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    plan = make_plan(3, 40)
    for index in (0, 2):
        writer = open_writer(folder, plan, index)
        fill(writer, plan[index])
        writer.commit()
    running = open_writer(folder, plan, 1, flush_every_s=0)
    running.add(make_result(plan[1], 5))
    (folder.tmp / "half-written.parquet").write_bytes(b"PAR1")
    assert len(folder.list_segments(1)) == 1

    expected = undisturbed(plan, tmp_path / "plain")
    finished = [row for row in expected.to_pylist() if not 40 <= row["row_index"] < 80]
    assert read_data(folder).to_pylist() == finished
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(folder.data), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.to_list() == finished
