"""Parquet files that are corrupt, change or go away: every row keeps its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.errors import ErrorType, InputError
from batchvlm.records import Shard
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


def test_a_corrupt_row_group_fails_its_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_groups(path, [5, 5, 5])
    flip_page(path, group=1)
    source = open_path("parquet", path)

    for rows_per_shard in (2, 5, 15):
        records = read_all(source, ["n", "image"], rows_per_shard)
        assert numbers(records) == [*range(5), *[None] * 5, *range(10, 15)]
        failed = [r for r in records if r.failure]
        assert all(r.failure.error_type is ErrorType.INPUT for r in failed if r.failure)
        assert all(
            "a.parquet, row group 1: unreadable from its row 0: " in r.failure.message
            for r in failed
            if r.failure
        )
        assert [r.id for r in failed] == [f"a.parquet:{i}" for i in range(5, 10)]
    assert numbers(read_all(source, ["n"])) == list(range(15)), "the column is whole"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_rows_before_a_corrupt_page_are_read_whatever_the_shards(
    tmp_path: Path, share: float
) -> None:
    path = tmp_path / "a.parquet"
    num_rows = 2000
    schema = pa.schema([("n", pa.int64()), ("text", pa.int64()), ("image", pa.binary())])
    rows = [list(range(num_rows))] * 2 + [[os.urandom(30) for _ in range(num_rows)]]
    pq.write_table(
        pa.table(rows, schema=schema),
        path,
        data_page_size=1000,
        write_batch_size=10,
        use_dictionary=False,
        write_page_checksum=True,
    )
    flip_page(path, group=0, share=share)

    found = []
    for rows_per_shard in (90, 333, 2000):
        source = open_path("parquet", path)
        records = read_all(source, ["n", "image"], rows_per_shard)
        assert len(records) == num_rows
        num_good = sum(r.failure is None for r in records)
        assert numbers(records) == [*range(num_good), *[None] * (num_rows - num_good)]
        assert abs(num_good - share * num_rows) < 60, "only the page and what follows is lost"
        found.append(num_good)
        check_all_ways(open_path("parquet", path), ["n", "image"], rows_per_shard, seed=3)
    assert len(set(found)) == 1
    source = open_path("parquet", path)
    for shard in plan(source, 1)[found[0] - 1 : found[0] + 1]:
        (record,) = source.read_shard(shard, ["n", "image"])
        assert (record.failure is None) == (shard.first_row < found[0])


@settings(max_examples=40)
@given(
    place=st.floats(0, 1),
    noise=st.binary(min_size=1, max_size=40),
    rows_per_shard=st.integers(1, 9),
)
def test_any_damage_leaves_every_row_in_its_place(
    tmp_path: Path, place: float, noise: bytes, rows_per_shard: int
) -> None:
    path = tmp_path / "a.parquet"
    write_groups(path, [4, 7, 3], write_page_checksum=True)
    data = bytearray(path.read_bytes())
    body = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    start = int(place * (body - len(noise)))
    data[start : start + len(noise)] = noise
    path.write_bytes(data)
    source = open_path("parquet", path)

    for shard in plan(source, rows_per_shard):
        records = list(source.read_shard(shard, ["n", "text", "image"]))
        check_positions(records, shard)
        assert all(r.failure or r.values["text"] is not None for r in records)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"PAR1",
        lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda data: data[:-40] + b"\xff" * 32 + data[-8:],
        lambda data: b"no Parquet at all, but long enough to be one",
    ],
)
def test_a_corrupt_footer_names_the_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_groups(tmp_path / "a.parquet", [5])
    write_groups(tmp_path / "b.parquet", [5])
    (tmp_path / "b.parquet").write_bytes(damage((tmp_path / "b.parquet").read_bytes()))

    with pytest.raises(InputError, match=r"b\.parquet is no readable Parquet file") as caught:
        open_path("parquet", tmp_path)
    assert "\n" not in str(caught.value)


def replace_by_shorter(path: Path) -> None:
    write_groups(path, [2])


@pytest.mark.parametrize("change", [Path.unlink, replace_by_shorter])
def test_a_file_that_changed_since_the_plan_fails_its_rows(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    write_groups(tmp_path / "a.parquet", [4, 4])
    write_groups(tmp_path / "b.parquet", [4], first=8)
    source = open_path("parquet", tmp_path)
    shards = plan(source, 4)
    change(tmp_path / "a.parquet")

    records = [r for s in shards for r in source.read_shard(s, ["n"])]

    assert numbers(records) == [None] * 8 + list(range(8, 12))
    assert all(r.failure and "a.parquet" in r.failure.message for r in records[:8])


def test_a_shard_beyond_the_file_fails(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [4])
    source = open_path("parquet", tmp_path)
    shard = Shard(index=0, source_file="a.parquet", first_row=2, num_rows=5, first_row_index=2)
    elsewhere = Shard(index=1, source_file="z.parquet", first_row=0, num_rows=2, first_row_index=7)

    records = list(source.read_shard(shard, ["n"]))

    check_positions(records, shard)
    assert numbers(records) == [2, 3, None, None, None]
    assert [r.failure is None for r in source.read_shard(elsewhere, ["n"])] == [False, False]


def test_an_input_without_rows(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [])
    source = open_path("parquet", tmp_path)

    assert source.schema.names == ["n", "text", "image"]
    assert plan(source) == []
