"""Hugging Face datasets: saved, in folders, streamed; never decoded, always by position."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.errors import InputError
from batchvlm.sources import Source
from batchvlm.sources.hf import DatasetSource, StreamSource
from batchvlm.sources.parquet import ParquetSource
from tests.conftest import IMAGE, picture
from tests.sources.make import check_all_ways, check_positions, open_path, plan, read_all


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def dataset(num_rows: int = 10, first: int = 0) -> Any:
    numbers = list(range(first, first + num_rows))
    return datasets.Dataset.from_dict({"n": numbers, "key": [f"k{n}" for n in numbers]})


def write_json(folder: Path, **splits: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_rows in splits.items():
        rows = [json.dumps({"n": n, "key": f"k{n}"}) for n in range(num_rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def write_parquet(folder: Path, *sizes: int, split: str = "train") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    first = 0
    for i, num_rows in enumerate(sizes):
        n = list(range(first, first + num_rows))
        name = f"{split}-{i:05}-of-{len(sizes):05}.parquet"
        table = pa.table({"n": n, "key": [f"k{k}" for k in n]})
        pq.write_table(table, folder / "data" / name, row_group_size=4)
        first += num_rows
    return folder


def numbers(source: Source, rows_per_shard: int = 7) -> list[Any]:
    return [r.values.get("n") for r in read_all(source, ["n"], rows_per_shard)]


# --- save_to_disk ---


def test_a_saved_dataset(tmp_path: Path) -> None:
    dataset(70).save_to_disk(tmp_path / "saved")
    source = open_path("hf", tmp_path / "saved", id_column="key")

    check_all_ways(source, ["n"], 33, seed=0)
    records = read_all(source, ["n"], rows_per_shard=33)
    assert [dict(r.values) for r in records] == [{"n": n} for n in range(70)]
    assert [r.id for r in records] == [f"k{n}" for n in range(70)]
    assert {r.source_file for r in records} == {"train"}
    assert source.schema.names == ["n", "key"]
    assert source.image_root == str(tmp_path / "saved")


def test_a_saved_dataset_without_rows_says_so(tmp_path: Path) -> None:
    dataset(0).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="holds no rows"):
        open_path("hf", tmp_path / "saved")


def test_a_saved_dataset_dict_has_splits(tmp_path: Path) -> None:
    splits = {"train": dataset(3), "dev-1": dataset(2, first=50)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")

    assert numbers(open_path("hf", tmp_path / "saved")) == [0, 1, 2]
    source = open_path("hf", tmp_path / "saved", split="dev-1")
    assert [r.id for r in read_all(source, ["n"])] == ["dev-1:0", "dev-1:1"]
    with pytest.raises(InputError, match=r"no split 'test'; its splits: train, dev-1"):
        open_path("hf", tmp_path / "saved", split="test")


@pytest.mark.parametrize(
    ("setting", "value"), [("subset", "en"), ("streaming", True), ("revision", "v1")]
)
@pytest.mark.parametrize("is_dict", [False, True])
def test_a_setting_without_effect_is_refused(
    tmp_path: Path, setting: str, value: Any, is_dict: bool
) -> None:
    saved = datasets.DatasetDict({"train": dataset(3)}) if is_dict else dataset(3)
    saved.save_to_disk(tmp_path / "saved")

    with pytest.raises(
        InputError, match=rf"data\.{setting} has no effect.* save_to_disk"
    ) as caught:
        open_path("hf", tmp_path / "saved", **{setting: value})
    assert "\n" not in str(caught.value)


def test_a_saved_split_is_the_only_one(tmp_path: Path) -> None:
    datasets.DatasetDict({"dev": dataset(3)}).save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved")["dev"].save_to_disk(tmp_path / "dev")
    dataset(3).save_to_disk(tmp_path / "nameless")

    for source in (
        open_path("hf", tmp_path / "saved" / "dev"),
        open_path("hf", tmp_path / "dev"),
        open_path("hf", tmp_path / "dev", split="dev"),
    ):
        assert numbers(source) == [0, 1, 2]
    for name in ("dev", "nameless"):
        with pytest.raises(InputError, match=r"has no split 'test'; its splits: (dev|train)"):
            open_path("hf", tmp_path / name, split="test")


def test_a_folder_of_files_has_no_revision(tmp_path: Path) -> None:
    write_json(tmp_path, train=2)
    with pytest.raises(InputError, match=r"data\.revision has no effect"):
        open_path("hf", tmp_path, revision="v1")


def test_rows_that_were_chosen_and_reordered_before_saving(tmp_path: Path) -> None:
    dataset(20).select([7, 3, 11]).save_to_disk(tmp_path / "saved")

    assert numbers(open_path("hf", tmp_path / "saved"), rows_per_shard=2) == [7, 3, 11]


def test_the_identity_of_a_saved_dataset_goes_with_it(tmp_path: Path) -> None:
    dataset(5).save_to_disk(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    dataset(5, first=1).save_to_disk(tmp_path / "other")

    one, copy, other = (
        open_path("hf", tmp_path / name).files()[0].identity for name in ("one", "copy", "other")
    )

    assert one == copy != other


# --- load_dataset ---


def test_a_folder_of_data_files(tmp_path: Path) -> None:
    write_json(tmp_path / "in", train=20, test=3)
    source = open_path("hf", tmp_path / "in", id_column="key")

    assert isinstance(source, DatasetSource)
    assert source.files()[0].num_rows == 20
    check_all_ways(source, ["n"], 6, seed=0)
    assert numbers(source) == list(range(20))
    assert numbers(open_path("hf", tmp_path / "in", split="test")) == [0, 1, 2]
    assert numbers(open_path("hf", tmp_path / "in", split="train[:20%]+test")) == [
        0,
        1,
        2,
        3,
        0,
        1,
        2,
    ]


def test_a_relative_folder_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "json", train=2)  # also the name of a format, which would read both
    write_json(tmp_path / "other", train=5)
    monkeypatch.chdir(tmp_path)

    assert numbers(open_path("hf", "json")) == [0, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_identity_is_that_of_the_content(tmp_path: Path, streaming: bool) -> None:
    write_json(tmp_path / "one", train=20)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "train.jsonl", (1, 1))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    text = (tmp_path / "other" / "train.jsonl").read_text()
    (tmp_path / "other" / "train.jsonl").write_text(text.replace("k7", "x7"))

    one, copy, other = (
        open_path("hf", tmp_path / name, streaming=streaming).files()[0].identity
        for name in ("one", "copy", "other")
    )

    assert one == copy != other


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_json, None])
def test_an_unknown_split_lists_those_there_are(
    tmp_path: Path, streaming: bool, write: Any
) -> None:
    if write:
        write_json(tmp_path, train=2, test=2)
    else:
        write_parquet(tmp_path, 2)
        write_parquet(tmp_path, 2, split="test")

    with pytest.raises(InputError, match="has no split 'nope'; its splits: test, train"):
        open_path("hf", tmp_path, split="nope", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a[1] b.csv", "a.json", "a.parquet"])
def test_one_file(tmp_path: Path, name: str, streaming: bool) -> None:
    (tmp_path / "other.csv").write_text("n\n9\n")
    table = pa.table({"n": [1, 2], "key": ["a", "b"]})
    match name.rpartition(".")[2]:
        case "csv":
            (tmp_path / name).write_text("n,key\n1,a\n2,b\n")
        case "json":
            (tmp_path / name).write_text(json.dumps(table.to_pylist()))
        case _:
            pq.write_table(table, tmp_path / name)
    source = open_path("hf", tmp_path / name, streaming=streaming)

    assert source.image_root == str(tmp_path)
    assert numbers(source) == [1, 2]
    with pytest.raises(InputError, match="is a file of this machine"):
        open_path("hf", tmp_path / name, revision="main")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("id_column", ["key", None, "none"])
def test_keys_of_a_csv_file_stay_as_they_are_written(
    tmp_path: Path, id_column: str | None, streaming: bool
) -> None:
    """Elsewhere pandas makes numbers of them: 7, and 1.2345678901234568e+16 twice."""
    text = "n,key\n1,007\n2,12345678901234567\n3,12345678901234568\n4,\n"
    (tmp_path / "in.csv").write_text(text)
    source = open_path("hf", tmp_path / "in.csv", id_column=id_column, streaming=streaming)
    if id_column == "none":
        assert "none" not in source.schema.names
        return
    records = read_all(source, ["n"], rows_per_shard=2)
    assert [record.values["n"] for record in records] == [1, 2, 3, 4]
    if id_column:
        keys = ["007", "12345678901234567", "12345678901234568", "train:3"]
        assert [record.id for record in records] == keys


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_dataset_is_one_line(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.parquet").touch()
    write_json(tmp_path / "in", train=2)
    cases: list[tuple[Any, dict[str, Any]]] = [
        ("no-such-user/no-such-dataset", {}),
        (tmp_path / "none", {}),
        (tmp_path / "empty", {}),
        (tmp_path / "file.parquet", {}),
        (tmp_path / "in", {"subset": "none"}),
    ]
    for path, settings in cases:
        with pytest.raises(InputError) as caught:
            open_path("hf", path, streaming=streaming, **settings)
        assert os.path.basename(path) in caught.value.message
        assert caught.value.hint
        assert "\n" not in str(caught.value)


def test_the_terminal_stays_clean_and_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "in", train=20)
    hub_bars: Any = huggingface_hub.utils
    hub_bars.disable_progress_bars()
    try:
        source = open_path("hf", tmp_path / "in")
        numbers(source)
        out = capfd.readouterr()
        assert (out.out, out.err) == ("", "")
        assert not datasets.utils.are_progress_bars_disabled()
        assert hub_bars.are_progress_bars_disabled()
        assert datasets.utils.logging.get_verbosity() == logging.WARNING
    finally:
        hub_bars.enable_progress_bars()


def test_a_column_that_is_nowhere_fails_the_rows(tmp_path: Path) -> None:
    write_json(tmp_path, train=3)

    for streaming in (False, True):
        records = read_all(open_path("hf", tmp_path, streaming=streaming), ["nope", "n"])
        assert [r.failure is None for r in records] == [False] * 3


@pytest.mark.parametrize("streaming", [False, True])
def test_no_columns_at_all(tmp_path: Path, streaming: bool) -> None:
    write_json(tmp_path, train=3)

    records = read_all(open_path("hf", tmp_path, streaming=streaming), [])

    assert [(r.values, r.failure) for r in records] == [({}, None)] * 3


CHATS: list[Any] = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
    [{"from": "human", "value": "<image>\nWhat?"}],
]


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="values of one type a column")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["json", "parquet", "saved"])
def test_values_of_several_types_are_as_written(tmp_path: Path, form: str, streaming: bool) -> None:
    """The library stores what has no single type as JSON text, at any level."""
    rows = [{"chat": chat, "any": value} for chat, value in zip(CHATS, (1, None, "a"), strict=True)]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    path = tmp_path / "in.json"
    made = datasets.load_dataset("json", data_files=str(path), split="train")
    if form == "parquet":
        path = tmp_path / "in.parquet"
        made.to_parquet(path)
    elif form == "saved":
        path, streaming = tmp_path / "saved", False
        made.save_to_disk(path)
    records = read_all(open_path("hf", path, streaming=streaming), ["chat", "any"])
    found = [record.values["chat"] for record in records]
    assert [[without_nulls(message) for message in chat] for chat in found] == CHATS
    assert [record.values["any"] for record in records] == [1, None, "a"]


def without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def test_text_that_is_no_json_or_too_deep_fails_the_row(tmp_path: Path) -> None:
    texts = ['{"a": 1}', "{", "[" * 200 + "]" * 200, '"\\ud800"', None]
    table = pa.table({"any": pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))})
    pq.write_table(table, tmp_path / "in.parquet")
    for kind in ("parquet", "hf"):
        records = read_all(open_path(kind, tmp_path / "in.parquet"), ["any"])
        assert [r.failure is None for r in records] == [True, False, False, False, True]
        assert [records[i].values["any"] for i in (0, 4)] == [{"a": 1}, None]
        for record in records[1:4]:
            assert record.failure is not None
            assert record.failure.message.startswith("column 'any' (extension<arrow.json>): ")


# --- images ---


def image_columns() -> dict[str, Any]:
    good, bad = {"bytes": picture(), "path": "a.png"}, {"bytes": b"no image", "path": None}
    return {"image": [good, bad, None], "images": [[good, bad], [], [bad]]}


def check_images(source: Source) -> None:
    columns = image_columns()
    records = read_all(source, ["image", "images"])
    assert [r.values["image"] for r in records] == columns["image"]
    assert [r.values["images"] for r in records] == columns["images"]
    assert source.schema.field("image").type == IMAGE


def test_saved_images_stay_undecoded(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    )
    datasets.Dataset.from_dict(image_columns(), features=features).save_to_disk(tmp_path)

    check_images(open_path("hf", tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_data_files_stay_undecoded(tmp_path: Path, streaming: bool) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    )
    made = datasets.Dataset.from_dict(image_columns(), features=features)
    made.to_parquet(tmp_path / "train.parquet")

    check_images(open_path("hf", tmp_path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_gives_paths_below_the_root(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "train").mkdir()
    for i in range(3):
        (tmp_path / "train" / f"{i}.png").write_bytes(b"no image" if i else picture())

    source = open_path("hf", tmp_path, streaming=streaming)
    records = read_all(source, ["image"])

    assert source.image_root == str(tmp_path)
    paths = [r.values["image"]["path"] for r in records]
    assert paths == [str(tmp_path / "train" / f"{i}.png") for i in range(3)]


# --- streaming ---


def test_streamed_parquet_is_planned_by_its_footers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path, 10, 0, 7)
    write_parquet(tmp_path, 5, split="test")
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", lambda self: 1 / 0)
    source = open_path("hf", tmp_path, streaming=True, id_column="key")

    assert isinstance(source, ParquetSource)
    assert [f.row_groups for f in source.files()] == [(4, 4, 2), (0,), (4, 3)]
    check_all_ways(source, ["n"], 5, seed=0)
    assert numbers(source) == list(range(17))
    assert {r.source_file for r in read_all(source, [])} == {
        "train-00000-of-00003.parquet",
        "train-00002-of-00003.parquet",
    }


def test_streamed_json_is_counted_once_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_json(tmp_path, train=100)
    source = open_path("hf", tmp_path, streaming=True)
    assert isinstance(source, StreamSource)
    streams: list[tuple[str, ...]] = []
    chunks = source._chunks

    def spy(names: tuple[str, ...]) -> Iterator[Any]:
        streams.append(names)
        return chunks(names)

    monkeypatch.setattr(source, "_chunks", spy)
    monkeypatch.setattr(source._cursors, "_open_stream", spy)

    with caplog.at_level(logging.INFO):
        assert [f.num_rows for f in source.files()] == [100]
        assert source.files() == source.files()
    assert "counting the rows" in caplog.text
    assert streams == [("n",)]
    assert [r.values["key"] for r in read_all(source, ["key"])] == [f"k{n}" for n in range(100)]
    assert streams == [("n",), ("key",)]


def test_streamed_rows_come_once_however_shards_are_read(tmp_path: Path) -> None:
    write_json(tmp_path, train=75)
    source = open_path("hf", tmp_path, streaming=True, id_column="key")

    check_all_ways(source, ["n"], 10, seed=0)
    records = read_all(source, ["n"])
    assert [r.values["n"] for r in records] == list(range(75))
    assert [r.id for r in records] == [f"k{n}" for n in range(75)]


def test_a_stream_that_breaks_fails_the_rest(tmp_path: Path) -> None:
    source = stream(lambda: numbered(100, broken_at=70), num_rows=100)

    for shard in plan(source, 40):
        check_positions(list(source.read_shard(shard, ["n"])), shard)
    found = numbers(source, rows_per_shard=40)
    num_good = sum(n is not None for n in found)
    assert 60 < num_good <= 70
    assert found == [*range(num_good), *[None] * (100 - num_good)]


def test_a_stream_shorter_than_its_metadata_fails_the_rest() -> None:
    source = stream(lambda: numbered(50), num_rows=60)

    assert numbers(source, rows_per_shard=40) == [*range(50), *[None] * 10]


def test_a_stream_longer_than_its_metadata_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert numbers(stream(lambda: numbered(50), num_rows=40)) == list(range(40))
    assert "has more rows than the 40 of its metadata" in caplog.text

    caplog.clear()
    assert numbers(stream(lambda: numbered(50), num_rows=50)) == list(range(50))
    assert not caplog.records


def test_counting_a_broken_stream_is_an_early_error() -> None:
    with pytest.raises(InputError, match="cannot be streamed: OSError: gone"):
        stream(lambda: numbered(50, broken_at=40), num_rows=None).files()


def numbered(num_rows: int, broken_at: int | None = None) -> Iterator[dict[str, Any]]:
    for n in range(num_rows):
        if n == broken_at:
            raise OSError("gone")
        yield {"n": n}


def stream(make: Any, *, num_rows: int | None) -> StreamSource:
    features = datasets.Features({"n": datasets.Value("int64")})
    return StreamSource(
        datasets.IterableDataset.from_generator(make, features=features),
        name="train",
        identity="",
        num_rows=num_rows,
        id_column=None,
        image_root=None,
    )
