"""Kept values come to the output as they were, whatever Python makes of them."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.output.schema import kept_fields, output_schema, to_table
from batchvlm.sources import Source
from tests.output.make import PROVENANCE, make_result
from tests.sources.make import open_path, plan

FAR = 1 << 62
TENSOR = datasets.Features({"x": datasets.Array2D((2, 2), "int32")}).arrow_schema.field("x").type
CELLS = [[[1, 2], [3, 4]], None, [[5, 6], [7, 8]]]

COLUMNS = [
    pa.array([1, None, 86_399_999_999_999], pa.time64("ns")),
    pa.array([1, None, FAR], pa.timestamp("ns")),
    pa.array([1, None, -FAR], pa.timestamp("us")),
    pa.array([1, None, FAR], pa.timestamp("us", "Europe/Berlin")),
    pa.array([1, None, 10**12], pa.timestamp("s")),
    pa.array([1, None, 1 << 30], pa.date32()),
    pa.array([86_400_000, None, 86_400_000 * 10**7], pa.date64()),
    pa.array([1, None, 3], pa.time32("s")),
    pa.array([1, None, FAR], pa.duration("ns")),
    pa.array([1, None, FAR], pa.duration("s")),
    pa.array([[1], None, [FAR, None]], pa.list_(pa.timestamp("us"))),
    pa.array([{"t": 1}, None, {"t": 5}], pa.struct([("t", pa.time64("ns")), ("s", pa.string())])),
    pa.array([[("a", 1)], None, [("b", FAR)]], pa.map_(pa.string(), pa.timestamp("us"))),
    pa.array([1, None, FAR], pa.timestamp("us")).dictionary_encode(),
    pa.StructArray.from_arrays([pa.array([1, 2, 3]), pa.array([4, 5, 6])], names=["a", "a"]),
    pa.ExtensionArray.from_storage(TENSOR, pa.array(CELLS, TENSOR.storage_type)),
    pa.array([1.5, None, float("inf")], pa.float32()),
    pa.array([(1 << 64) - 1, None, 0], pa.uint64()),
    pa.array([Decimal("1.20"), None, Decimal(10) ** 60], pa.decimal256(70, 2)),
    pa.array([b"abcd", None, b"\0\0\0\0"], pa.binary(4)),
    pa.array(["x", None, "y" * 40], pa.string_view()),
    pa.array(["x", None, "y"]).dictionary_encode(),
    pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
    pa.array(
        [{"t": 1, "s": "x"}] * 3, pa.struct([("t", pa.time64("ns")), ("s", pa.string_view())])
    ),
    pa.array([{"bytes": b"x"}, None, {"path": "p"}], pa.struct([("bytes", pa.binary())])),
]


def kept_by(source: Source) -> Any:
    """The column `x`, by way of records and results; every row is good."""
    (shard,) = plan(source)
    results = []
    for record in source.read_shard(shard, ["n"], kept=["x"]):
        assert record.failure is None and set(record.values) == {"n"}
        results.append(make_result(shard, record.row, kept=record.kept))
    schema = output_schema(kept_fields(source.schema, ["x"]), token_ids=False)
    return to_table(results, schema, PROVENANCE).column("x").combine_chunks()


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
def test_every_type_is_kept_exactly(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"n": [0, 1, 2], "x": column}), tmp_path / "a.parquet")
    stored = pq.read_table(tmp_path / "a.parquet").column("x").combine_chunks()

    kept = kept_by(open_path("parquet", tmp_path))

    # Parquet has no views: the output holds them as the plain types.
    if "_view" not in str(stored.type):
        assert kept.type == stored.type
    stored = stored.cast(kept.type)
    if pa.types.is_dictionary(stored.type):  # equal words may have other numbers
        kept, stored = kept.dictionary_decode(), stored.dictionary_decode()
    assert kept.equals(stored)


def test_a_type_that_parquet_stores_in_other_units_keeps_its_meaning(tmp_path: Path) -> None:
    times = pa.array([1, None, 10**12], pa.timestamp("s"))
    table = pa.table({"n": [0, 1, 2], "x": times})
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")

    kept = kept_by(open_path("hf", tmp_path / "saved"))

    assert kept.equals(times.cast(pa.timestamp("ms")))


def test_a_column_may_be_kept_and_read(tmp_path: Path) -> None:
    times = pa.array([1_000_000, 1 << 62], pa.timestamp("us"))
    pq.write_table(pa.table({"x": times}), tmp_path / "a.parquet")
    (shard,) = plan(source := open_path("parquet", tmp_path))

    good, bad = source.read_shard(shard, ["x"], kept=["x"])

    assert good.values["x"].second == 1 and good.kept["x"].equals(times[:1])
    # A prompt needs a date that Python knows.
    assert bad.failure is not None and bad.failure.message.startswith("column 'x' (timestamp[us])")


def test_a_key_of_bytes_is_their_text(tmp_path: Path) -> None:
    keys = [b"a-1", None, b"\xff", "\u00e9".encode()]
    table = pa.table({"key": pa.array(keys, pa.binary()), "n": [0, 1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_path("parquet", tmp_path, id_column="key")
    records = list(source.read_shard(plan(source)[0], ["n"]))
    assert [r.id for r in records] == ["a-1", "a.parquet:1", "a.parquet:2", "\u00e9"]
    assert [r.failure is None for r in records] == [True, True, False, True]


def test_a_kept_value_holds_no_more_than_itself(tmp_path: Path) -> None:
    kind = pa.struct([("t", pa.time64("ns")), ("s", pa.string())])
    pq.write_table(
        pa.table({"x": pa.array([{"t": i, "s": "y" * 1000} for i in range(50)], kind)}),
        tmp_path / "a.parquet",
    )
    (shard,) = plan(source := open_path("parquet", tmp_path), rows_per_shard=50)

    records = list(source.read_shard(shard, [], kept=["x"]))

    assert 1000 < sum(r.kept["x"].get_total_buffer_size() for r in records) / 50 < 2000


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_other_sources_keep_too(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"file_name": "a.png", "n": 1}\n')
    (tmp_path / "a.png").write_bytes(b"")
    path = tmp_path / "in.jsonl" if kind == "jsonl" else tmp_path
    (shard,) = plan(source := open_path(kind, path))

    (record,) = source.read_shard(shard, [], kept=["file_name"])

    assert (record.values, record.kept) == ({}, {"file_name": "a.png"})
