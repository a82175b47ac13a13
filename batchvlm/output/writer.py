"""One shard: results in any order -> segments while it lasts -> one part, in input order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from batchvlm.errors import OutputError
from batchvlm.output.folder import OutputFolder, new_attempt
from batchvlm.output.schema import Provenance, to_table
from batchvlm.output.segments import (
    UnreadableSegment,
    in_order,
    read_segments,
    with_marks,
    write_segment,
    write_tables,
)
from batchvlm.records import Result, Shard, size_of_value

_MAX_PENDING_BYTES = 64 << 20
"""Kept columns may hold images: rows are flushed before these fill the memory."""


class ShardWriter:
    """Takes each row of a shard once, in any order, and leaves them on disk as one part.

    A kill at any instant costs at most the rows added since the last flush: open a writer on the
    shard again and add what is not in `finished_rows`. Two writers of one shard, on any machines,
    waste work but leave a right part. Not for several threads.

    Flushed rows are not kept in memory, but read back for the part, one row group at a time: so
    memory follows the row groups and the flush interval rather than the shard, and the way on
    which a resumed run reads is taken by every run.

    Args:
        schema: from `output_schema`.
        provenance: its fingerprint decides which segments are of this run.
        flush_every_s: seconds between flushes; `add` looks at the clock.
        flush_every_rows: rows that wait for a flush at most; None: any number.
        clock: seconds, never going backwards.

    Raises:
        OutputError: the folder cannot be read.
    """

    finished_rows: frozenset[int]
    """Offsets of the rows that earlier attempts answered; all of them where the part is there."""

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._shard = shard
        self._part = folder.part(shard.index, num_shards)
        self._schema = with_marks(
            schema, fingerprint=provenance.fingerprint, shard_index=shard.index
        )
        self._provenance = provenance
        self._flush_every_s = flush_every_s
        self._flush_every_rows = flush_every_rows or sys.maxsize
        self._clock = clock

        self._is_finished = folder.exists(self._part)
        # Rows that a retry shall answer again would leave `finished_rows` here and nowhere else,
        # with the part they are in as the last of the segments: earlier ones win.
        if self._is_finished:
            folder.remove_segments(shard.index)
            self._segments = []
            self.finished_rows = frozenset(range(shard.num_rows))
        else:
            self._segments = read_segments(folder, shard, self._schema)
            self.finished_rows = frozenset[int]().union(*(s.rows for s in self._segments))

        self._rows = set(self.finished_rows)
        self._pending: list[Result] = []
        self._pending_bytes = 0
        self._attempt = new_attempt()
        self._num_flushes = 0
        self._flushed_at_s = clock()

    def add(self, result: Result) -> None:
        """Take one row; flush if it is time.

        Raises:
            OutputError: it was time, and the file system refuses; no row is forgotten.
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

    def flush(self) -> None:
        """Bring every row added so far to disk.

        Raises:
            OutputError: the file system refuses; the rows stay, to be flushed later.
        """
        if self._pending:
            # Counted before it is written: a name is never used twice, even if writing fails.
            path = self._folder.segment(self._shard.index, self._attempt, self._num_flushes)
            self._num_flushes += 1
            table = self._pending_table()
            self._segments.append(write_segment(self._folder, path, table, self._shard))
            self._pending.clear()
            self._pending_bytes = 0
        self._flushed_at_s = self._clock()

    def commit(self) -> Path:
        """Write the part, of all rows in input order, and remove the shard's segments.

        Where another writer finished the shard meanwhile, its part stands: both are right.

        Returns:
            The part's path.

        Raises:
            OutputError: the file system refuses; nothing is lost, and nothing half-written.
        """
        num_missing = self._shard.num_rows - len(self._rows)
        assert num_missing == 0, f"shard {self._shard.index} lacks {num_missing} rows"
        if self._is_finished or self._folder.exists(self._part):
            self._folder.remove_segments(self._shard.index)
            return self._part
        tables = in_order(
            self._folder, self._segments, self._pending_table(), self._shard, self._schema
        )
        try:
            self._folder.commit_file(
                lambda file: write_tables(tables, file, self._schema), self._part
            )
        except UnreadableSegment as error:
            # Whoever finishes a shard removes its segments, also those of other writers.
            if not self._folder.exists(self._part):
                raise OutputError(
                    f"cannot read a segment any more: {error}",
                    hint="run the same command again: its rows are computed again",
                ) from error
        self._folder.remove_segments(self._shard.index)
        return self._part

    def _pending_table(self) -> pa.Table:
        rows = sorted(self._pending, key=lambda result: result.row)
        return to_table(rows, self._schema, self._provenance)
