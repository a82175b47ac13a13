"""Checks and error counts of finished parts, from their footers where these suffice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchvlm.config import RetryConfig
from batchvlm.errors import FingerprintError, OutputError
from batchvlm.output.disk import is_gone
from batchvlm.output.folder import OutputFolder, Part
from batchvlm.output.run_file import RunFile
from batchvlm.output.segments import FINGERPRINT_KEY, SHARD_KEY, column_statistics
from batchvlm.output.writer import is_retried
from batchvlm.records import Shard, shard_of
from batchvlm.words import one_line

_NUM_THREADS = 8
"""Reading a footer from a network file system is mostly waiting."""


Failures = Counter[tuple[int, str, int]]
"""(index of a shard, error type, attempts) -> rows of its part that failed."""


def failures_in_parts(
    folder: OutputFolder, plan: Sequence[Shard], fingerprint: str, wanted: Collection[int]
) -> Failures:
    """Check the parts of finished shards against their names and the plan; count failed rows.

    Reads each part's footer once, and three columns of parts that hold failed rows.

    Args:
        plan: all shards of the run.
        fingerprint: the run's.
        wanted: indices of the shards to look at.

    Raises:
        OutputError: a part is damaged, of another run, or of other shards than its name says.
    """
    failures: Failures = Counter()
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for found in threads.map(
            lambda part: _look(folder, plan, fingerprint, part), _parts_of(folder, plan, wanted)
        ):
            failures.update(found)
    return Counter({key: num for key, num in failures.items() if key[0] in wanted})


def check_parsed_type(
    folder: OutputFolder, run: RunFile, schema: pa.Schema, finished: Collection[int]
) -> None:
    """Refuse to add parts whose column `parsed` has another type than in the parts that are there.

    Another release may have derived another type from the same form. All parts have one type, so
    the footer of one is enough.

    Args:
        schema: schema of the parts to add.
        finished: indices of shards that have a part, as far as they are known.

    Raises:
        FingerprintError: the types differ.
    """
    wanted = schema.field("parsed").type
    # By name: a slice of an array does not list the parts of all the others.
    for part in folder.parts(len(run.plan), {min(finished, default=0)}):
        # Other checks report damaged files.
        with suppress(OSError, pa.ArrowException), folder.open(part.path) as file:
            found = pq.ParquetFile(file).schema_arrow.field("parsed").type
            if found != wanted:
                raise FingerprintError(
                    f"{folder}: the column parsed is {one_line(found)} in its parts, and "
                    f"{one_line(wanted)} by this release",
                    hint="name another output.dir, or go on with the release that began it",
                )
            return


def _look(folder: OutputFolder, plan: Sequence[Shard], fingerprint: str, part: Part) -> Failures:
    try:
        with folder.open(part.path) as file:
            parquet = pq.ParquetFile(file)
            _check_marks(parquet, plan, fingerprint, part)
            if not _has_errors(parquet.metadata):
                return Counter()
            table = parquet.read(columns=["row_index", "error_type", "attempts"])
    except (OSError, pa.ArrowException) as error:
        if is_gone(error):
            return Counter()  # `compact` or a retry has just replaced it
        raise folder.damaged(part.path, error) from error
    table = table.filter(pc.is_valid(table["error_type"]))
    outcomes = (table[name].to_pylist() for name in ("error_type", "attempts"))
    return Counter(zip(_shards_of(table, plan, part), *outcomes, strict=True))


def _shards_of(table: pa.Table, plan: Sequence[Shard], part: Part) -> list[int]:
    """Return the index of each row's shard."""
    # Only the part's own shards: the whole plan for each part would be quadratic.
    starts = [shard.first_row_index for shard in plan[part.first : part.last + 1]]
    places = np.searchsorted(starts, table["row_index"].to_numpy(), side="right") - 1
    indices: list[int] = (part.first + places).tolist()
    return indices


def shards_to_retry(
    folder: OutputFolder, failures: Failures, wanted: Collection[int], retry: RetryConfig
) -> set[int]:
    """Return finished shards with rows to answer again, or with answers not yet in their part.

    Args:
        failures: those in the parts of these shards.
        wanted: indices of the shards to look at.
    """
    waiting = {
        index
        for index in folder.shards_with_segments(is_retry=True)
        if index in wanted and folder.list_segments(index, is_retry=True)
    }
    failed = {index for index, kind, attempts in failures if is_retried(retry, kind, attempts)}
    return (waiting | failed).intersection(wanted)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Numbers of rows with an error that `retry.errors` names."""

    num_again: int
    """Rows to answer again."""
    num_given_up: int
    """Rows that have already been tried `retry.max_attempts` times."""


def count_failed(
    folder: OutputFolder,
    plan: Sequence[Shard],
    failures: Failures,
    wanted: Collection[int],
    retry: RetryConfig,
) -> Failed:
    """Count the failed rows that a run with `retry` answers again, and those it does not.

    Reads segments, and again the parts of shards that have some: a row's latest attempt counts.
    Unreadable files are skipped.

    Args:
        plan: all shards of the run.
        failures: those in the parts of these shards.
        wanted: indices of the shards to count.
    """
    segments = [
        (index, path)
        for is_retry in (False, True)
        for index in folder.shards_with_segments(is_retry=is_retry)
        if index in wanted
        for path in folder.list_segments(index, is_retry=is_retry)
    ]
    begun = {index for index, _ in segments}
    parts = {part.path for part in _parts_of(folder, plan, begun)}
    latest: dict[int, tuple[int, str]] = {}
    for path in [*parts, *(path for _, path in segments)]:
        # The rows of a file that vanished are in another one; other checks report damaged files.
        with suppress(OSError, pa.ArrowException), folder.open(path) as file:
            parquet = pq.ParquetFile(file)
            if path in parts and not _has_errors(parquet.metadata):
                continue
            table = parquet.read(["row_index", "attempts", "error_type"])
            # Drop rows that were answered at the first attempt: most of them.
            is_failed = pc.is_valid(table["error_type"])
            table = table.filter(pc.or_(is_failed, pc.greater(table["attempts"], 1)))
            for row, attempts, kind in zip(*(c.to_pylist() for c in table.columns), strict=True):
                latest[row] = max(latest.get(row, (0, "")), (attempts, kind or ""))
    tried: Counter[int] = Counter()
    for row, (attempts, kind) in latest.items():
        if kind in retry.errors and shard_of(plan, row).index in begun:
            tried[attempts] += 1
    for (index, kind, attempts), num_rows in failures.items():
        if kind in retry.errors and index in wanted and index not in begun:
            tried[attempts] += num_rows
    num_again = sum(num for attempts, num in tried.items() if attempts < retry.max_attempts)
    return Failed(num_again=num_again, num_given_up=tried.total() - num_again)


def _parts_of(folder: OutputFolder, plan: Sequence[Shard], wanted: Collection[int]) -> list[Part]:
    """Return the parts that hold at least one of these shards."""
    parts = folder.parts(len(plan), wanted)
    return [part for part in parts if any(index in wanted for index in part.shards)]


def _check_marks(
    parquet: pq.ParquetFile, plan: Sequence[Shard], fingerprint: str, part: Part
) -> None:
    marks = parquet.schema_arrow.metadata or {}
    shard = marks.get(SHARD_KEY, b"none of its shards").decode()
    num_rows = sum(s.num_rows for s in plan[part.first : part.last + 1])
    if marks.get(FINGERPRINT_KEY) != fingerprint.encode():
        problem = "is of another run"
    elif shard != part.mark:
        problem = f"holds shard {shard}, which is not what its name says"
    elif parquet.metadata.num_rows != num_rows:
        problem = f"has {parquet.metadata.num_rows} rows, its shards {num_rows}"
    else:
        return
    raise OutputError(
        f"{part.path} {problem}",
        hint="delete it and run the same command again: its rows are computed again",
    )


def _has_errors(metadata: pq.FileMetaData) -> bool:
    """Whether any row has an error type, by the footer's null counts; True if these are missing."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        stats = column_statistics(group, "error_type")
        if stats is None or not stats.has_null_count or stats.null_count < group.num_rows:
            return True
    return False
