"""Folders of images with a metadata file: its rows are the rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.errors import ErrorType, InputError
from batchvlm.preprocess.images import load_image
from batchvlm.prompts.messages import image_refs
from tests.conftest import picture
from tests.sources.make import check_all_ways, check_positions, open_path, plan, read_all

Rows = Sequence[dict[str, Any]]


def write_jsonl(folder: Path, rows: Rows) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(folder: Path, rows: Rows) -> None:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(folder: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "metadata.parquet")


WRITERS = [write_jsonl, write_csv, write_parquet]


@pytest.mark.parametrize("write", WRITERS)
def test_a_row_is_a_line_of_the_file_with_its_image(
    tmp_path: Path, write: Callable[[Path, Rows], None]
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "sub" / "b.png").write_bytes(picture())
    (tmp_path / "not-listed.png").write_bytes(picture())
    rows = [
        {"file_name": "sub/b.png", "question": "what,\nor “who”?"},
        {"file_name": "a.png", "question": "why?"},
        {"file_name": "a.png", "question": None},
        {"file_name": None, "question": "where?"},
    ]
    write(tmp_path, rows)
    source = open_path("folder", tmp_path, id_column="file_name")
    records = read_all(source, ["image", "question"])
    assert source.schema.names == ["image", "file_name", "question"]
    assert [r.values["question"] for r in records] == [row["question"] for row in rows]
    paths = [image and image["path"] for image in (r.values["image"] for r in records)]
    assert paths == ["./sub/b.png", "./a.png", "./a.png", None]
    assert [r.id for r in records[:3]] == ["sub/b.png", "a.png", "a.png"]
    limits = {"max_source_pixels": 9999, "max_pixels": 9999, "max_image_bytes": 9999}
    for record in records[:3]:
        (ref,) = image_refs(record.values["image"], "image")
        load_image(ref, image_root=source.image_root, **limits)
    (shard,) = plan(source)
    kept = next(source.read_shard(shard, [], kept=["image", "question"])).kept
    assert kept == {
        "image": {"bytes": None, "path": "./sub/b.png"},
        "question": rows[0]["question"],
    }


@pytest.mark.parametrize("write", WRITERS)
def test_every_row_comes_once_however_shards_are_read(
    tmp_path: Path, write: Callable[[Path, Rows], None]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [{"file_name": f"{i}.png", "n": str(i)} for i in range(20)])
    source = open_path("folder", tmp_path)
    check_all_ways(source, ["image", "n"], 7, seed=0)
    records = read_all(source, ["image"])
    assert len(records) == 40
    assert records[20].values["image"]["path"] == "./two/0.png"


def test_paths_are_whole_where_another_root_is_set(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_csv(tmp_path / "in", [{"file_name": "a.png"}])
    source = open_path("folder", tmp_path / "in", image_root=str(tmp_path))
    (record,) = read_all(source, ["image"])
    assert record.values["image"]["path"] == str(tmp_path / "in" / "a.png")


def test_several_kinds_and_files_without_names_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path, [{"image": "a.png"}])
    with pytest.raises(InputError, match="no column 'file_name'"):
        open_path("folder", tmp_path)
    write_csv(tmp_path, [{"left_file_name": "a.png"}])
    with pytest.raises(InputError, match="data=hf reads 'left_file_name'"):
        open_path("folder", tmp_path)
    write_jsonl(tmp_path, [{"file_name": "a.png"}])
    with pytest.raises(InputError, match=r"metadata\.csv and metadata\.jsonl"):
        open_path("folder", tmp_path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,question,question\na.png,Why?,How?\n")
    with pytest.raises(InputError, match=r"metadata\.csv has several columns 'question'"):
        open_path("folder", tmp_path).files()


def test_lines_of_csv_that_do_not_fit_are_failed_rows(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbffile_name,q",
        b"a.png,x",
        b"b.png",
        b"",
        b"c.png,\xff",
        b'd.png,"y ""z"""',
    ]
    (tmp_path / "metadata.csv").write_bytes(b"\r\n".join(lines) + b"\r\n")
    source = open_path("folder", tmp_path, id_column="file_name")
    records = read_all(source, ["q"])
    assert [r.values.get("q") for r in records] == ["x", None, None, 'y "z"']
    failures = [r.failure.message if r.failure else None for r in records]
    assert failures == [
        *(None, "metadata.csv: 1 values for 2 columns", "metadata.csv: a value is not UTF-8", None)
    ]
    assert records[1].failure is not None
    assert records[1].failure.error_type is ErrorType.INPUT


def test_a_csv_that_changes_gives_no_new_rows(tmp_path: Path) -> None:
    write_csv(tmp_path, [{"file_name": f"{i}.png"} for i in range(200)])
    source = open_path("folder", tmp_path)
    (shard,) = plan(source, rows_per_shard=1000)
    reader = source.read_shard(shard, ["file_name"])
    records = [next(reader)]
    write_csv(tmp_path, [{"file_name": f"x{i}.png"} for i in range(200)])
    records += reader
    check_positions(records, shard)
    assert not any(r.values.get("file_name", "").startswith("x") for r in records)
    assert records[-1].failure is not None
    assert "has changed" in records[-1].failure.message
