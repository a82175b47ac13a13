"""What a whole job makes of its output folder when something goes wrong around it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.errors import ConfigError, FingerprintError, OutputError
from batchvlm.output.disk import Disk
from batchvlm.output.folder import OutputFolder
from batchvlm.records import Completion, Failure, Sample
from batchvlm.runtime import claims
from tests.conftest import picture
from tests.pipeline.test_pipeline import FakeEngine, rows_of, run

Writer = Callable[..., Path]


def test_a_card_is_there_from_the_first_row_on(tmp_path: Path, write_parquet: Writer) -> None:
    source, out = write_parquet([picture()] * 5), tmp_path / "out"
    seen = []

    class Looking(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            for answer in super().run(samples):
                seen.append((out / "README.md").read_text())
                yield answer

    run(out, source, engine=Looking())
    assert "rows so far, 0 of 5" in seen[0] and "split: train" in seen[0]
    assert "5 rows, one for every row" in (out / "README.md").read_text()


def test_a_slice_without_shards_that_comes_first_is_silent(
    tmp_path: Path, write_parquet: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = write_parquet([picture()] * 5), tmp_path / "out"
    summary = run(out, source, "runtime.num_tasks=2", "runtime.task_id=1")
    assert summary.num_found == 0
    assert not caplog.records and not out.exists()


def test_a_card_that_a_kill_left_undone_is_written_by_the_next_run(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source, out = write_parquet([picture()] * 5), tmp_path / "out"
    run(out, source)
    card = (out / "README.md").read_text()
    (out / "README.md").unlink()
    run(out, source, engine=FakeEngine())
    assert (out / "README.md").read_text() == card


@pytest.mark.parametrize("kind", ["parquet", "hf"])
@pytest.mark.parametrize("name", ["", "answers", "_x/../answers"])
def test_no_part_is_written_where_a_rerun_would_read_it_as_input(
    tmp_path: Path, write_parquet: Writer, kind: str, name: str
) -> None:
    """The job would never resume: its input has changed, or a part lacks the columns."""
    folder = write_parquet([picture()] * 5).parent
    link = tmp_path.with_name(tmp_path.name + "-link")
    link.symlink_to(folder)
    with pytest.raises(ConfigError) as caught:
        run(link / name, folder, f"data={kind}")
    assert str(caught.value) == (
        f"output.dir={link / name} is in data.path={folder}, all of whose data files are input; "
        "name a folder elsewhere, or in _out there"
    ).replace(", or in _out there" if kind == "hf" else "\0", "")
    assert [path.name for path in folder.iterdir()] == ["in.parquet"]


def test_an_output_beside_or_hidden_from_its_input(tmp_path: Path, write_parquet: Writer) -> None:
    source = write_parquet([picture()] * 5)
    for out, where in (
        (tmp_path.parent / "elsewhere" / tmp_path.name, tmp_path),
        (tmp_path / "_out", tmp_path),
        (tmp_path.with_name(tmp_path.name + "-out"), tmp_path),
        (tmp_path / "out", source),
        (tmp_path / "out", tmp_path / "*.parquet"),
    ):
        for _ in range(2):
            run(out, where)
        assert len(rows_of(out)) == 5


@pytest.mark.parametrize(
    ("retry", "again", "num_given_up"),
    [
        ("oom", set(), 0),
        ("engine", {0, 2}, 0),
        ("engine,decode", {0, 1, 2}, 0),
        ("engine retry.max_attempts=1", set(), 2),
    ],
)
def test_a_retry_reads_each_part_once_before_it_begins(
    tmp_path: Path,
    write_parquet: Writer,
    monkeypatch: pytest.MonkeyPatch,
    retry: str,
    again: set[int],
    num_given_up: int,
) -> None:
    images = [picture()] * 15 + [b"no image"] + [picture()] * 24
    source, out = write_parquet(images, row_group_size=10), tmp_path / "out"
    run(out, source, engine=FakeEngine(failing=[3, 27]))
    opened: list[str] = []
    open_file = OutputFolder.open

    def count(self: OutputFolder, path: Path) -> Any:
        opened.append(path.name)
        return open_file(self, path)

    monkeypatch.setattr(OutputFolder, "open", count)

    class Asked(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            before.extend(opened)
            return super().run(samples)

    before: list[str] = []
    errors, *more = retry.split()
    engine = Asked()
    summary = run(out, source, f"retry.errors=[{errors}]", *more, engine=engine)
    assert summary.num_given_up == num_given_up
    assert {row // 10 for row in engine.seen} == again - {1}
    left = {f"part-0000{index}-of-00004.parquet" for index in {0, 1, 2, 3} - again}
    read = [name for name in before or opened if name in left]
    # Perhaps one of them once more, for the type of `parsed`.
    assert set(read) == left and len(read) <= len(left) + bool(again)
    if not again:
        assert summary.metrics.found_errors == {"engine": 2, "decode": 1}


def test_a_part_that_has_no_room_keeps_no_other_shards_rows_from_the_disk(
    tmp_path: Path, write_parquet: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_parquet([picture()] * 20, row_group_size=10), tmp_path / "out"
    commit = Disk.commit

    def commit_no_part(self: Disk, write: Any, final: Path, **options: Any) -> bool:
        if final.parent.name == "data":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return commit(self, write, final, **options)

    class InOrder(FakeEngine):
        """Answers three rows of the second shard before the last one of the first."""

        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            by_row = {sample.row_index: sample for sample in samples}
            for row in (*range(9), 10, 11, 12, 9):
                yield from super().run([by_row[row]])

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "commit", commit_no_part)
        with pytest.raises(OutputError, match="No space"):
            run(out, source, engine=InOrder())
    rest = FakeEngine()
    run(out, source, engine=rest)
    assert sorted(rest.seen) == list(range(13, 20))
    assert len(rows_of(out)) == 20


def test_what_is_overwritten_is_said(
    tmp_path: Path, write_parquet: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = write_parquet([picture()] * 25), tmp_path / "out"
    run(out, source)
    run(out, source, "task.prompt=Why?", "output.on_mismatch=overwrite")
    (said,) = [text for text in caplog.messages if "deletes" in text]
    assert "'Why?'" in said and "25 rows that it has answered" in said


def test_what_another_process_is_at_is_not_overwritten(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source, out = write_parquet([picture()] * 5), tmp_path / "out"
    engine = FakeEngine()

    class Meanwhile(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            for answer in super().run(samples):
                if not refused:
                    (path,) = (out / "_batchvlm" / "metrics").glob("*.json*")
                    path.with_suffix(".json").write_text(json.dumps({"rows_per_s": 1.0}))
                    with pytest.raises(
                        FingerprintError, match="while processes are at work on it"
                    ) as error:
                        run(out, source, "task.prompt=Why?", over, engine=engine)
                    refused.append(error.value)
                yield answer

    refused: list[FingerprintError] = []
    over = "output.on_mismatch=overwrite"
    run(out, source, engine=Meanwhile())
    assert refused[0].exit_code == 2 and engine.seen == []
    run(out, source, "task.prompt=Why?", over, engine=engine)
    assert len(engine.seen) == len(rows_of(out)) == 5


def test_an_overwriting_rank_that_lost_the_others_knows_what_is_done(
    tmp_path: Path, write_parquet: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_parquet([picture()] * 20), tmp_path / "out"
    run(out, source)

    def lose(launch: Any) -> Any:
        raise RuntimeError("rank 0 is gone")

    monkeypatch.setattr(claims, "open_store", lose)
    monkeypatch.setattr(claims, "_HEARTBEAT_TIMEOUT_S", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "here")
    options = ["task.prompt=Why?", "output.on_mismatch=overwrite", "engine.device=cpu"]

    class First(FakeEngine):
        """The other rank does its half meanwhile."""

        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            yield from super().run(samples)
            monkeypatch.setenv("RANK", "0")
            run(out, source, *options)

    monkeypatch.setenv("RANK", "1")
    run(out, source, *options, engine=First())
    assert len(rows_of(out)) == 20


def test_each_layout_gets_a_new_folder_of_its_own(tmp_path: Path, write_parquet: Writer) -> None:
    source, out = write_parquet([picture()] * 12), tmp_path / "out"
    beside = "output.on_mismatch=new_folder"
    run(out, source)
    roots = [
        run(out, source, layout, beside).folder.root
        for layout in ("output.token_ids=true", "data.max_rows=7", "output.token_ids=true")
    ]
    assert len({out, *roots}) == 3 and roots[0] == roots[2]
    assert [len(rows_of(root)) for root in (out, *roots[:2])] == [12, 12, 7]


def test_no_part_is_added_to_parts_of_another_type(tmp_path: Path, write_parquet: Writer) -> None:
    """As when another release derived another type from the same schema."""
    source, out = write_parquet([picture()] * 20, row_group_size=10), tmp_path / "out"
    asked = ("task=extract", "task.output.json_schema={properties: {a: {type: integer}}}")
    run(out, source, *asked, "output.rows_per_shard=10")
    first, second = sorted((out / "data").glob("*.parquet"))
    table = pq.read_table(first)
    place = table.schema.get_field_index("parsed")
    texts = pa.nulls(table.num_rows, pa.string())
    pq.write_table(table.set_column(place, "parsed", texts), first)
    run(out, source, *asked, "output.rows_per_shard=10")  # nothing is left to do
    second.unlink()
    with pytest.raises(FingerprintError, match=r"parsed is string in its parts, and struct<a"):
        run(out, source, *asked, "output.rows_per_shard=10")
    assert not second.exists()
