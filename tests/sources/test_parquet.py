"""Parquet: every layout, every type, and files that are damaged or change."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.errors import ErrorType, InputError
from batchvlm.plan import plan_shards
from batchvlm.sources import parquet
from tests.conftest import IMAGE
from tests.sources.make import (
    check_all_ways,
    check_positions,
    flip_page,
    numbers,
    open_path,
    plan,
    read_all,
    write_groups,
)


def test_rows_come_with_their_place_and_the_columns_asked_for(tmp_path: Path) -> None:
    write_groups(tmp_path / "in" / "b" / "two.parquet", [3], first=5)
    write_groups(tmp_path / "in" / "a.parquet", [2, 3])
    source = open_path("parquet", tmp_path / "in")

    records = read_all(source, ["text", "n"], rows_per_shard=2)

    assert [dict(r.values) for r in records] == [{"text": f"text {i}", "n": i} for i in range(8)]
    assert [r.row_index for r in records] == list(range(8))
    assert [r.source_file for r in records] == ["a.parquet"] * 5 + ["b/two.parquet"] * 3
    assert [r.id for r in records[4:6]] == ["a.parquet:4", "b/two.parquet:0"]
    assert all(r.failure is None for r in records)


def test_the_plan_takes_row_groups_from_the_footer(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [4, 1, 7])

    (file,) = open_path("parquet", tmp_path / "a.parquet").files()

    assert (file.name, file.num_rows, file.row_groups) == ("a.parquet", 12, (4, 1, 7))


@settings(max_examples=25)
@given(
    layout=st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=3),
    rows_per_shard=st.integers(1, 20),
    batch_rows=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_every_row_comes_once_however_shards_are_read(
    tmp_path: Path, layout: list[list[int]], rows_per_shard: int, batch_rows: int, seed: int
) -> None:
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    first = 0
    for i, row_groups in enumerate(layout):
        write_groups(tmp_path / "in" / f"{i}.parquet", row_groups, first=first)
        first += sum(row_groups)
    source = open_path("parquet", tmp_path / "in", id_column="text")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "MAX_BATCH_ROWS", batch_rows)
        check_all_ways(source, ["n", "image"], rows_per_shard, seed)
        records = read_all(source, ["n"], rows_per_shard)

    assert numbers(records) == list(range(first))
    assert [r.id for r in records] == [f"text {i}" for i in range(first)]
    assert [r.row_index for r in records] == list(range(first))


def test_shards_of_one_row_group_read_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_groups(tmp_path / "a.parquet", [1000])
    source = open_path("parquet", tmp_path / "a.parquet")
    assert isinstance(source, parquet.ParquetSource)
    streams: list[Any] = []
    batches = source._batches

    def spy(stream: Any) -> Iterator[Any]:
        streams.append(stream)
        return batches(stream)

    monkeypatch.setattr(source._cursors, "_open_stream", spy)

    shards = plan(source, 10)
    assert numbers([r for s in shards for r in source.read_shard(s, ["n"])]) == list(range(1000))
    assert len(streams) == 1
    for shard in shards[::3]:
        list(source.read_shard(shard, ["n"]))
    assert len(streams) == 2


def test_a_row_group_that_is_finished_is_not_opened(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [5, 5])
    source = open_path("parquet", tmp_path / "a.parquet")
    (shard,) = plan(source, 100)
    flip_page(tmp_path / "a.parquet", group=0)

    records = list(source.read_shard(shard, ["n", "image"], skip=set(range(5))))

    check_positions(records, shard, skip=range(5))
    assert numbers(records) == list(range(5, 10))


def test_memory_is_bounded_by_batches(tmp_path: Path) -> None:
    """Default writers put everything into one row group."""
    images = [os.urandom(5000) for _ in range(8000)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", use_dictionary=False)
    del images
    source = open_path("parquet", tmp_path / "a.parquet")
    (shard,) = plan(source, 8000)
    before = pa.total_allocated_bytes()

    peak = max(pa.total_allocated_bytes() - before for _ in source.read_shard(shard, ["image"]))

    assert peak < 15 << 20  # the row group is 40 MB


def test_images_stay_undecoded(tmp_path: Path) -> None:
    cells = [{"bytes": b"no image at all", "path": "x.png"}, {"bytes": None, "path": "y"}, None]
    table = pa.table({"image": pa.array(cells, IMAGE), "raw": [b"\x00", b"", None]})
    pq.write_table(table, tmp_path / "a.parquet")

    records = read_all(open_path("parquet", tmp_path / "a.parquet"), ["image", "raw"])

    assert [r.values["image"] for r in records] == cells
    assert [r.values["raw"] for r in records] == [b"\x00", b"", None]


def test_types_and_names(tmp_path: Path) -> None:
    values: dict[str, tuple[pa.DataType, list[Any]]] = {
        "large": (pa.large_string(), ["x", None]),
        "view": (pa.string_view(), ["a longer text than fits inline", None]),
        "bytes view": (pa.binary_view(), [b"a longer text than fits inline", None]),
        "dictionary": (pa.dictionary(pa.int32(), pa.string()), ["x", None]),
        "list": (pa.list_(IMAGE), [[{"bytes": b"x", "path": None}], []]),
        "deep": (pa.list_(pa.struct([("a", pa.list_(pa.int8()))])), [[{"a": [1, 2]}], None]),
        "time": (pa.timestamp("us"), [datetime(2020, 1, 2, 3, 4, 5, 6), None]),
        "a": (pa.struct([("b", pa.int64())]), [{"b": 1}, {"b": 2}]),
        "a.b": (pa.string(), ["dotted", None]),
        "a.b.c": (pa.string(), ["twice", None]),
        "": (pa.string(), ["nameless", None]),
    }
    table = pa.table({name: pa.array(v, kind) for name, (kind, v) in values.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_path("parquet", tmp_path / "a.parquet")

    for name, (kind, expected) in values.items():
        assert source.schema.field(name).type == kind
        assert [dict(r.values) for r in read_all(source, [name])] == [{name: v} for v in expected]
    together = read_all(source, list(values))
    assert [dict(r.values) for r in together] == table.to_pylist()


def test_no_columns_at_all(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [3, 600])

    records = read_all(open_path("parquet", tmp_path / "a.parquet"), [], rows_per_shard=100)

    assert len(records) == 603
    assert all(r.values == {} and r.failure is None for r in records)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["x", None, "z"], ["x", "a.parquet:1", "z"]),
        ([7, None, 8], ["7", "a.parquet:1", "8"]),
        ([None, None, None], ["a.parquet:0", "a.parquet:1", "a.parquet:2"]),
    ],
)
def test_ids_fall_back_to_the_place(tmp_path: Path, ids: list[Any], expected: list[str]) -> None:
    pq.write_table(pa.table({"key": ids, "n": [0, 1, 2]}), tmp_path / "a.parquet")

    records = read_all(open_path("parquet", tmp_path / "a.parquet", id_column="key"), ["n"], 2)

    assert [r.id for r in records] == expected
    assert [dict(r.values) for r in records] == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_value_that_is_no_text_fails_its_row_alone(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xff\xfe", b"fine"]).buffers())
    pq.write_table(pa.table({"text": bad, "key": ["a", "b", "c"]}), tmp_path / "a.parquet")

    records = read_all(open_path("parquet", tmp_path / "a.parquet", id_column="key"), ["text"])

    assert [r.values for r in records] == [{"text": "ok"}, {}, {"text": "fine"}]
    failure = records[1].failure
    assert failure is not None
    assert failure.error_type is ErrorType.INPUT
    assert failure.message == "column 'text' (string): UnicodeDecodeError"
    assert records[1].id == "b"


# --- files that differ ---


def test_a_column_missing_in_another_file_is_an_early_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "extra": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [2], "other": [1]}), tmp_path / "b.parquet")
    source = open_path("parquet", tmp_path)

    assert source.schema.names == ["n", "extra", "other"]
    assert len(source.files(["n"])) == 2
    with pytest.raises(InputError, match=r"b\.parquet has no column 'extra'"):
        source.files(["n", "extra"])
    assert numbers(read_all(source, ["n"])) == [1, 2]
    records = read_all(source, ["n", "extra"])  # nobody asked before
    assert [r.failure is None for r in records] == [True, False]


def test_a_kept_column_is_null_where_a_file_lacks_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [2], "at": [datetime(2020, 1, 1)]}), tmp_path / "b.parquet")
    source = open_path("parquet", tmp_path)

    files = source.files(["n"], ["at"])
    (first,), (second,) = (
        source.read_shard(shard, ["n"], kept=["at"])
        for shard in plan_shards(files, rows_per_shard=9, max_rows=None)
    )

    assert "1 of 2 files have no column 'at', as a.parquet" in caplog.text
    assert (first.failure, second.failure) == (None, None)
    assert first.kept["at"].to_pylist() == [None]
    assert second.kept["at"].to_pylist() == [datetime(2020, 1, 1)]


def test_folders_of_a_partitioned_table_are_columns(tmp_path: Path) -> None:
    places = ["day=1/c=a%20b=", f"day=2/c={parquet._NULL_PARTITION}", "day=3/c=x"]
    for n, place in enumerate(places):
        write_groups(tmp_path / place / "f.parquet", [2], first=2 * n)
    # A column of the file's own goes before its folder's.
    pq.write_table(pa.table({"n": [7], "c": ["own"]}), tmp_path / "day=3/c=x/g.parquet")
    source = open_path("parquet", tmp_path)

    records = read_all(source, ["n", "day", "c"])

    assert source.schema.field("day").type == pa.string()
    assert len(source.files(["n", "day", "c"])) == 4
    assert [r.values["day"] for r in records] == ["1", "1", "2", "2", "3", "3", "3"]
    assert [r.values["c"] for r in records] == ["a b="] * 2 + [None] * 2 + ["x"] * 2 + ["own"]
    assert [r.values["c"] for r in read_all(source, ["c"])][-3:] == ["x", "x", "own"]
    (one,) = source.read_shard(plan(source)[-1], ["n"], kept=["day"])
    assert one.kept == {"day": "3"}


def test_a_folders_value_has_the_type_that_another_file_stores(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "day": [4]}), tmp_path / "a.parquet")
    (tmp_path / "day=5").mkdir()
    pq.write_table(pa.table({"n": [2]}), tmp_path / "day=5" / "b.parquet")
    records = read_all(open_path("parquet", tmp_path), ["n", "day"])
    assert [r.values.get("day") for r in records] == [4, 5]


def test_numbers_are_as_wide_as_in_any_file(tmp_path: Path) -> None:
    narrow, wide = (pa.int32(), pa.float32()), (pa.int64(), pa.float64())
    for name, (whole, real), n, x in (("a", narrow, 1, 0.5), ("b", wide, 1 << 40, 0.1)):
        table = pa.table({"n": pa.array([n], whole), "x": pa.array([x], real)})
        pq.write_table(table, tmp_path / f"{name}.parquet")

    records = read_all(open_path("parquet", tmp_path), ["n", "x"])

    assert [(r.values["n"], r.values["x"]) for r in records] == [(1, 0.5), (1 << 40, 0.1)]


def test_types_that_differ_are_converted_to_the_first(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": pa.array([2, 0.5, 3])}), tmp_path / "b.parquet")
    source = open_path("parquet", tmp_path)

    records = read_all(source, ["n"])

    assert source.schema.field("n").type == pa.int32()
    assert numbers(records) == [1, 2, None, 3]
    failures = [r.failure.message for r in records if r.failure]
    assert failures == ["column 'n' (double as int32): ArrowInvalid"]


def test_types_that_never_convert_are_an_early_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([None], IMAGE)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "b.parquet")
    source = open_path("parquet", tmp_path)

    with pytest.raises(InputError, match=r"b\.parquet has column 'image' as binary"):
        source.files(["image"])


def test_a_column_of_nulls_takes_its_type_from_another_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": pa.nulls(2)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [1, None]}), tmp_path / "b.parquet")
    source = open_path("parquet", tmp_path)

    assert source.schema.field("n").type == pa.int64()
    assert len(source.files(["n"])) == 2
    assert numbers(read_all(source, ["n"])) == [None, None, 1, None]


def test_a_column_twice_fails_and_is_no_crash(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["n", "n"])
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_path("parquet", tmp_path)

    with pytest.raises(InputError, match="has 2 columns 'n'"):
        source.files(["n"])
    assert [r.failure is None for r in read_all(source, ["n"])] == [False]


def test_a_column_that_is_nowhere_fails_the_rows(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [3])

    records = read_all(open_path("parquet", tmp_path), ["nope"])

    assert [r.failure is None for r in records] == [False] * 3


def test_an_encrypted_column_costs_its_rows_and_others_are_read(tmp_path: Path) -> None:
    class Keys(encryption.KmsClient):
        def __init__(self, config: Any) -> None:
            super().__init__()

        def wrap_key(self, key: bytes, master: str) -> bytes:
            return base64.b64encode(key)

    table = pa.table({"n": [1, 2], "secret": ["a", "b"]})
    properties = encryption.CryptoFactory(Keys).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(
            footer_key="k", column_keys={"k": ["secret"]}, plaintext_footer=True
        ),
    )
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    source = open_path("parquet", path)

    assert numbers(read_all(source, ["n"])) == [1, 2]
    failures = [r.failure for r in read_all(source, ["n", "secret"])]
    assert all(f is not None and "Cannot decrypt" in f.message for f in failures)


# --- identity ---


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    write_groups(tmp_path / "one" / "a.parquet", [4, 4])
    write_groups(tmp_path / "two" / "a.parquet", [4, 4])
    os.utime(tmp_path / "two" / "a.parquet", (1, 1))
    write_groups(tmp_path / "three" / "a.parquet", [4, 4], first=1)
    write_groups(tmp_path / "four" / "a.parquet", [8])

    one, two, three, four = (
        open_path("parquet", tmp_path / name).files()[0].identity
        for name in ("one", "two", "three", "four")
    )

    assert one == two
    assert len({one, three, four}) == 3


def test_a_footer_longer_than_the_first_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_groups(tmp_path / "a.parquet", [1] * 50)
    expected = open_path("parquet", tmp_path).files()
    monkeypatch.setattr(parquet, "TAIL_BYTES", 100)

    assert open_path("parquet", tmp_path).files() == expected


def test_urls(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [5, 300])
    fs = fsspec.filesystem("memory")
    fs.pipe("/pq/sub/a.parquet", (tmp_path / "a.parquet").read_bytes())
    try:
        source = open_path("parquet", "memory://pq")

        assert source.image_root is None
        assert source.files()[0].name == "sub/a.parquet"
        assert source.files()[0].identity == open_path("parquet", tmp_path).files()[0].identity
        check_all_ways(source, ["n", "image"], 40, seed=1)
        assert numbers(read_all(source, ["n"])) == list(range(305))
    finally:
        fs.rm("/pq", recursive=True)
