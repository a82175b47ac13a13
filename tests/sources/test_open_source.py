"""Opening inputs, and the columns that a job may name."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.config import DataConfig, SourceKind
from batchvlm.errors import ExitCode, InputError
from batchvlm.sources import check_columns, open_source

SCHEMA = pa.schema([("image", pa.binary()), ("question", pa.string()), ("a.b", pa.int64())])


def test_columns_that_are_there_pass() -> None:
    check_columns(SCHEMA, {"image": "data.columns.image", "a.b": "output.keep_columns"})


def test_a_missing_column_is_named_with_its_setting_and_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        check_columns(SCHEMA, {"image": "data.columns.image", "qestion": "task.prompt"})

    assert "task.prompt" in caught.value.message
    assert "'qestion'" in caught.value.message
    assert "image, question, a.b" in caught.value.message
    assert caught.value.hint == "did you mean 'question'?"
    assert caught.value.exit_code is ExitCode.USAGE
    assert "\n" not in str(caught.value)


def test_a_missing_column_like_no_other_has_another_hint() -> None:
    with pytest.raises(InputError, match=r"set data\.columns\.id to one of them"):
        check_columns(SCHEMA, {"xyz": "data.columns.id"})


@pytest.mark.parametrize(
    ("needed", "hint"),
    [
        (
            {"xyz": "data.columns.image"},
            "set data.columns.image to one of them, or data.columns.image=null if no column holds "
            "images",
        ),
        (
            {"imag": "data.columns.image"},
            "did you mean 'image'? or data.columns.image=null if no column holds images",
        ),
        # Like the name of another setting's column, which is no other name for images.
        (
            {"qestion": "data.columns.image", "question": "data.columns.messages"},
            "set data.columns.image to one of them, or data.columns.image=null if no column holds "
            "images",
        ),
        (
            {"xyz": "task.prompt"},
            "task.prompt is a template: name one of them in it, or write plain text",
        ),
    ],
)
def test_a_hint_fits_its_setting(needed: dict[str, str], hint: str) -> None:
    with pytest.raises(InputError) as caught:
        check_columns(SCHEMA, needed)
    assert caught.value.hint == hint


def test_many_columns_are_cut_short() -> None:
    schema = pa.schema([(f"column_{i}", pa.int8()) for i in range(1000)])

    with pytest.raises(InputError) as caught:
        check_columns(schema, {"image": "data.columns.image"})

    assert "and 970 more" in caught.value.message
    assert "column_30" not in caught.value.message


def test_a_name_of_two_columns_is_refused() -> None:
    schema = pa.schema([("x", pa.int8()), ("x", pa.int8())])

    with pytest.raises(InputError, match="'x', of which the input has 2"):
        check_columns(schema, {"x": "data.columns.id"})


def make_parquet(folder: Path) -> str:
    pq.write_table(pa.table({"x": [1]}), folder / "x.parquet")
    return str(folder / "x.parquet")


def make_jsonl(folder: Path) -> str:
    (folder / "x.jsonl").write_text('{"x": 1}\n')
    return str(folder / "x.jsonl")


def make_openai(folder: Path) -> str:
    (folder / "x.jsonl").write_text('{"custom_id": "a", "body": {"messages": []}}\n')
    return str(folder / "x.jsonl")


def make_tar(folder: Path) -> str:
    (folder / "x.png").write_bytes(b"")
    with tarfile.open(folder / "x.tar", "w") as archive:
        archive.add(folder / "x.png", "x.png")
    return str(folder / "x.tar")


def make_hf(folder: Path) -> str:
    import datasets

    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(folder)
    return str(folder)


def make_folder(folder: Path) -> str:
    (folder / "x.png").write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "make", "column"),
    [
        (SourceKind.parquet, make_parquet, "x"),
        (SourceKind.jsonl, make_jsonl, "x"),
        (SourceKind.hf, make_hf, "x"),
        (SourceKind.folder, make_folder, "image"),
        (SourceKind.webdataset, make_tar, "image"),
        (SourceKind.openai, make_openai, "messages"),
    ],
)
def test_each_kind_opens(
    tmp_path: Path, kind: SourceKind, make: Callable[[Path], str], column: str
) -> None:
    source = open_source(DataConfig(source=kind, path=make(tmp_path)))

    check_columns(source.schema, {column: "data.columns.image"})
    assert sum(file.num_rows for file in source.files([column])) == 1
    assert source.image_root == str(tmp_path)


@pytest.mark.parametrize("kind", list(SourceKind))
def test_a_path_that_is_not_there_is_named(tmp_path: Path, kind: SourceKind) -> None:
    path = str(tmp_path / "no" / "such")

    with pytest.raises(InputError) as caught:
        open_source(DataConfig(source=kind, path=path))

    assert path in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("kind", [kind for kind in SourceKind if kind is not SourceKind.hf])
def test_an_empty_folder_is_refused(tmp_path: Path, kind: SourceKind) -> None:
    with pytest.raises(InputError, match="no "):
        open_source(DataConfig(source=kind, path=str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (SourceKind.parquet, make_parquet),
        (SourceKind.jsonl, make_jsonl),
        (SourceKind.hf, make_hf),
        (SourceKind.folder, make_folder),
        (SourceKind.webdataset, make_tar),
        (SourceKind.openai, make_openai),
    ],
)
def test_the_image_root_can_be_set(
    tmp_path: Path, kind: SourceKind, make: Callable[[Path], str]
) -> None:
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")

    source = open_source(DataConfig(source=kind, path=path, image_root=str(tmp_path)))

    assert source.image_root == str(tmp_path)
