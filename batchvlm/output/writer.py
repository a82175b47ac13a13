"""Write one shard: results arrive in any order, are flushed to segments, and become one part."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.config import RetryConfig
from batchvlm.errors import OutputError
from batchvlm.output.disk import is_gone, new_attempt
from batchvlm.output.folder import OutputFolder, Part
from batchvlm.output.schema import Provenance, to_table
from batchvlm.output.segments import (
    FINGERPRINT_KEY,
    Segment,
    UnreadablePart,
    UnreadableSegment,
    latest_segments,
    merge_segments,
    read_segment,
    read_segments,
    replace_rows,
    with_marks,
    write_segment,
    write_tables,
)
from batchvlm.records import Result, Shard, size_of_value

_MAX_PENDING_BYTES = 64 << 20
"""Pending rows are flushed at this size, because kept columns may hold images."""

NO_RETRY = RetryConfig()


class Answered(NamedTuple):
    """A finished shard of which rows were answered again."""

    shard: Shard
    paths: frozenset[Path]
    """Segments that this writer found or wrote; they hold those rows."""


def is_retried(retry: RetryConfig, error_type: str | None, attempts: int) -> bool:
    """Whether a row with this outcome must be answered again."""
    return error_type in retry.errors and attempts < retry.max_attempts


class ShardWriter:
    """Takes each row of a shard once, in any order, and writes them to disk as one part.

    A process killed at any instant loses at most the rows added since the last flush: open a new
    writer on the shard and add the rows that are not in `finished_rows`. Two writers of one shard,
    on any machines, waste work but produce a correct part. Not thread-safe.

    Flushed rows are not kept in memory; `commit` reads them back, one row group at a time. So
    memory depends on the row groups and the flush interval rather than the shard, and every run
    uses the code path by which a resumed run reads.

    Args:
        schema: from `output_schema`.
        provenance: its fingerprint decides which segments are of this run.
        flush_every_s: seconds between flushes; checked by `add` and `flush_if_due`.
        flush_every_rows: number of pending rows that causes a flush; None for no limit.
        retry: which failed rows must be answered again.
        clock: returns monotonic seconds.

    Raises:
        OutputError: the folder cannot be read, or the shard's part is damaged or of another run.
    """

    finished_rows: frozenset[int]
    """Offsets of the rows that need no answer: earlier attempts answered them. With a part these
    are all rows, except those that `retry` asks for."""
    attempts: dict[int, int]
    """The next value of `attempts` for each row that must be answered again."""
    found_errors: Counter[str]
    """Error types of the rows in `finished_rows`; empty if the shard has a part and no retry."""

    def __init__(
        self,
        folder: OutputFolder,
        shard: Shard,
        num_shards: int,
        schema: pa.Schema,
        provenance: Provenance,
        *,
        flush_every_s: float,
        flush_every_rows: int | None = None,
        retry: RetryConfig = NO_RETRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._shard = shard
        self._num_shards = num_shards
        self._part = folder.part(shard.index, num_shards)
        self._schema = with_marks(
            schema, fingerprint=provenance.fingerprint, shard_index=shard.index
        )
        self._provenance = provenance
        self._flush_every_s = flush_every_s
        self._flush_every_rows = flush_every_rows or sys.maxsize
        self._retry = retry
        self._clock = clock

        self._is_finished = self._find_part() is not None
        # Retried rows of a finished shard are flushed to a separate folder, which runs without
        # `retry.errors` neither read nor remove.
        self._is_retry = self._is_finished and bool(retry.errors)
        self.attempts: dict[int, int] = {}
        self._segments: list[Segment] = []
        self.finished_rows = frozenset(range(shard.num_rows))
        self.found_errors = Counter()
        if self._is_finished and not self._is_retry:
            folder.remove_segments(shard.index)
        else:
            self._find_rows()

        self._rows = set(self.finished_rows)
        self._pending: list[Result] = []
        self._pending_bytes = 0
        self._attempt = new_attempt()
        self._num_flushes = 0
        self._flushed_at_s = clock()

    def add(self, result: Result) -> None:
        """Add one row; flush if that is due by time, number of rows or size.

        Raises:
            OutputError: the flush failed; all rows stay pending.
        """
        assert 0 <= result.row < self._shard.num_rows, f"row {result.row} is not of the shard"
        assert result.row_index == self._shard.first_row_index + result.row
        assert result.row not in self._rows, f"row {result.row} is there already"
        self._rows.add(result.row)
        self._pending.append(result)
        self._pending_bytes += size_of_value(result.kept)
        is_due = self._clock() - self._flushed_at_s >= self._flush_every_s
        is_full = len(self._pending) >= self._flush_every_rows
        if is_due or is_full or self._pending_bytes >= _MAX_PENDING_BYTES:
            self.flush()

    def flush_if_due(self) -> None:
        """Flush if `flush_every_s` has passed since the last flush.

        Raises:
            OutputError: the file system refuses; all rows stay pending.
        """
        if self._clock() - self._flushed_at_s >= self._flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Write all pending rows to disk as a segment.

        Raises:
            OutputError: the file system refuses; all rows stay pending.
        """
        if self._pending:
            # Counted before writing, so that no name is used twice, even if writing fails.
            path = self._folder.segment(
                self._shard.index, self._attempt, self._num_flushes, is_retry=self._is_retry
            )
            self._num_flushes += 1
            table = self._pending_table()
            self._segments.append(write_segment(self._folder, path, table, self._shard))
            self._pending.clear()
            self._pending_bytes = 0
        self._flushed_at_s = self._clock()

    def commit(self) -> Path:
        """Write the part, with all rows in input order, and remove the shard's segments.

        If another writer finished the shard meanwhile, its part stays; only rows that this writer
        tried more often replace those in it.

        Returns:
            The part's path.

        Raises:
            OutputError: the file system refuses, or a segment cannot be read any more. No flushed
                row is lost, and no part is incomplete.
        """
        num_missing = self._shard.num_rows - len(self._rows)
        assert num_missing == 0, f"shard {self._shard.index} lacks {num_missing} rows"
        part = self._find_part()
        if part is None:
            lost: UnreadableSegment | None = None
            try:
                if self._write_part(self._segments):
                    self._folder.remove_segments(self._shard.index)
                    return self._part
            except UnreadableSegment as error:
                # The writer that finishes a shard removes its segments, including other writers'.
                lost = error
            part = self._find_part()
            if part is None:
                raise _lost_segment(lost or UnreadableSegment(f"{self._part} was removed"))
        if self._is_retry or self.attempts:
            answered, pending = {self._shard.index: self._answered()}, self._pending_table()
            while not update_part(
                self._folder, answered, self._num_shards, self._schema, self._provenance, pending
            ):
                pass
        self._folder.remove_segments(self._shard.index)
        return part.path

    def leave_to_update(self) -> Answered | None:
        """Flush all rows, if they are to be put into a merged part, which `update_part` does.

        Returns:
            None if they are not, and `commit` is to be called.

        Raises:
            OutputError: as for `flush`.
        """
        if not self._is_retry:
            return None
        part = self._folder.find_part(self._shard.index, self._num_shards)
        if part is None or len(part.shards) == 1:
            return None
        self.flush()
        return self._answered()

    def _answered(self) -> Answered:
        return Answered(self._shard, frozenset(segment.path for segment in self._segments))

    def _find_part(self) -> Part | None:
        fingerprint = self._provenance.fingerprint
        return _find_part(self._folder, self._shard.index, self._num_shards, fingerprint)

    def _find_rows(self) -> None:
        """Read the rows on disk and separate those that must be answered again."""
        self._segments = read_segments(
            self._folder, self._shard, self._schema, is_retry=self._is_retry
        )
        rows = latest_segments([*self._segments, *self._read_parts()])
        for row, segment in rows.items():
            kind = segment.errors.get(row)
            if is_retried(self._retry, kind, segment.attempts(row)):
                self.attempts[row] = segment.attempts(row) + 1
            elif kind is not None:
                self.found_errors[kind] += 1
        self.finished_rows = frozenset(rows.keys() - self.attempts.keys())

    def _read_parts(self) -> list[Segment]:
        """Return the shard's part as a segment; an empty list if there is no part."""
        part = self._folder.find_part(self._shard.index, self._num_shards)
        if part is None:
            return []
        merged = part.mark if len(part.shards) > 1 else None
        try:
            return [read_segment(self._folder, part.path, self._shard, self._schema, merged=merged)]
        except UnreadableSegment as error:
            raise self._folder.damaged(part.path, error) from error

    def _write_part(self, segments: Sequence[Segment]) -> bool:
        """Write the shard's first part.

        Returns:
            False if another process has just written one.
        """
        pending, schema = self._pending_table(), self._schema
        tables = merge_segments(self._folder, segments, pending, self._shard, schema)

        def write(file: BinaryIO) -> None:
            write_tables(tables, file, schema)

        return self._folder.commit_part(write, self._shard.index, self._num_shards)

    def _pending_table(self) -> pa.Table:
        rows = sorted(self._pending, key=lambda result: result.row)
        return to_table(rows, self._schema, self._provenance)


def update_part(
    folder: OutputFolder,
    answered: Mapping[int, Answered],
    num_shards: int,
    schema: pa.Schema,
    provenance: Provenance,
    pending: pa.Table | None = None,
) -> list[int]:
    """Rewrite the part of the first of these shards once, for all of them that it holds.

    It also takes the segments of other writers of these shards, because it removes all of them.

    Args:
        answered: by index, finished shards that were answered again.
        schema: from `output_schema`.
        pending: rows of these shards that are in no segment yet.

    Returns:
        Indices of the shards in the part; none if another writer removed a segment meanwhile: call
        it again.

    Raises:
        OutputError: the file system refuses, or the part or a segment of this writer cannot be
            read any more. The part is as it was, and the segments stay for the next run.
    """
    pending = schema.empty_table() if pending is None else pending
    # The lock keeps two retries of one part from both reading it before either writes.
    with folder.lock():
        first = min(answered)
        part = _find_part(folder, first, num_shards, provenance.fingerprint)
        if part is None:
            raise _lost_segment(UnreadableSegment(f"the part of shard {first} was removed"))
        indices = [index for index in sorted(answered) if index in part.shards]
        # Damaged ones are removed too: nothing can read them, and their rows stay as the part has
        # them.
        used = {path for i in indices for path in folder.list_segments(i, is_retry=True)}
        own = {path for i in indices for path in answered[i].paths}
        used |= {path for path in own - used if folder.exists(path)}

        def answers() -> Iterator[tuple[Shard, list[Segment]]]:
            for index in indices:
                shard, paths = answered[index]
                marked = with_marks(schema, fingerprint=provenance.fingerprint, shard_index=index)
                segments = read_segments(folder, shard, marked, is_retry=True)
                # Whoever merges segments removes them. So some of this writer's may already be in
                # the part; those that are there must be readable.
                for path in sorted(paths & used - {segment.path for segment in segments}):
                    try:
                        segments.append(read_segment(folder, path, shard, marked))
                    except UnreadableSegment as error:
                        raise UnreadableSegment(f"{path}: {error}") from error
                used.update(segment.path for segment in segments)
                yield shard, segments

        def write(file: BinaryIO) -> None:
            with folder.open(part.path) as old:
                whole = schema.with_metadata(pq.read_schema(old).metadata)
            write_tables(replace_rows(folder, part.path, answers(), pending, schema), file, whole)

        try:
            if used or pending.num_rows:
                folder.commit_file(write, part.path)
        except UnreadablePart as error:
            raise folder.damaged(part.path, error) from error
        except UnreadableSegment as error:
            if all(folder.exists(path) for path in used):
                raise _lost_segment(error) from error
            return []
        for index in indices:
            folder.remove_segments(index, is_retry=True, only=used)
    return indices


def _find_part(folder: OutputFolder, index: int, num_shards: int, fingerprint: str) -> Part | None:
    """Return the part that holds a shard; None if there is none.

    Raises:
        OutputError: the part is damaged, or by its footer of another run.
    """
    part = folder.find_part(index, num_shards)
    if part is None:
        return None
    try:
        with folder.open(part.path) as file:
            marks = pq.ParquetFile(file).schema_arrow.metadata or {}
    except (OSError, pa.ArrowException) as error:
        if is_gone(error):
            return part  # `compact` or a retry has just replaced it
        raise folder.damaged(part.path, error) from error
    if marks.get(FINGERPRINT_KEY) != fingerprint.encode():
        # The run that was overwritten wrote it late, on a file system without locks.
        raise OutputError(
            f"{part.path} is of another run",
            hint="delete it and run the same command again: its rows are computed again",
        )
    return part


def _lost_segment(error: UnreadableSegment) -> OutputError:
    return OutputError(
        f"cannot read a segment any more: {error}",
        hint="run the same command again: its rows are computed again",
    )
