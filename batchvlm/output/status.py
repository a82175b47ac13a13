"""The progress of a job, running or dead, from its folder alone."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.errors import OutputError
from batchvlm.output.disk import is_gone
from batchvlm.output.folder import OutputFolder, Part
from batchvlm.output.verify import open_run

_METRICS = re.compile(r"task-(\d+)-rank-(\d+)-.*\.json")
_LIVE_S = 60.0
"""A live process writes its counts at least this often, unless `output.flush_every_s` is longer."""


@dataclass(frozen=True, kw_only=True)
class Silent:
    """A process that died, hangs, or cannot reach the folder."""

    name: str
    """Task and rank."""
    where: str
    """Machine and SLURM job, as far as known."""
    silent_s: float
    """Seconds since it last wrote its counts."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """The progress of a job; see `status`."""

    num_rows: int
    num_done: int
    """Rows in parts and in segments."""
    num_in_segments: int
    num_shards: int
    num_finished: int
    """Shards that are in a readable part."""
    damaged: list[str]
    """Parts that cannot be read; their rows count as not done."""
    num_waiting: int
    """Rows that were answered again and are put into parts by the next run with `retry.errors`."""
    errors: Counter[str]
    """Failed rows by error type."""
    rows_per_s: float
    """Sum over the live processes."""
    num_live: int
    num_over: int
    """Processes that ended by themselves; only the latest of each task and rank counts."""
    silent: list[Silent]
    """Processes that have not ended and have not written for long, the longest silence first."""
    written_s_ago: float | None
    """Seconds since the last write of any file; None if there is no file."""
    fingerprint: str

    @property
    def state(self) -> str:
        """`running`, `stopped` or `done`."""
        if self.num_live:
            return "running"
        if self.num_done == self.num_rows:
            return "done"
        # The first process of a job writes no counts for a while after its start.
        is_new = not self.num_over and not self.silent and self.written_s_ago is not None
        return "running" if is_new and (self.written_s_ago or 0) < _LIVE_S else "stopped"


def status(folder: OutputFolder, *, now_s: Callable[[], float] = time.time) -> JobStatus:
    """Return the progress of a job, running or dead, from its folder alone.

    Raises:
        InputError: the folder holds no run.
        OutputError: the folder cannot be read.
    """
    run = open_run(folder)
    num_shards = len(run.plan)
    parts = folder.parts(num_shards)
    errors: Counter[str] = Counter()
    damaged: list[Part] = []
    for part in parts:
        try:
            errors.update(kind for _, kind, _ in _read_outcomes(folder, part.path))
        except (OSError, pa.ArrowException) as error:
            if not is_gone(error):  # `compact` or a retry has just replaced it
                damaged.append(part)
    whole = [part for part in parts if part not in damaged]
    finished = {index for part in whole for index in part.shards}
    in_parts = sum(run.plan[index].num_rows for index in finished)
    in_segments = num_waiting = 0
    for index in folder.shards_with_segments():
        if index not in finished:
            rows = outcomes_in_segments(folder, index)
            in_segments += len(rows)
            errors.update(rows.values())
    for index in folder.shards_with_segments(is_retry=True):
        num_waiting += len(outcomes_in_segments(folder, index, is_retry=True))
    del errors[""]
    workers = _latest(folder, now_s())
    running = [worker for worker in workers if not worker.counts.get("is_over")]
    live = [worker.counts for worker in running if not worker.is_silent]
    latest = max(_written_at(folder), default=None)
    return JobStatus(
        num_rows=sum(shard.num_rows for shard in run.plan),
        num_done=in_parts + in_segments,
        num_in_segments=in_segments,
        num_shards=num_shards,
        num_finished=len(finished),
        damaged=[part.path.name for part in damaged],
        num_waiting=num_waiting,
        errors=errors,
        rows_per_s=sum(float(m.get("rows_per_s", 0)) for m in live),
        num_live=len(live),
        num_over=len(workers) - len(running),
        silent=sorted(
            (
                Silent(name=w.name, where=str(w.counts.get("where", "")), silent_s=w.age_s)
                for w in running
                if w.is_silent
            ),
            key=lambda silent: -silent.silent_s,
        ),
        written_s_ago=None if latest is None else max(0.0, now_s() - latest),
        fingerprint=run.fingerprint,
    )


def outcomes_in_segments(
    folder: OutputFolder, index: int, *, is_retry: bool = False
) -> dict[int, str]:
    """Return the error type of each row in a shard's segments, by row index; "" for no error.

    For a row in several segments the rule of `output.segments` applies. Segments that are missing
    or damaged are skipped.
    """
    found: dict[int, tuple[str, int]] = {}
    for path in folder.list_segments(index, is_retry=is_retry):
        with suppress(OSError, pa.ArrowException):
            for row, kind, attempts in _read_outcomes(folder, path):
                if row not in found or attempts > found[row][1]:
                    found[row] = kind, attempts
    return {row: kind for row, (kind, _) in found.items()}


def _read_outcomes(folder: OutputFolder, path: Path) -> list[tuple[int, str, int]]:
    with folder.open(path) as file:
        table = pq.ParquetFile(file).read(columns=["row_index", "error_type", "attempts"])
    kinds = (kind or "" for kind in table["error_type"].to_pylist())
    rows, attempts = table["row_index"].to_pylist(), table["attempts"].to_pylist()
    return list(zip(rows, kinds, attempts, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Worker:
    name: str
    counts: dict[str, Any]
    age_s: float

    @property
    def is_silent(self) -> bool:
        # The process's own setting: a rerun may have another one than the first run.
        flush_every_s = self.counts.get("flush_every_s")
        every_s = flush_every_s if isinstance(flush_every_s, int | float) else 0.0
        return self.age_s >= max(_LIVE_S, 2 * every_s)


def _latest(folder: OutputFolder, now_s: float) -> list[_Worker]:
    """Return the counts of the latest process of each task and rank."""
    latest: dict[str, _Worker] = {}
    # File names end with the start time, so later processes overwrite earlier ones here.
    for path, written_s in folder.written(folder.metrics):
        match = _METRICS.fullmatch(path.name)
        try:
            counts = json.loads(folder.read_bytes(path) or b"") if match else None
        except (OutputError, ValueError):
            continue
        if match and isinstance(counts, dict):
            name = f"task {int(match[1])} rank {int(match[2])}"
            latest[name] = _Worker(name=name, counts=counts, age_s=max(0.0, now_s - written_s))
    return list(latest.values())


def _written_at(folder: OutputFolder) -> Iterator[float]:
    for place in (folder.data, folder.metrics, folder.segments, folder.retries):
        yield from (written_s for _, written_s in folder.written(place))
