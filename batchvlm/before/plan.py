"""Plan a job without running it: rows, tokens, memory, time, and rows that will fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from batchvlm.batching import group_by_length
from batchvlm.before.calibrate import Speed, calibrate
from batchvlm.before.drawn import Drawn, draw_spread
from batchvlm.before.footprint import Footprint, estimate_footprint
from batchvlm.before.tokens import RowCount, TokenCounter
from batchvlm.config import BatchingConfig, EngineName
from batchvlm.output.parts import count_failed
from batchvlm.output.status import outcomes_in_segments
from batchvlm.pipeline.job import Job
from batchvlm.records import Generation, Sample, Shard
from batchvlm.runtime.launch import num_cores
from batchvlm.runtime.ranks import shards_of_task
from batchvlm.runtime.workers import default_num_workers


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated seconds for the remaining rows."""

    speed: Speed
    engine_s: float
    """Time of one engine that never waits for data."""
    prepare_s: float
    """Time of the worker processes that prepare samples for it."""
    shared_s: float
    """Time of all cores for both kinds of work; on a CPU the engine uses most of it."""

    @property
    def total_s(self) -> float:
        """Seconds from the start of one process to its end."""
        return self.speed.load_s + max(self.engine_s, self.prepare_s, self.shared_s)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of `batchvlm plan`."""

    job: Job
    num_rows: int
    num_files: int
    num_mine: int
    """Rows of this task."""
    num_done: int
    """Rows of this task that a run would not answer again."""
    drawn: Drawn
    counts: Sequence[RowCount]
    """Sampled rows that can be answered."""
    failed: Sequence[RowCount]
    """Sampled rows that cannot be answered."""
    footprint: Footprint
    num_batches: int
    """Number of batches of the sampled rows with engine=generate; else 0."""
    padding_share: float
    """Share of the prompt positions that will be padding."""
    estimate: Estimate | None = None

    @property
    def num_todo(self) -> int:
        return self.num_mine - self.num_done


def make_plan(job: Job, *, num_sampled: int, with_speed: bool) -> Plan:
    """Plan a job without running it.

    Args:
        num_sampled: number of rows to sample.
        with_speed: whether to load the model and answer some rows.

    Raises:
        BatchvlmError: the job cannot run.
    """
    cfg, plan = job.cfg, job.run.plan
    counter = TokenCounter(job)
    drawn = draw_spread(job, num_sampled)
    counted = [counter.count(record) for record in drawn.records]
    counts = [row for row in counted if row.failure is None]
    longest = max((row.prompt_tokens + row.max_new_tokens for row in counts), default=1)
    footprint = estimate_footprint(cfg, row_tokens=longest)
    num_batches, padding_share = 0, 0.0
    if footprint.engine is EngineName.generate:
        num_batches, padding_share = _padding(counts, cfg.batching)
    mine = shards_of_task(plan, cfg.runtime)
    num_mine = sum(shard.num_rows for shard in mine)
    found = Plan(
        job=job,
        num_rows=sum(shard.num_rows for shard in plan),
        num_files=len({shard.source_file for shard in plan}),
        num_mine=num_mine,
        num_done=0 if job.is_overwriting else _num_done(job, mine),
        drawn=drawn,
        counts=counts,
        failed=[row for row in counted if row.failure is not None],
        footprint=footprint,
        num_batches=num_batches,
        padding_share=padding_share,
    )
    if not with_speed:
        return found
    countable = {row.row_index for row in counts}
    speed = calibrate(job, [record for record in drawn.records if record.row_index in countable])
    return replace(found, estimate=_estimate(found, speed))


def _num_done(job: Job, shards: Sequence[Shard]) -> int:
    """Return the number of rows in parts and segments, less those that `retry.errors` repeats."""
    finished = job.folder.finished_shards(len(job.run.plan))
    begun = set(job.folder.shards_with_segments()) - finished
    num_rows = sum(
        shard.num_rows
        if shard.index in finished
        else len(outcomes_in_segments(job.folder, shard.index))
        for shard in shards
        if shard.index in finished or shard.index in begun
    )
    retry = job.cfg.retry
    if not (retry.errors and num_rows):
        return num_rows
    indices = {shard.index for shard in shards}
    failures = job.failures(indices)
    return num_rows - count_failed(job.folder, job.run.plan, failures, indices, retry).num_again


def _padding(counts: Sequence[RowCount], cfg: BatchingConfig) -> tuple[int, float]:
    """Return the number of batches of `generate()` and the share of padding in their prompts."""
    samples = [
        Sample(
            row_index=row.row_index,
            features={"input_ids": np.zeros((1, row.prompt_tokens), np.int8)},
            image_tokens=row.image_tokens,
            image_sizes=(),
            generation=Generation(max_new_tokens=row.max_new_tokens),
        )
        for row in counts
    ]
    batches = list(group_by_length(samples, cfg))
    num_cells = sum(batch.padded_tokens for batch in batches)
    num_tokens = sum(batch.prompt_tokens for batch in batches)
    return len(batches), 1 - num_tokens / num_cells if num_cells else 0.0


def _estimate(plan: Plan, speed: Speed) -> Estimate:
    num_counted = len(plan.counts) + len(plan.failed)
    num_answered = plan.num_todo * len(plan.counts) / num_counted
    # Scaled by tokens, because the trial's rows may differ in length from the whole sample.
    prompt_tokens = {row.row_index: row.prompt_tokens for row in plan.counts}
    answer = speed.completion_tokens / speed.num_rows
    tokens_per_row = float(np.mean(list(prompt_tokens.values()))) + answer
    tokens_per_trial_row = (
        float(np.mean([prompt_tokens[index] for index in speed.row_indices])) + answer
    )
    workers = plan.job.cfg.runtime.num_workers
    num_workers = default_num_workers() if workers is None else workers
    engine_s = num_answered * speed.run_s / speed.num_rows * tokens_per_row / tokens_per_trial_row
    prepare_core_s = plan.num_todo * speed.prepare_s / speed.num_rows
    engine_core_s = engine_s * speed.run_cpu_s / speed.run_s
    return Estimate(
        speed=speed,
        engine_s=engine_s,
        prepare_s=prepare_core_s / max(1, num_workers),
        shared_s=(engine_core_s + prepare_core_s) / num_cores(),
    )
