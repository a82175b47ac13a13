"""Whole inputs from an enemy: odd types, broken files, files that change under the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.errors import InputError
from batchvlm.records import Sample
from tests.conftest import IMAGE, picture
from tests.pipeline.test_pipeline import FakeEngine, Summary, rows_of, run
from tests.sources.make import flip_page

CELL = {"bytes": picture(), "path": None}
VIEWS = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])


def errors_of(out: Path) -> list[str | None]:
    rows = rows_of(out)
    assert [row["row_index"] for row in rows] == list(range(len(rows)))
    return [row["error_type"] for row in rows]


@pytest.mark.parametrize(
    ("image_type", "cell"),
    [
        (pa.binary(), picture()),
        (pa.large_binary(), picture()),
        (pa.binary_view(), picture()),
        (pa.binary(len(picture())), picture()),
        (pa.dictionary(pa.int32(), pa.binary()), picture()),
        (VIEWS, CELL),
        (pa.list_(IMAGE), [CELL]),
        (pa.large_list(IMAGE), [CELL]),
        (pa.list_(pa.large_binary(), 1), [picture()]),
        (pa.struct([*IMAGE, ("more", pa.list_(IMAGE))]), CELL | {"more": [CELL]}),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, pa.DataType) else "",
)
@pytest.mark.parametrize(
    "text_type",
    [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_types_of_images_and_text(
    tmp_path: Path, image_type: pa.DataType, cell: Any, text_type: pa.DataType
) -> None:
    if pa.types.is_dictionary(image_type):
        images = pa.array([cell] * 3, image_type.value_type).dictionary_encode()
    else:
        images = pa.array([cell] * 3, image_type)
    texts = ["one", "two", "two"]
    table = pa.table({"image": images, "question": pa.array(texts).cast(text_type)})
    pq.write_table(table, tmp_path / "in.parquet")

    keep = "output.keep_columns=[question,image]"
    run(tmp_path / "out", tmp_path / "in.parquet", keep, name="vqa")

    assert errors_of(tmp_path / "out") == [None] * 3
    rows = rows_of(tmp_path / "out")
    assert [row["question"] for row in rows] == texts
    assert [row["image"] for row in rows] == [cell] * 3


def test_ten_thousand_columns(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(9_998)]
    columns = {name: pa.array([1, 2, 3], pa.int8()) for name in names}
    table = pa.table({"image": pa.array([CELL] * 3, IMAGE), **columns, "question": ["?"] * 3})
    pq.write_table(table, tmp_path / "in.parquet")
    keep = "output.keep_columns=[c0,c9997]"
    run(tmp_path / "out", tmp_path / "in.parquet", keep, name="vqa")
    assert errors_of(tmp_path / "out") == [None] * 3
    assert [row["c9997"] for row in rows_of(tmp_path / "out")] == [1, 2, 3]
    with pytest.raises(InputError) as caught:
        run(tmp_path / "out2", tmp_path / "in.parquet", "data.columns.image=img")
    assert len(str(caught.value)) < 2000


def test_files_without_rows_beside_others(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    schema = pa.schema([("image", IMAGE)])
    rows = pa.table({"image": pa.array([CELL] * 3, IMAGE)}, schema)
    pq.write_table(rows, folder / "b.parquet")
    pq.write_table(rows.slice(0, 0), folder / "a.parquet")  # a row group of no rows
    with pq.ParquetWriter(folder / "c.parquet", schema):
        pass  # no row group
    assert pq.read_metadata(folder / "c.parquet").num_row_groups == 0
    run(tmp_path / "out", folder)
    assert errors_of(tmp_path / "out") == [None] * 3

    (folder / "d.parquet").touch()
    with pytest.raises(InputError, match=r"d\.parquet is no readable Parquet file"):
        run(tmp_path / "out2", folder)


def test_a_corrupt_page_costs_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    cells = [{"bytes": picture(size=(8 + i, 8)), "path": None} for i in range(30)]
    table = pa.table({"image": pa.array(cells, IMAGE), "n": range(30)})
    options: dict[str, Any] = {"write_page_checksum": True, "use_dictionary": False}
    pq.write_table(table, path, row_group_size=10, **options)
    flip_page(path, group=1, column=0)
    for rows_per_shard in (7, 30):
        out = tmp_path / f"out{rows_per_shard}"
        run(out, path, f"output.rows_per_shard={rows_per_shard}", "output.keep_columns=[n]")
        assert errors_of(out) == [None] * 10 + ["input"] * 10 + [None] * 10
        rows = rows_of(out)
        assert [row["n"] for row in rows if row["status"] == "success"] == [
            *range(10),
            *range(20, 30),
        ]
        assert [row["id"] for row in rows] == [f"in.parquet:{i}" for i in range(30)]


def write_numbers(path: Path, offset: int, *, num_rows: int = 40) -> None:
    """Rows whose prompt says which of two writings they are from; the same sizes in both."""
    texts = [f"{offset + i:06}" for i in range(num_rows)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    else:
        table = pa.table({"question": texts})
        pq.write_table(table, path, row_group_size=5, use_dictionary=False, compression="none")


def overwrite(path: Path) -> None:
    """In place: whoever has the file open reads the new bytes."""
    new = path.with_name(f"new{path.suffix}")
    write_numbers(new, 500_000)
    data = new.read_bytes()
    assert len(data) == path.stat().st_size
    with open(path, "r+b") as file:
        file.write(data)


def rename_over(path: Path) -> None:
    """As careful writers do: whoever has the file open goes on with the old one."""
    new = path.with_name(f"new{path.suffix}")
    write_numbers(new, 500_000)
    os.replace(new, path)


class MeddlingEngine(FakeEngine):
    """Changes the input after some rows."""

    def __init__(self, change: Callable[[], None], after: int) -> None:
        super().__init__()
        self.change = change
        self.after = after

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Any]]:
        for number, sample in enumerate(samples):
            if number == self.after:
                self.change()
            yield from super().run([sample])


def run_numbers(out: Path, path: Path, engine: FakeEngine) -> Summary:
    return run(
        out,
        path,
        f"data={'jsonl' if path.suffix == '.jsonl' else 'parquet'}",
        "data.columns.image=null",
        "output.keep_columns=[question]",
        "output.rows_per_shard=8",
        # The source is read as late as the job allows, so that there is something left to change.
        "batching.sort_window=1",
        name="vqa",
        engine=engine,
    )


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("change", [overwrite, rename_over, Path.unlink])
def test_a_file_that_changes_during_the_run_is_never_mixed(
    tmp_path: Path, suffix: str, change: Callable[[Path], None]
) -> None:
    """Each row is as it was when the run began, or an error."""
    path = tmp_path / f"in.{suffix}"
    write_numbers(path, 0)
    run_numbers(tmp_path / "out", path, MeddlingEngine(lambda: change(path), after=12))
    rows = rows_of(tmp_path / "out")
    assert [row["row_index"] for row in rows] == list(range(40))
    good = [row["question"] for row in rows if row["status"] == "success"]
    assert good == [f"{row['row_index']:06}" for row in rows if row["status"] == "success"]
    assert 12 < len(good) < 40
    failed = [row for row in rows if row["status"] == "error"]
    assert {row["error_type"] for row in failed} == {"input"}
    if change is not Path.unlink:
        assert all("has changed since" in row["error_message"] for row in failed)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_that_is_only_touched_has_not_changed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in.{suffix}"
    write_numbers(path, 0)
    run_numbers(tmp_path / "out", path, MeddlingEngine(path.touch, after=12))
    assert errors_of(tmp_path / "out") == [None] * 40
