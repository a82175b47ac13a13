"""Segments: Parquet files with finished rows of unfinished shards, and merging them into a part.

A segment holds the rows that one attempt finished between two flushes, sorted by row. Segments of
several attempts may hold the same row. A retry increases the row's `attempts`, and the row with the
highest `attempts` is used. If these are equal (two writers of one shard can be alive at once), the
row of the segment that sorts first is used. So all readers of the same files agree, and a leftover
segment never replaces a newer answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.output.folder import OutputFolder
from batchvlm.records import Shard

log = logging.getLogger(__name__)

FINGERPRINT_KEY = b"batchvlm.fingerprint"
SHARD_KEY = b"batchvlm.shard"

_MAX_GROUP_ROWS = 1024
_MAX_GROUP_BYTES = 64 << 20
"""Limit of a row group's size: readers and writers must hold a whole row group in memory."""


class UnreadableSegment(Exception):
    """A segment is damaged, missing, or of another run; the message says which."""


class UnreadablePart(Exception):
    """A part is damaged or missing; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A readable segment and an index of its content."""

    path: Path
    rows: frozenset[int]
    """Offsets of its rows in the shard."""
    size_bytes: int
    """Size in memory."""
    groups: tuple[tuple[int, int], ...]
    """First and last row of each row group."""
    retried: Mapping[int, int]
    """Attempts of each row that was tried more than once."""
    errors: Mapping[int, str]
    """Error type of each row that failed."""

    def attempts(self, row: int) -> int:
        """Return how often a row of this segment was tried."""
        return self.retried.get(row, 1)


def write_segment(folder: OutputFolder, path: Path, table: pa.Table, shard: Shard) -> Segment:
    """Commit rows as a new segment; `table` is sorted by row and its schema has the marks.

    Raises:
        OutputError: the file system refuses.
    """
    folder.commit_file(lambda file: write_tables([table], file, table.schema), path)
    offsets = _row_offsets(table, shard)
    step = group_rows(table.nbytes, table.num_rows)
    retried, errors = _outcomes(table, offsets)
    return Segment(
        retried=retried,
        errors=errors,
        path=path,
        rows=frozenset(offsets.tolist()),
        size_bytes=table.nbytes,
        groups=tuple(
            (int(offsets[i]), int(offsets[i : i + step][-1])) for i in range(0, len(offsets), step)
        ),
    )


def write_tables(tables: Iterable[pa.Table], file: BinaryIO, schema: pa.Schema) -> None:
    """Write tables as one Parquet file, in row groups of bounded size; small tables share one."""
    # Checksums let readers detect pages that the disk damaged.
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in _joined(tables):
            writer.write_table(table, row_group_size=group_rows(table.nbytes, table.num_rows))


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join neighbouring tables as long as they fit into one row group together."""
    waiting: list[pa.Table] = []
    num_rows = size_bytes = 0
    for table in tables:
        num_rows, size_bytes = num_rows + table.num_rows, size_bytes + table.nbytes
        if waiting and (num_rows > _MAX_GROUP_ROWS or size_bytes > _MAX_GROUP_BYTES):
            yield pa.concat_tables(waiting)
            waiting, num_rows, size_bytes = [], table.num_rows, table.nbytes
        waiting.append(table)
    if waiting:
        yield pa.concat_tables(waiting)


def group_rows(size_bytes: int, num_rows: int) -> int:
    """Return the number of rows of a row group for this average row size; at least 1."""
    return max(1, min(_MAX_GROUP_ROWS, _MAX_GROUP_BYTES * num_rows // max(1, size_bytes)))


def with_marks(schema: pa.Schema, *, fingerprint: str, shard_index: int) -> pa.Schema:
    """Return the schema with metadata that names the run (by fingerprint) and the shard."""
    marks = {FINGERPRINT_KEY: fingerprint.encode(), SHARD_KEY: str(shard_index).encode()}
    return schema.with_metadata((schema.metadata or {}) | marks)


def read_segments(
    folder: OutputFolder, shard: Shard, schema: pa.Schema, *, is_retry: bool = False
) -> list[Segment]:
    """Return the shard's readable segments, sorted by name; log a warning for each other one.

    Every page is read once, so that damage is found before rows count as finished. One row group is
    in memory at a time.

    Args:
        schema: schema of the part, with its marks.
    """
    segments = []
    for path in folder.list_segments(shard.index, is_retry=is_retry):
        try:
            segments.append(read_segment(folder, path, shard, schema))
        except UnreadableSegment as error:
            log.warning("ignoring %s, its rows are computed again: %s", path, error)
    return segments


def merge_segments(
    folder: OutputFolder,
    segments: Sequence[Segment],
    pending: pa.Table,
    shard: Shard,
    schema: pa.Schema,
) -> Iterator[pa.Table]:
    """Yield every row of the shard once, in input order, as tables of one row group each.

    Args:
        segments: for a row in several, the one with most attempts is used, then the first.
        pending: rows that are in no segment yet.
        schema: schema of the part, with its marks.

    Raises:
        UnreadableSegment: a segment that was readable before is not any more.
    """
    size_bytes = sum(segment.size_bytes for segment in segments) + pending.nbytes
    step = group_rows(size_bytes, shard.num_rows)
    for start in range(0, shard.num_rows, step):
        stop = min(start + step, shard.num_rows)
        tables = [_read(folder, segment, start, stop, schema) for segment in segments]
        yield _latest([*tables, pending], shard, start, stop)


def _latest(tables: Sequence[pa.Table], shard: Shard, start: int, stop: int) -> pa.Table:
    """Return each row in `start:stop` once, by the rule of `merge_segments`."""
    table = pa.concat_tables(tables)
    offsets = _row_offsets(table, shard)
    # lexsort is stable: with equal attempts the earlier segment stays first.
    by_attempts = np.lexsort((-table.column("attempts").to_numpy(), offsets))
    rows, firsts = np.unique(offsets[by_attempts], return_index=True)
    places = by_attempts[firsts][(start <= rows) & (rows < stop)]
    assert len(places) == stop - start, f"shard {shard.index} lacks rows in {start}:{stop}"
    return _take(table, places)


def latest_segments(segments: Sequence[Segment]) -> dict[int, Segment]:
    """Return for each row the segment that is used, by the rule of `merge_segments`."""
    found: dict[int, Segment] = {}
    for segment in segments:
        for row in segment.rows:
            if row not in found or segment.attempts(row) > found[row].attempts(row):
                found[row] = segment
    return found


def read_segment(
    folder: OutputFolder,
    path: Path,
    shard: Shard,
    schema: pa.Schema,
    *,
    merged: str | None = None,
) -> Segment:
    """Read a segment, or a shard's part, completely and return the index of its content.

    Args:
        merged: the mark of a merged part, in which rows of other shards are skipped.

    Raises:
        UnreadableSegment: the file is damaged, missing, or not of this run and shard.
    """
    marks = dict(schema.metadata)
    if merged is not None:
        marks[SHARD_KEY] = merged.encode()
    try:
        with folder.open(path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            metadata = parquet.schema_arrow.metadata or {}
            for key in (FINGERPRINT_KEY, SHARD_KEY):
                if metadata.get(key) != marks[key]:
                    raise UnreadableSegment(f"{key.decode()} is not that of this run and shard")
            rows: set[int] = set()
            groups = []
            retried: dict[int, int] = {}
            errors: dict[int, str] = {}
            size_bytes = 0
            for group in range(parquet.num_row_groups):
                if merged is not None and not _may_hold(parquet.metadata, group, shard):
                    groups.append((0, -1))
                    continue
                table = _check_schema(parquet.read_row_group(group), schema)
                if merged is not None:
                    table = _rows_of(table, shard)
                places = _row_offsets(table, shard)
                offsets = places.tolist()
                if not all(0 <= row < shard.num_rows for row in offsets):
                    raise UnreadableSegment("it holds rows of another shard")
                rows.update(offsets)
                group_retried, group_errors = _outcomes(table, places)
                retried |= group_retried
                errors |= group_errors
                groups.append((min(offsets, default=0), max(offsets, default=-1)))
                size_bytes += table.nbytes
    except (OSError, pa.ArrowException) as error:
        raise UnreadableSegment(str(error)) from error
    return Segment(
        path=path,
        rows=frozenset(rows),
        size_bytes=size_bytes,
        groups=tuple(groups),
        retried=retried,
        errors=errors,
    )


def _may_hold(metadata: pq.FileMetaData, group: int, shard: Shard) -> bool:
    """Whether a row group may hold rows of a shard, by the footer's statistics."""
    stats = column_statistics(metadata.row_group(group), "row_index")
    if stats is None or not stats.has_min_max:
        return True
    stop = shard.first_row_index + shard.num_rows
    return bool(stats.min < stop and shard.first_row_index <= stats.max)


def column_statistics(group: Any, name: str) -> Any | None:
    """Return a column's statistics in the metadata of a row group; None if it has none."""
    columns = (group.column(i) for i in range(group.num_columns))
    return next((c.statistics for c in columns if c.path_in_schema == name), None)


def _rows_of(table: pa.Table, shard: Shard) -> pa.Table:
    """Return the rows of a shard from a table that is in input order."""
    low, high = np.searchsorted(_row_offsets(table, shard), [0, shard.num_rows])
    return table.slice(low, high - low)


def replace_rows(
    folder: OutputFolder,
    path: Path,
    answers: Iterator[tuple[Shard, Sequence[Segment]]],
    pending: pa.Table,
    schema: pa.Schema,
) -> Iterator[pa.Table]:
    """Yield every row of a part in input order, those of some shards as last answered.

    One row group of the part is in memory at a time, and what the segments have of its rows.

    Args:
        answers: shards of the part in input order, each read when its rows are reached, with
            segments that hold some of its rows; see `merge_segments`.
        pending: rows of these shards that are in no segment yet.
        schema: schema of the part.

    Raises:
        UnreadablePart: the part is damaged or missing.
        UnreadableSegment: a segment that was readable before is not any more.
    """
    current = next(answers, None)
    try:
        with folder.open(path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group).replace_schema_metadata(None)
                done = 0
                while current is not None:
                    shard, segments = current
                    offsets = _row_offsets(table, shard)
                    low, high = np.searchsorted(offsets, [0, shard.num_rows])
                    if low < high:
                        start, stop = int(offsets[low]), int(offsets[high - 1]) + 1
                        retried = [_read(folder, s, start, stop, schema) for s in segments]
                        if pending.num_rows or any(t.num_rows for t in retried):
                            if done < low:
                                yield table.slice(done, low - done)
                            ours = table.slice(low, high - low)
                            yield _latest([*retried, ours, pending], shard, start, stop)
                            done = high
                    if high == table.num_rows:
                        break  # the next row group may hold more of its rows
                    current = next(answers, None)
                if done < table.num_rows:
                    yield table.slice(done)
    except (OSError, pa.ArrowException) as error:
        raise UnreadablePart(str(error)) from error
    assert next(answers, None) is None, f"{path} lacks rows of a shard"


def _outcomes(
    table: pa.Table, offsets: npt.NDArray[np.int64]
) -> tuple[dict[int, int], dict[int, str]]:
    attempts = table.column("attempts").to_numpy()
    errors = table.column("error_type").to_pylist()
    return (
        {int(offsets[i]): int(attempts[i]) for i in np.flatnonzero(attempts > 1)},
        {int(offsets[i]): kind for i, kind in enumerate(errors) if kind is not None},
    )


def _read(
    folder: OutputFolder, segment: Segment, start: int, stop: int, schema: pa.Schema
) -> pa.Table:
    """Read the whole row groups of a segment that have rows in `start:stop`."""
    groups = [i for i, (low, high) in enumerate(segment.groups) if low < stop and start <= high]
    if not groups:
        return schema.empty_table()
    try:
        with folder.open(segment.path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            return _check_schema(parquet.read_row_groups(groups), schema)
    except (OSError, pa.ArrowException) as error:
        raise UnreadableSegment(f"{segment.path}: {error}") from error


def _check_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    if not table.schema.equals(schema):
        raise UnreadableSegment("it has other columns")
    return table


def _row_offsets(table: pa.Table, shard: Shard) -> npt.NDArray[np.int64]:
    column = table.column("row_index")
    if column.null_count:
        raise UnreadableSegment("a row has no row_index")
    offsets: npt.NDArray[np.int64] = column.to_numpy() - shard.first_row_index
    return offsets


def _take(table: pa.Table, places: npt.NDArray[np.intp]) -> pa.Table:
    try:
        return table.take(places)
    except pa.ArrowException:
        # pyarrow 26 cannot take from string_view columns, nor from binary ones of more than the
        # 2 GiB that their offsets span. Slices copy nothing, but thousands of them are slow to
        # write.
        return pa.concat_tables([table.slice(place, 1) for place in places.tolist()])
