"""Merge many small parts into few larger ones; `data` is complete at every instant.

The merged parts are written into a new folder, next to hard links to the parts that stay as they
are. One system call then exchanges this folder with `data`, so a listing of `data` shows either the
old parts or the new ones. A process killed before the exchange leaves the old output, one killed
after it the new output; both also leave a folder that nothing reads. A reader that has an old file
open can finish reading it. A reader that opens an old name afterwards gets FileNotFoundError and
must list the folder again.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.errors import OutputError
from batchvlm.output.disk import (
    NO_HARD_LINKS,
    is_full,
    make_folder,
    new_attempt,
    output_error,
    sync_folder,
)
from batchvlm.output.exchange import exchange_data, replaced_path, restore_data
from batchvlm.output.folder import OutputFolder, Part
from batchvlm.output.segments import FINGERPRINT_KEY, SHARD_KEY, write_tables
from batchvlm.output.verify import open_run, verify


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """Numbers of parts before and after `compact`."""

    num_before: int
    num_after: int


def compact(
    folder: OutputFolder, *, target_bytes: int | None = None, target_rows: int | None = None
) -> Compaction:
    """Merge neighbouring parts of a finished job up to a size; larger parts stay as they are.

    Args:
        target_bytes: maximum size of a merged part, as the sum of the sizes of its source parts.
        target_rows: maximum number of rows of a merged part.

    Raises:
        InputError: the folder holds no run.
        OutputError: the job is unfinished or `verify` finds a fault, `data` holds a file that is
            not a part, another process changed `data`, or the file system refuses. `data` is
            unchanged.
    """
    run = open_run(folder)
    folder.check_local("exchanging two folders")
    restore_data(folder)
    if faults := verify(folder).faults:
        raise OutputError(
            f"{folder} is incomplete or damaged: {faults[0]}",
            hint=f"only a finished job is compacted; see batchvlm verify {folder}",
        )
    retried = folder.shards_with_segments(is_retry=True)
    # A killed process may have left an empty folder of segments.
    if pending := [index for index in retried if folder.list_segments(index, is_retry=True)]:
        raise OutputError(
            f"{folder}: rows of {len(pending)} shards were answered again and wait for a run",
            hint="run the command with its retry.errors once more",
        )
    num_shards = len(run.plan)
    parts = folder.parts(num_shards)
    _check_nothing_else(folder, parts)
    aside = folder.inner / f"compact-{new_attempt()}"
    try:
        before = _state(parts)
        groups = list(
            _group(
                parts,
                [sum(s.num_rows for s in run.plan[p.first : p.last + 1]) for p in parts],
                [p.path.stat().st_size for p in parts],
                max_rows=target_rows or sys.maxsize,
                max_bytes=target_bytes or sys.maxsize,
            )
        )
        if len(groups) == len(parts):
            return Compaction(num_before=len(parts), num_after=len(parts))
        make_folder(aside)
        try:
            _merge(folder, groups, aside, num_shards)
            sync_folder(aside)
            _compare([part.path for part in parts], sorted(aside.iterdir()))
            with folder.lock():
                _check_nothing_else(folder, parts)
                if _state(folder.parts(num_shards)) != before:
                    raise OutputError(
                        f"{folder.data} was written to meanwhile",
                        hint="run compact again when no job is at work on the folder",
                    )
                # A reader that finds no part of a shard looks for merged parts only if this file
                # exists.
                folder.commit_file(lambda file: file.write(b""), folder.compacted)
                exchange_data(folder, aside)
        finally:
            # Nothing reads the folder that is aside now, whether it holds new or old parts.
            for path in (aside, replaced_path(aside)):
                with suppress(OSError):
                    shutil.rmtree(path)
    except (OSError, pa.ArrowException) as error:
        if not isinstance(error, OSError):
            error = OSError(errno.EIO, str(error))
        raise output_error("compact", folder.root, error) from error
    return Compaction(num_before=len(parts), num_after=len(groups))


def _check_nothing_else(folder: OutputFolder, parts: Sequence[Part]) -> None:
    """Check that `data` holds nothing but parts: `compact` deletes the folder at the end.

    Raises:
        OutputError: `data` holds another file or folder.
    """
    part_names = {part.path.name for part in parts}
    if others := sorted(name for name in os.listdir(folder.data) if name not in part_names):
        raise OutputError(
            f"{folder.data / others[0]} is no part of the output",
            hint="move it away: compact merges into a new folder, and deletes this one",
        )


def _group(
    parts: Sequence[Part],
    rows: Sequence[int],
    sizes: Sequence[int],
    *,
    max_rows: int,
    max_bytes: int,
) -> Iterator[list[Part]]:
    group: list[Part] = []
    group_rows = group_bytes = 0
    for part, num_rows, size_bytes in zip(parts, rows, sizes, strict=True):
        is_full = group_rows + num_rows > max_rows or group_bytes + size_bytes > max_bytes
        if group and is_full:
            yield group
            group, group_rows, group_bytes = [], 0, 0
        group.append(part)
        group_rows += num_rows
        group_bytes += size_bytes
    if group:
        yield group


def _merge(
    folder: OutputFolder, groups: Sequence[Sequence[Part]], aside: Path, num_shards: int
) -> None:
    try:
        for group in groups:
            first, last = group[0].first, group[-1].last
            path = aside / folder.part(first, num_shards, last).name
            _write_part(folder, group, Part(first, last, path))
    except (OSError, OutputError) as error:
        if not is_full(error):
            raise
        merged = [part.path for group in groups if len(group) > 1 for part in group]
        size_bytes = sum(path.stat().st_size for path in merged)
        raise OutputError(
            f"no room to compact {folder}: the merged parts take {size_bytes:,} bytes beside "
            "the old ones until they are whole",
            hint="make room and run compact again, the output is as it was",
        ) from error


def _state(parts: Sequence[Part]) -> list[tuple[str, int, int]]:
    """Return name, inode and mtime of each part; a retry, which replaces a part, changes them."""
    return [(p.path.name, (stat := p.path.stat()).st_ino, stat.st_mtime_ns) for p in parts]


def _write_part(folder: OutputFolder, group: Sequence[Part], merged: Part) -> None:
    if len(group) == 1:
        try:
            os.link(group[0].path, merged.path)
            return
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
    files = [part.path for part in group]
    marks = dict(pq.read_schema(files[0]).metadata or {})
    marks[SHARD_KEY] = merged.mark.encode()
    assert FINGERPRINT_KEY in marks
    schema = pq.read_schema(files[0]).with_metadata(marks)
    folder.commit_file(lambda file: write_tables(_tables(files), file, schema), merged.path)


def _tables(files: Sequence[Path]) -> Iterator[pa.Table]:
    for path in files:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group).replace_schema_metadata(None)


def _compare(old: Sequence[Path], new: Sequence[Path]) -> None:
    """Check that the new parts hold the row indices of the old ones, in the same order.

    Raises:
        OutputError: they differ.
    """
    pairs = zip(_row_indices(old), _row_indices(new), strict=True)
    if any(a != b for a, b in pairs):
        raise OutputError("the merged parts do not hold the rows of the old ones")


def _row_indices(files: Sequence[Path]) -> Iterator[int]:
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(columns=["row_index"]):
            yield from batch.column(0).to_pylist()
