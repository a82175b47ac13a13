"""Read sample rows that represent the input."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from batchvlm.config import EngineName, JobConfig, OnMismatch
from batchvlm.errors import ConfigError
from batchvlm.pipeline.job import Job, open_job
from batchvlm.records import Record, Shard, shard_of

_NUM_PLACES = 20
_MAX_STREAMED = 1000
"""Rows at the start of a stream from which a preview samples."""
_MAX_S = 20.0
"""Limit for reading the rows of a plan, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Sample rows of the input."""

    records: Sequence[Record]
    num_rows: int
    """Rows of the whole input."""
    num_places: int
    """Number of ranges of adjacent rows that the records are from."""

    @property
    def is_all(self) -> bool:
        return len(self.records) == self.num_rows


def spread(plan: Sequence[Shard], num_rows: int) -> list[Shard]:
    """Return ranges of rows that are evenly spread over the input, about `num_rows` in sum.

    If there are at least as many shards as ranges, ranges start at the start of a shard, because
    Parquet files are read from the start of a row group.
    """
    total = sum(shard.num_rows for shard in plan)
    if total <= num_rows:
        return list(plan)
    num_places = min(_NUM_PLACES, num_rows)
    width = -(-num_rows // num_places)
    pieces: list[Shard] = []
    for i in range(num_places):
        row_index = i * total // num_places
        shard = shard_of(plan, row_index)
        first = 0
        if len(plan) < num_places:
            first = min(row_index - shard.first_row_index, max(0, shard.num_rows - width))
        start = shard.first_row_index + first
        if pieces:  # ranges must not overlap
            start = max(start, pieces[-1].first_row_index + pieces[-1].num_rows)
        first = start - shard.first_row_index
        if first < shard.num_rows:
            pieces.append(shard.piece(first, min(width, shard.num_rows - first)))
    return pieces


def draw_spread(job: Job, num_rows: int, *, clock: Callable[[], float] = time.monotonic) -> Drawn:
    """Read rows that are spread over the input; fewer if reading takes longer than `_MAX_S`."""
    start_s = clock()
    records: list[Record] = []
    pieces = spread(_within_reach(job, num_rows), num_rows)
    # In bit-reversed order: whenever time is up, the ranges read cover the whole input.
    order = sorted(range(len(pieces)), key=lambda i: int(f"{i:032b}"[::-1], 2))
    num_places = 0
    for place in order:
        if num_places and clock() - start_s > _MAX_S:
            break
        records += job.source.read_shard(pieces[place], job.prompt_columns)
        num_places += 1
    records = _with_images(job, sorted(records, key=lambda record: record.row_index))
    return Drawn(
        records=records,
        num_rows=sum(shard.num_rows for shard in job.run.plan),
        num_places=num_places,
    )


def inspect_job(cfg: JobConfig) -> Job:
    """Open and check a job, whatever run its output folder holds.

    Returns:
        The job; `is_overwriting` if the folder holds a run with other settings, whatever
        `output.on_mismatch` is.

    Raises:
        BatchvlmError: as for `open_job`; or `engine=endpoint`, because a server does not provide
            the model's processor.
    """
    if cfg.engine.name is EngineName.endpoint:
        raise ConfigError(
            "plan and preview need the model's processor, which engine=endpoint leaves elsewhere",
            hint="leave engine=endpoint out here, or try the job with data.max_rows=5",
        )
    output = replace(cfg.output, on_mismatch=OnMismatch.overwrite)
    job = open_job(replace(cfg, output=output))
    return replace(job, cfg=replace(job.cfg, output=cfg.output))


def _within_reach(job: Job, num_rows: int) -> Sequence[Shard]:
    """Return all shards; for a stream, which is slow to skip, those of the first rows only."""
    plan = job.run.plan
    if not job.cfg.data.streaming:
        return plan
    starts = [shard for shard in plan if shard.first_row_index < num_rows]
    rest = num_rows - starts[-1].first_row_index
    return [*starts[:-1], starts[-1].piece(0, min(rest, starts[-1].num_rows))]


def draw_random(job: Job, num_rows: int, *, seed: int) -> list[Record]:
    """Read a random sample of rows; the seed determines it. For a stream, sample its start."""
    plan = _within_reach(job, _MAX_STREAMED)
    total = sum(shard.num_rows for shard in plan)
    chosen = sorted(random.Random(seed).sample(range(total), min(num_rows, total)))
    records: list[Record] = []
    for row_index in chosen:
        shard = shard_of(plan, row_index)
        single = shard.piece(row_index - shard.first_row_index, 1)
        records += job.source.read_shard(single, job.prompt_columns)
    return _with_images(job, records)


def _with_images(job: Job, records: list[Record]) -> list[Record]:
    """Return the records with their remote images fetched, if `data.allow_remote` is set."""
    if not job.cfg.data.allow_remote:
        return records
    with job.open_fetcher() as fetcher:
        return [record for record in fetcher.ahead(records) if record is not None]
