"""Fewer, larger parts: the same rows at every instant."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from batchvlm.config import RetryConfig
from batchvlm.errors import OutputError
from batchvlm.output import compact as compact_module
from batchvlm.output import exchange as exchange_module
from batchvlm.output.compact import compact
from batchvlm.output.folder import OutputFolder
from batchvlm.output.parts import failures_in_parts
from batchvlm.output.run_file import find_run, read_run, save_run
from batchvlm.output.schema import Provenance
from batchvlm.output.verify import verify
from batchvlm.output.writer import ShardWriter
from batchvlm.records import Status

from .faults import FaultPoint, Killed
from .make import SCHEMA, make_plan, make_result, read_data, to_retry
from .test_verify import last_byte

NUM_SHARDS, NUM_ROWS = 7, 4  # 25 rows


def job(root: Path, *, stop_after: int = 99, **options: Any) -> OutputFolder:
    """Compute what is missing of a job."""
    folder = OutputFolder(root)
    run = find_run(
        folder,
        identity={"prompt": "?"},
        layout={},
        settings={},
        packages={},
        plan=make_plan(NUM_SHARDS, NUM_ROWS),
    )
    save_run(folder, run)
    about = Provenance(model="m", fingerprint=run.fingerprint, run_id="r")
    finished = folder.finished_shards(len(run.plan))
    for shard in run.plan:
        if shard.index in finished and not options:
            continue
        if shard.index == stop_after:
            break
        writer = ShardWriter(
            folder, shard, len(run.plan), SCHEMA, about, flush_every_s=1e9, **options
        )
        for row in range(shard.num_rows):
            if row not in writer.finished_rows:
                writer.add(make_result(shard, row))
        writer.commit()
    return folder


def names(folder: OutputFolder) -> list[str]:
    return [path.name for path in folder.data_files()]


@pytest.fixture(params=["exchange", "two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system call that exchanges folders, and where the file system has none."""
    if request.param == "two steps":
        monkeypatch.setattr(exchange_module, "exchange", refuse_exchange)
    return str(request.param)


def test_parts_are_merged_up_to_the_size(tmp_path: Path, way: str) -> None:
    folder = job(tmp_path / "out")
    before = read_data(folder)
    done = compact(folder, target_rows=8)
    assert (done.num_before, done.num_after) == (7, 4)
    assert names(folder) == [
        "part-00000-to-00001-of-00007.parquet",
        "part-00002-to-00003-of-00007.parquet",
        "part-00004-to-00005-of-00007.parquet",
        "part-00006-of-00007.parquet",
    ]
    assert read_data(folder).equals(before)
    assert verify(folder).faults == []
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(folder.data), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["row_index"][:] == list(range(25))
    # Merged ones are merged on, and a run has nothing left to do.
    assert compact(folder, target_bytes=1 << 30).num_after == 1
    assert names(folder) == ["part-00000-to-00006-of-00007.parquet"]
    assert read_data(folder).equals(before)
    job(folder.root)
    assert names(folder) == ["part-00000-to-00006-of-00007.parquet"]
    assert sorted(path.name for path in folder.inner.iterdir()) == [
        "compacted",
        "lock",
        "run.json",
        "tmp",
    ]


def test_a_part_is_copied_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job(tmp_path)
    run = read_run(folder)
    assert run is not None
    failures = failures_in_parts(folder, run.plan, run.fingerprint, range(NUM_SHARDS))

    def refuse(first: Path, second: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert compact(folder, target_rows=8).num_after == 4
    assert failures_in_parts(folder, run.plan, run.fingerprint, range(NUM_SHARDS)) == failures


def test_small_row_groups_become_one(tmp_path: Path) -> None:
    """Twenty thousand groups of ten rows took half of a merged part for the footer alone."""
    folder = job(tmp_path)
    before = read_data(folder)
    compact(folder, target_rows=80)
    (merged,) = folder.data_files()
    assert pq.read_metadata(merged).num_row_groups == 1
    assert read_data(folder).equals(before)
    job(folder.root, retry=RetryConfig(errors=["decode"]))
    assert pq.read_metadata(merged).num_row_groups == 1


def test_nothing_to_merge_touches_nothing(tmp_path: Path) -> None:
    folder = job(tmp_path)
    before = {path: path.stat().st_ino for path in folder.data.iterdir()}
    assert compact(folder, target_rows=4).num_after == 7
    assert compact(folder, target_bytes=1).num_after == 7
    assert before == {path: path.stat().st_ino for path in folder.data.iterdir()}


def test_an_unfinished_job_is_refused(tmp_path: Path) -> None:
    folder = job(tmp_path, stop_after=6)
    with pytest.raises(
        OutputError, match=r"incomplete or damaged: missing .* 24.*only a finished job"
    ):
        compact(folder, target_rows=80)
    assert len(names(folder)) == 6


def test_a_live_writer_adds_nothing_to_merged_parts(tmp_path: Path) -> None:
    """Another process may still be at a shard that was finished and merged meanwhile."""
    folder = job(tmp_path, stop_after=6)
    run = read_run(folder)
    assert run is not None
    about = Provenance(model="m", fingerprint=run.fingerprint, run_id="r")
    late = ShardWriter(folder, run.plan[6], NUM_SHARDS, SCHEMA, about, flush_every_s=1e9)
    late.add(make_result(run.plan[6], 0))
    job(tmp_path)
    compact(folder, target_rows=80)
    assert late.commit() == folder.data / "part-00000-to-00006-of-00007.parquet"
    assert verify(folder).faults == []


def test_a_part_that_is_replaced_meanwhile_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job(tmp_path)
    real = compact_module._compare

    def replace_then_compare(*args: Any) -> None:
        real(*args)
        part = folder.part(0, NUM_SHARDS)
        content = part.read_bytes()
        folder.commit_file(lambda file: file.write(content), part)

    monkeypatch.setattr(compact_module, "_compare", replace_then_compare)
    with pytest.raises(OutputError, match="was written to meanwhile"):
        compact(folder, target_rows=80)
    assert len(names(folder)) == 7


def test_rows_of_merged_parts_are_answered_again(tmp_path: Path) -> None:
    """`make_result` fails every seventh row, from the third on."""
    folder = job(tmp_path)
    before = read_data(folder).to_pylist()
    compact(folder, target_rows=10)
    merged = names(folder)
    run = read_run(folder)
    assert run is not None
    about = Provenance(model="m", fingerprint=run.fingerprint, run_id="again")
    policy = RetryConfig(errors=["decode"])
    failed = {row["row_index"] for row in before if row["status"] == "error"}
    assert failed == {3, 10, 17, 24}
    wanted = set(range(NUM_SHARDS))
    assert to_retry(folder, run, wanted, policy) == {0, 2, 4, 6}
    assert to_retry(folder, run, {1, 2}, policy) == {2}
    seen = set()
    for shard in (run.plan[index] for index in (0, 2, 4, 6)):
        part = folder.find_part(shard.index, NUM_SHARDS)
        assert part is not None
        writer = ShardWriter(
            folder, shard, NUM_SHARDS, SCHEMA, about, flush_every_s=1e9, retry=policy
        )
        for row in writer.attempts:
            seen.add(shard.first_row_index + row)
            again = {"status": Status.SUCCESS, "failure": None, "generated_text": "again"}
            writer.add(make_result(shard, row, attempts=writer.attempts[row], **again))
            writer.flush()
        assert writer.commit() == part.path
        wanted.remove(shard.index)
        assert to_retry(folder, run, range(NUM_SHARDS), policy) <= wanted
    assert seen == failed and names(folder) == merged
    assert folder.shards_with_segments(is_retry=True) == []
    assert verify(folder).faults == []
    for old, new in zip(before, read_data(folder).to_pylist(), strict=True):
        if old["row_index"] in failed:
            found = (new["status"], new["attempts"], new["generated_text"], new["run_id"])
            assert found == ("success", 2, "again", "again")
        else:
            assert new == old
    compact(folder, target_rows=80)
    assert verify(folder).faults == []


def test_a_merged_part_is_read_once_however_many_shards_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job(tmp_path)
    compact(folder, target_rows=80)
    run = read_run(folder)
    assert run is not None
    opened = []
    open_file = folder.open

    def count(path: Path) -> Any:
        opened.append(path.name)
        return open_file(path)

    monkeypatch.setattr(folder, "open", count)
    policy = RetryConfig(errors=["decode"])
    assert to_retry(folder, run, range(NUM_SHARDS), policy) == {0, 2, 4, 6}
    assert opened == names(folder)


def test_two_retries_of_one_merged_part(tmp_path: Path) -> None:
    """Of two shards in it, each by a process of its own: neither undoes the other's rows."""
    folder = job(tmp_path)
    compact(folder, target_rows=80)
    run = read_run(folder)
    assert run is not None
    about = Provenance(model="m", fingerprint=run.fingerprint, run_id="again")
    policy = RetryConfig(errors=["decode"])
    writers = [
        ShardWriter(folder, run.plan[i], NUM_SHARDS, SCHEMA, about, flush_every_s=1e9, retry=policy)
        for i in (0, 2, 4, 6)
    ]
    for writer, index in zip(writers, (0, 2, 4, 6), strict=True):
        for row in writer.attempts:
            again = {"status": Status.SUCCESS, "failure": None, "generated_text": "again"}
            writer.add(make_result(run.plan[index], row, attempts=2, **again))
    for writer in reversed(writers):
        writer.commit()
    assert read_data(folder)["attempts"].to_pylist().count(2) == 4
    assert read_data(folder)["row_index"].to_pylist() == list(range(25))
    assert set(read_data(folder)["status"].to_pylist()) == {"success"}


@pytest.mark.parametrize("name", ["notes.txt", "labels/gold.csv", ".mine"])
def test_a_file_of_somebody_else_is_named_and_stays(tmp_path: Path, name: str) -> None:
    folder = job(tmp_path)
    other = folder.data / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("mine")
    with pytest.raises(OutputError, match=f"{name.split('/')[0]} is no part of the output"):
        compact(folder, target_rows=80)
    assert other.read_text() == "mine"
    assert len(names(folder)) == 7


def refuse_exchange(first: Path, second: Path) -> None:
    """What a file system says that cannot exchange two folders: NFS."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def kill_compact(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch, *, after_renames: int
) -> None:
    """Merge all parts in two steps, and die after so many renames of folders."""
    rename = os.rename
    left = [None] * after_renames

    def die(first: Path, second: Path) -> None:
        if not left:
            raise Killed
        left.pop()
        rename(first, second)

    def leave(path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(exchange_module, "exchange", refuse_exchange)
        patch.setattr(os, "rename", die)
        patch.setattr(shutil, "rmtree", leave)
        with pytest.raises(Killed):
            compact(folder, target_rows=80)


@pytest.mark.parametrize("after_renames", [2, 3])
def test_old_parts_that_a_kill_left_come_back_into_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_renames: int
) -> None:
    kill_compact(job(tmp_path), monkeypatch, after_renames=after_renames)
    about: dict[str, Any] = {"layout": {}, "settings": {}, "packages": {}}
    about |= {"identity": {"prompt": "another"}, "plan": make_plan(NUM_SHARDS, NUM_ROWS)}
    folder = OutputFolder(tmp_path)
    run = find_run(folder, **about, overwrite=True)
    save_run(folder, run, overwrite=True)
    find_run(folder, **about)
    assert not folder.data.exists()


@pytest.mark.parametrize("is_run", [False, True])
def test_old_parts_that_a_kill_left_go_with_whoever_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, is_run: bool
) -> None:
    folder = job(tmp_path)
    before = read_data(folder)
    rmtree = shutil.rmtree

    def leave(path: Path, **options: Any) -> None:
        if path.name.endswith(".done"):
            raise Killed
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", leave)
        with pytest.raises(Killed):
            compact(folder, target_rows=8)
    assert len(list(folder.inner.glob("compact-*"))) == 1
    if is_run:
        job(tmp_path)
    else:
        compact(folder, target_rows=8)
    assert not list(folder.inner.glob("compact-*"))
    assert read_data(folder).equals(before)


def test_a_late_writer_after_a_kill_between_the_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path)
    late = job(tmp_path, stop_after=1)
    run = read_run(late)
    assert run is not None
    about = Provenance(model="m", fingerprint=run.fingerprint, run_id="r")
    writer = ShardWriter(late, run.plan[1], NUM_SHARDS, SCHEMA, about, flush_every_s=1e9)
    for row in range(NUM_ROWS):
        writer.add(make_result(run.plan[1], row))
    before = read_data(job(tmp_path))
    kill_compact(folder, monkeypatch, after_renames=1)
    writer.commit()
    assert names(folder) == ["part-00001-of-00007.parquet"]
    job(tmp_path)
    assert read_data(folder).equals(before)
    assert verify(folder).faults == []


@pytest.mark.kill
@pytest.mark.parametrize("mode", ["half", "killed after"])
def test_a_fault_at_every_call_of_a_retry_of_merged_parts(
    tmp_path: Path, fault_points: list[FaultPoint], mode: str
) -> None:
    policy = RetryConfig(errors=["decode"])

    def again(folder: OutputFolder) -> None:
        run = read_run(folder)
        assert run is not None
        about = Provenance(model="m", fingerprint=run.fingerprint, run_id="again")
        for index in sorted(to_retry(folder, run, range(4), policy)):
            shard = run.plan[index]
            writer = ShardWriter(
                folder, shard, NUM_SHARDS, SCHEMA, about, flush_every_s=1e9, retry=policy
            )
            for row in sorted(writer.attempts):
                values = {"status": Status.SUCCESS, "failure": None, "generated_text": "again"}
                writer.add(make_result(shard, row, attempts=writer.attempts[row], **values))
                writer.flush()
            writer.commit()

    plain = job(tmp_path / "plain")
    compact(plain, target_rows=80)
    again(plain)
    new = read_data(plain)
    assert new["attempts"].to_pylist().count(2) == 2
    num_raised = 0
    for fatal in range(1000):
        folder = job(tmp_path / str(fatal))
        compact(folder, target_rows=80)
        point = FaultPoint(fatal, mode)
        fault_points.append(point)
        try:
            again(folder)
        except (OutputError, Killed):
            num_raised += 1
        fault_points.append(FaultPoint(-1, mode))
        if point.num_calls <= fatal:
            break
        # Whole at every instant: each row is the old one or the new one.
        assert read_data(folder)["row_index"].to_pylist() == list(range(25)), f"call {fatal}"
        assert verify(folder).faults == []
        again(OutputFolder(folder.root))
        assert read_data(folder).equals(new), f"call {fatal}"
        # At most an empty folder is left, which keeps nobody from merging further.
        assert not list(folder.retries.rglob("*.parquet"))
        compact(folder, target_rows=80)
    assert fatal > 15 and num_raised > 0.3 * fatal


def test_a_full_disk_is_told_what_compact_needs(
    tmp_path: Path, fault_points: list[FaultPoint]
) -> None:
    folder = job(tmp_path)
    before = names(folder)
    fault_points.append(FaultPoint(0, "full"))
    with pytest.raises(OutputError) as caught:
        compact(folder, target_rows=80)
    fault_points.append(FaultPoint(-1, "full"))
    size = sum(path.stat().st_size for path in folder.data_files())
    assert str(caught.value) == (
        f"no room to compact {folder.root}: the merged parts take {size:,} bytes beside the old "
        "ones until they are whole; make room and run compact again, the output is as it was"
    )
    assert names(folder) == before
    assert not list(folder.inner.glob("compact-*"))


def test_a_garbled_part_is_not_merged(tmp_path: Path) -> None:
    folder = job(tmp_path)
    part = folder.part(2, NUM_SHARDS)
    content = bytearray(part.read_bytes())
    # A page of a column that `verify` does not read: the merge itself must notice.
    content[last_byte(part, "generated_text")] ^= 0xFF
    part.write_bytes(content)
    with pytest.raises(OutputError, match="page integrity"):
        compact(folder, target_rows=80)
    assert len(names(folder)) == 7
    assert not list(folder.inner.glob("compact-*"))


@pytest.mark.kill
@pytest.mark.parametrize("mode", ["refused", "full", "half", "killed", "killed after"])
def test_a_fault_at_every_call_keeps_data_whole(
    tmp_path: Path,
    fault_points: list[FaultPoint],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    mode: str,
) -> None:
    plain = read_data(job(tmp_path / "plain"))
    real = exchange_module.exchange
    monkeypatch.setattr(
        exchange_module, "exchange", lambda *paths: fault_points[-1].call(real, *paths)
    )
    num_raised = 0
    for fatal in range(1000):
        folder = job(tmp_path / str(fatal))
        point = FaultPoint(fatal, mode)
        fault_points.append(point)
        try:
            compact(folder, target_rows=8)
        except (OutputError, Killed):
            num_raised += 1
        fault_points.append(FaultPoint(-1, mode))
        if point.num_calls <= fatal:
            break
        if way == "exchange" or folder.data.exists():
            assert read_data(folder).equals(plain), f"call {fatal}"
        # Whatever is run next puts a missing folder back.
        job(folder.root)
        assert read_data(folder).equals(plain), f"call {fatal}"
        assert verify(folder).faults == []
        compact(folder, target_rows=8)
        assert read_data(folder).equals(plain), f"call {fatal}"
    assert fatal > 20 and num_raised > 0.4 * fatal
