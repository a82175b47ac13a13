from __future__ import annotations

import datetime
import logging
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.errors import ErrorType
from batchvlm.output import segments as segments_module
from batchvlm.output.folder import OutputFolder
from batchvlm.output.schema import Provenance, output_schema, to_table
from batchvlm.output.segments import (
    merge_segments,
    read_segments,
    with_marks,
    write_segment,
    write_tables,
)
from batchvlm.records import Failure, Shard, Status

from .make import PROVENANCE, SCHEMA, make_plan, make_result

SHARD = make_plan(3, 60)[1]


def marked(schema: pa.Schema = SCHEMA, *, shard_index: int = 1) -> pa.Schema:
    return with_marks(schema, fingerprint=PROVENANCE.fingerprint, shard_index=shard_index)


def rows_table(rows: list[int], schema: pa.Schema, **changes: Any) -> pa.Table:
    results = [make_result(SHARD, row, **changes) for row in rows]
    return to_table(results, schema, PROVENANCE)


def every_other(table: pa.Table, first: int) -> pa.Table:
    return pa.concat_tables([table.slice(i, 1) for i in range(first, table.num_rows, 2)])


def put(folder: OutputFolder, name: str, rows: list[int], **changes: Any) -> Path:
    path = folder.segment(SHARD.index, name, 0)
    write_segment(folder, path, rows_table(rows, marked(), **changes), SHARD)
    return path


def test_a_segment_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    table = rows_table([1, 4, 59], marked())
    written = write_segment(folder, folder.segment(1, "a", 0), table, SHARD)
    (read,) = read_segments(folder, SHARD, marked())
    assert read.rows == written.rows == {1, 4, 59}
    assert read.groups == written.groups == ((1, 59),)
    assert read_segments(folder, make_plan(3, 60)[0], marked(shard_index=0)) == []


def test_row_groups_are_what_the_index_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "_MAX_GROUP_ROWS", 4)
    folder = OutputFolder(tmp_path)
    rows = sorted(random.Random(0).sample(range(60), 30))
    table = rows_table(rows, marked())
    written = write_segment(folder, folder.segment(1, "a", 0), table, SHARD)
    (read,) = read_segments(folder, SHARD, marked())
    assert read.groups == written.groups
    assert len(read.groups) == 8
    rest = rows_table([row for row in range(60) if row not in rows], marked())
    num_read, read_groups = [], pq.ParquetFile.read_row_groups

    def count(self: pq.ParquetFile, groups: list[int]) -> pa.Table:
        num_read.append(len(groups))
        return read_groups(self, groups)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", count)
    tables = list(merge_segments(folder, [written], rest, SHARD, marked()))
    assert [table.num_rows for table in tables] == [4] * 15
    assert pa.concat_tables(tables).equals(rows_table(list(range(60)), marked()))
    # No more of the segment is in memory at once than the row groups that four rows can be in.
    assert max(num_read) == 2


def test_the_index_has_the_errors_and_attempts_of_all_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "_MAX_GROUP_ROWS", 2)
    oom = Failure(error_type=ErrorType.OOM, message="no room")
    failed = {"status": Status.ERROR, "failure": oom, "attempts": 3}
    fine = {"status": Status.SUCCESS, "failure": None}
    results = [make_result(SHARD, row, **(failed if row % 4 == 1 else fine)) for row in range(8)]
    folder = OutputFolder(tmp_path)
    table = to_table(results, marked(), PROVENANCE)
    written = write_segment(folder, folder.segment(1, "a", 0), table, SHARD)
    (read,) = read_segments(folder, SHARD, marked())
    for index in (written, read):
        assert (index.errors, index.retried) == ({1: "oom", 5: "oom"}, {1: 3, 5: 3})
    assert [read.attempts(row) for row in (0, 1)] == [1, 3]


@pytest.mark.parametrize(
    ("max_rows", "max_bytes", "expected"),
    [
        (4, 1 << 20, [4, 3, 4]),
        (100, 7_000, [3, 1, 3, 3, 1]),
        (100, 1 << 20, [11]),
        (1, 1, [1] * 11),
    ],
)
def test_small_tables_share_a_row_group_and_large_ones_do_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_rows: int,
    max_bytes: int,
    expected: list[int],
) -> None:
    monkeypatch.setattr(segments_module, "_MAX_GROUP_ROWS", max_rows)
    monkeypatch.setattr(segments_module, "_MAX_GROUP_BYTES", max_bytes)
    schema = pa.schema([("n", pa.int64()), ("blob", pa.binary(2_000))])
    whole = pa.table({"n": range(11), "blob": [bytes(2_000)] * 11}, schema=schema)
    tables = [whole.slice(start, num) for start, num in ((0, 1), (1, 2), (3, 1), (4, 3), (7, 4))]
    path = tmp_path / "x.parquet"
    with path.open("wb") as file:
        write_tables(tables, file, schema)
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == expected
    assert pq.read_table(path).equals(whole)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_two_attempts_at_a_row_the_first_by_name_counts(tmp_path: Path, order: str) -> None:
    folder = OutputFolder(tmp_path)
    for name in order:
        put(folder, name, list(range(0 if name == "a" else 10, 60)), generated_text=name)
    found = read_segments(folder, SHARD, marked())
    tables = list(merge_segments(folder, found, rows_table([], marked()), SHARD, marked()))
    assert pa.concat_tables(tables)["generated_text"].to_pylist() == ["a"] * 60


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "empty":
        content.clear()
    elif how == "half":
        del content[len(content) // 2 :]
    elif how == "no footer":
        del content[-1:]
    elif how == "page":
        # The first page's data; its footer still reads.
        content[60:70] = bytes(byte ^ 0xFF for byte in content[60:70])
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "half", "no footer", "page"])
def test_a_damaged_segment_is_ignored_with_a_warning(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = OutputFolder(tmp_path)
    path = put(folder, "a", list(range(40)))
    put(folder, "b", [50, 51])
    damage(path, how)
    with caplog.at_level(logging.WARNING):
        (segment,) = read_segments(folder, SHARD, marked())
    assert segment.rows == {50, 51}
    assert str(path) in caplog.text
    assert len(caplog.records) == 1


def other_run(folder: OutputFolder) -> pa.Table:
    other = Provenance(model="demo@1", fingerprint="f" * 16, run_id="run-1")
    schema = with_marks(SCHEMA, fingerprint=other.fingerprint, shard_index=1)
    return to_table([make_result(SHARD, 0)], schema, other)


def other_shard(folder: OutputFolder) -> pa.Table:
    return rows_table([0], marked(shard_index=2))


def other_columns(folder: OutputFolder) -> pa.Table:
    return rows_table([0], marked(output_schema([], token_ids=False)))


def other_rows(folder: OutputFolder) -> pa.Table:
    return rows_table([0, 60], marked())


def no_marks(folder: OutputFolder) -> pa.Table:
    return pa.table({"row_index": [60]})


def no_row_index(folder: OutputFolder) -> pa.Table:
    table = rows_table([0], marked())
    return table.set_column(1, table.schema.field(1), pa.nulls(1, pa.int64()))


@pytest.mark.parametrize(
    "make", [other_run, other_shard, other_columns, other_rows, no_marks, no_row_index]
)
def test_a_foreign_segment_is_ignored_with_a_warning(
    tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = OutputFolder(tmp_path)
    path = folder.segment(1, "a", 0)
    folder.commit_file(lambda file: pq.write_table(make(folder), file), path)
    with caplog.at_level(logging.WARNING):
        assert read_segments(folder, SHARD, marked()) == []
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    ("arrow_type", "value"),
    [
        (pa.timestamp("s"), datetime.datetime(2024, 2, 29)),
        (pa.timestamp("ns", tz="Europe/Paris"), None),
        (pa.time32("s"), datetime.time(1, 2, 3)),
        (pa.duration("us"), datetime.timedelta(days=1)),
        (pa.dictionary(pa.int32(), pa.int64()), 7),
        (pa.dictionary(pa.int8(), pa.string()), "x"),
        (pa.large_list(pa.large_string()), ["x", None]),
        (pa.list_(pa.field("own", pa.int32(), nullable=False)), [1, 2]),
        (pa.list_(pa.float32(), 2), [1.0, 2.0]),
        (pa.map_(pa.string(), pa.int8()), [("a", 1)]),
        (pa.string_view(), "x"),
        (pa.binary(4), b"abcd"),
        (pa.decimal128(5, 2), None),
        (pa.uint64(), 2**64 - 1),
        (pa.float16(), 0.5),
        (pa.date32(), datetime.date(2024, 2, 29)),
        (pa.null(), None),
        (pa.struct([("a", pa.struct([("b", pa.timestamp("s"))]))]), {"a": None}),
    ],
    ids=str,
)
def test_kept_columns_of_any_type_come_through_segments(
    tmp_path: Path, arrow_type: pa.DataType, value: object
) -> None:
    schema = marked(output_schema([pa.field("k", arrow_type)], token_ids=False))
    shard = Shard(index=1, source_file="x", first_row=0, num_rows=2, first_row_index=60)
    folder = OutputFolder(tmp_path)
    rows = [make_result(shard, 0, kept={"k": value}), make_result(shard, 1, kept={})]
    table = to_table(rows, schema, PROVENANCE)
    write_segment(folder, folder.segment(1, "a", 0), table.slice(0, 1), shard)
    found = read_segments(folder, shard, schema)
    (result,) = merge_segments(folder, found, table.slice(1), shard, schema)
    assert result.schema.equals(schema)
    assert result["k"].to_pylist() == [value, None]


def test_large_rows_make_small_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "_MAX_GROUP_BYTES", 10_000)
    folder = OutputFolder(tmp_path)
    kept = {"blob": bytes(2_000)}
    segment = write_segment(
        folder, folder.segment(1, "a", 0), rows_table(list(range(30)), marked(), kept=kept), SHARD
    )
    pending = rows_table(list(range(30, 60)), marked(), kept=kept)
    tables = list(merge_segments(folder, [segment], pending, SHARD, marked()))
    assert sum(table.num_rows for table in tables) == 60
    assert max(table.num_rows for table in tables) <= 5


@pytest.mark.parametrize("arrow_type", [pa.string_view(), pa.list_view(pa.string())], ids=str)
def test_rows_are_ordered_also_where_pyarrow_cannot_take(
    tmp_path: Path, arrow_type: pa.DataType
) -> None:
    """It can neither take views, nor more than 2 GiB of one binary column."""
    schema = marked(output_schema([pa.field("k", arrow_type)], token_ids=False))
    kept = {"k": ["x"]} if arrow_type != pa.string_view() else {"k": "x" * 50}
    table = rows_table(list(range(60)), schema, kept=kept)
    folder = OutputFolder(tmp_path)
    write_segment(folder, folder.segment(1, "a", 0), every_other(table, 1), SHARD)
    found = read_segments(folder, SHARD, schema)
    (result,) = merge_segments(folder, found, every_other(table, 0), SHARD, schema)
    assert result.equals(table)
