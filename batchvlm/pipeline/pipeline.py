"""The pipeline of a job: the one module that joins all stages.

    plan -> source -> prompt -> preprocess -> batching -> engine -> task -> writer

A reading thread reads shard after shard and feeds the worker processes; the main thread runs the
engine and writes. Rows of consecutive shards may share a batch: each row's `row_index` tells its
shard's writer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from batchvlm.config import JobConfig
from batchvlm.engine import Engine, open_engine
from batchvlm.errors import UnfinishedError
from batchvlm.identity import model_name
from batchvlm.output.folder import OutputFolder
from batchvlm.output.parts import check_parsed_type, count_failed
from batchvlm.output.run_file import save_run
from batchvlm.pipeline.collector import Collector, Prepared
from batchvlm.pipeline.job import Job, announce_overwriting, open_job
from batchvlm.pipeline.turns import Turns
from batchvlm.pipeline.work import Work
from batchvlm.records import Completion, Failure, Record, Sample
from batchvlm.report.card import complete_card, write_finished_card, write_first_card
from batchvlm.report.redact import redact_all
from batchvlm.runtime.claims import HEARTBEAT_EVERY_S
from batchvlm.runtime.launch import find_launch
from batchvlm.runtime.metrics import Metrics, TimeLine
from batchvlm.runtime.prefetch import Prefetcher
from batchvlm.runtime.progress import Progress
from batchvlm.runtime.ranks import Devices, find_devices, memory_of, shards_of_task
from batchvlm.runtime.replicas import Followers, find_replica
from batchvlm.runtime.trackers import Place, Trackers, prepare_trackers
from batchvlm.runtime.watchdog import Ticker, Watchdog
from batchvlm.runtime.workers import WorkerPool, default_num_workers
from batchvlm.settings.compose import to_plain
from batchvlm.words import number_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of `run_job`."""

    folder: OutputFolder
    num_rows: int
    """Rows of the whole input."""
    num_shards: int
    num_mine: int
    """Rows assigned to this process."""
    num_found: int
    """Rows of these that earlier runs had finished."""
    num_given_up: int = 0
    """Error rows that `retry.errors` names but `retry.max_attempts` does not retry any more."""
    max_attempts: int = 0
    metrics: Metrics = field(default_factory=Metrics)


def run_job(cfg: JobConfig, *, engine: Engine | None = None) -> Summary:
    """Compute and write the rows of a job that are not finished yet.

    Args:
        cfg: the job, validated by `settings`.
        engine: used in place of the model that the configuration names.

    Raises:
        BatchvlmError: the job cannot be completed; finished rows are on disk.
    """
    prepare_trackers(cfg.tracking)
    replica = find_replica(find_launch(), cfg.model)
    if replica is None:
        return _lead_job(cfg, engine, None)
    with Followers(replica) as followers:
        return _lead_job(cfg, engine, followers)


def _lead_job(cfg: JobConfig, engine: Engine | None, followers: Followers | None) -> Summary:
    job = open_job(cfg)
    if job.is_overwriting:
        announce_overwriting(job)
    mine = shards_of_task(job.run.plan, cfg.runtime)
    indices = {shard.index for shard in mine}
    failures = job.failures(indices)
    finished = job.finished_shards(mine, failures)
    metrics = Metrics()
    for (index, kind, _), num_rows in failures.items():
        if index in finished:
            metrics.found_errors[kind] += num_rows
    num_given_up = 0
    if cfg.retry.errors and not job.is_overwriting:
        failed = count_failed(job.folder, job.run.plan, failures, indices, cfg.retry)
        num_given_up = failed.num_given_up
    num_mine = sum(shard.num_rows for shard in mine)
    todo = [shard for shard in mine if shard.index not in finished]
    if todo:
        if not job.is_overwriting:
            check_parsed_type(job.folder, job.run, job.schema, finished)
        work = Work(
            job=job, mine=mine, todo=todo, metrics=metrics, engine=engine, followers=followers
        )
        _compute_shards(work)
        if work.peers is not None:
            num_mine = metrics.num_found + metrics.num_rows
    elif mine:
        complete_card(job.folder)
    return Summary(
        folder=job.folder,
        num_rows=sum(shard.num_rows for shard in job.run.plan),
        num_shards=len(job.run.plan),
        num_mine=num_mine,
        num_found=num_mine - metrics.num_rows,
        num_given_up=num_given_up,
        max_attempts=cfg.retry.max_attempts,
        metrics=metrics,
    )


def _compute_shards(work: Work) -> None:
    """Compute the task's unfinished shards, or this process's share of them."""
    job, cfg, launch = work.job, work.job.cfg, work.launch
    if work.deadline.is_near():
        raise _time_is_up(cfg)
    if launch.rank == 0:
        num_rows = sum(shard.num_rows for shard in work.mine)
        work.metrics.num_found = num_rows - sum(shard.num_rows for shard in work.todo)
    collector = Collector(job, work.metrics, launch.rank, work.turns)
    watchdog = Watchdog(
        stall_timeout_s=cfg.runtime.stall_timeout_s,
        grace_s=cfg.runtime.grace_s,
        flush=collector.flush,
    )
    # The watchdog is closed last, so that it also ends a shutdown that hangs. The pool's workers
    # import their libraries while this process loads torch and the model.
    with watchdog, _open_pool(job) as pool:
        if work.followers is not None:
            work.followers.on_loss = watchdog.end
        _run_stages(work, collector, pool, watchdog.beat)
        _check_complete(work)
        write_finished_card(job.folder)


def _time_is_up(cfg: JobConfig) -> UnfinishedError:
    return UnfinishedError(
        "the SLURM job's time is nearly up (runtime.walltime_margin_s="
        f"{cfg.runtime.walltime_margin_s:g}); finished rows are on disk",
        hint="run the same command again",
    )


def _check_complete(work: Work) -> None:
    """Check, if the store is lost and with it what other ranks have claimed, that no shard is left.

    Raises:
        UnfinishedError: shards are unfinished; other ranks or the next run compute them.
    """
    if work.peers is not None and work.peers.is_lost:
        # A job that overwrites has replaced the old run by now.
        finished = replace(work.job, is_overwriting=False).finished_shards(work.mine)
        if num_left := sum(shard.index not in finished for shard in work.mine):
            raise UnfinishedError(
                f"rank 0 was lost, and {num_left} shards are not finished yet",
                hint="run the same command again once the other ranks have ended",
            )


def _run_stages(
    work: Work, collector: Collector, pool: WorkerPool, beat: Callable[[], None]
) -> None:
    """Run the rows of the shards through all stages, from the source to the writer."""
    job, metrics, peers = work.job, work.metrics, work.peers
    cfg = job.cfg
    devices = find_devices(find_launch(), cfg.engine, cfg.runtime, cfg.model)
    num_todo = sum(shard.num_rows for shard in work.todo)
    todo = f"{number_of(num_todo, 'row')} in {number_of(len(work.todo), 'shard')}"
    log.info("%s; loading %s on %s", todo, model_name(cfg.model), devices.first)
    start = time.perf_counter()
    with ExitStack() as stack:
        if peers is not None:
            stack.enter_context(peers.exchange(metrics))
        engine = work.engine
        if job.is_overwriting:
            # Remove the old run before shards are opened, as they resume from files in the folder.
            engine = engine or _load(work, devices)
            save_run(job.folder, job.run, overwrite=True)
        # Rows are read and prepared while the model loads.
        ready = _start_reading(work, collector, pool, stack)
        engine = engine or _load(work, devices)
        save_run(job.folder, job.run)
        if work.launch.rank == 0:
            write_first_card(job.folder, job.run, job.schema)
        metrics.start_s = time.perf_counter() - start
        metrics.engine = engine.stats
        ready.wait_s = 0.0
        start = time.perf_counter()
        # Closed before the reading thread: whatever ends the run, finished rows reach the disk.
        stack.callback(collector.write_metrics, is_over=True)
        stack.callback(collector.close)
        flush = Ticker(
            collector.flush_if_due, every_s=max(cfg.output.flush_every_s, 1.0), name="flush"
        )
        stack.enter_context(flush)
        trackers = stack.enter_context(_open_trackers(work))
        progress = stack.enter_context(_open_progress(work, devices.first))
        collector.start(progress, beat)
        time_line = TimeLine(metrics, collector.append_metrics)
        stack.callback(time_line.write)
        samples: Iterable[Sample] = _Samples(ready, collector, work)
        while samples:
            for row_index, outcome in _answers(engine, samples, work.turns):
                collector.finish(row_index, outcome)
                metrics.wait_s, metrics.run_s = ready.wait_s, time.perf_counter() - start
                time_line.tick()
                trackers.tick()
            if work.deadline.has_come:
                raise _time_is_up(cfg)
            # Rows to retry whose invalid answers came after the last sample; dialogs have none.
            samples = list(collector.take_retries())
        collector.finish_all()
        metrics.wait_s, metrics.run_s = ready.wait_s, time.perf_counter() - start
        if peers is not None:
            peers.send_heartbeat(metrics)
            peers.wait_for_others(lambda: _wait_a_little(collector))
            progress.advance()


def _start_reading(
    work: Work, collector: Collector, pool: WorkerPool, stack: ExitStack
) -> Prefetcher[Prepared]:
    """Start the thread that reads, fetches and prepares rows; closing `stack` ends it."""
    cfg = work.job.cfg
    records = _read(work, collector)
    if cfg.data.allow_remote:
        records = stack.enter_context(work.job.open_fetcher()).ahead(records)
    ready = stack.enter_context(
        Prefetcher(
            _prepare(records, pool, work.turns),
            max_items=cfg.batching.sort_window,
            max_bytes=cfg.batching.max_window_bytes,
            size_of=lambda item: item.size_bytes,
        )
    )
    if work.turns is not None:
        work.turns.on_idle = ready.wake
        stack.enter_context(work.turns)
    return ready


def _load(work: Work, devices: Devices) -> Engine:
    cfg, followers = work.job.cfg, work.followers
    size = devices.num_gpus if followers is None else followers.size
    cfg = replace(cfg, model=replace(cfg.model, gpus_per_replica=size))
    return open_engine(cfg, device=devices.first, followers=followers)


def _wait_a_little(collector: Collector) -> None:
    time.sleep(HEARTBEAT_EVERY_S)
    collector.advance()


def _answers(
    engine: Engine, samples: Iterable[Sample], turns: Turns | None
) -> Iterator[tuple[int, Completion | Failure]]:
    """Yield the engine's outcomes, for dialogs in several rounds.

    A dialog's next turn becomes a sample once the previous one is answered, but an engine that
    fills a window first answers nothing until the stream ends. So the stream ends when no turn can
    become ready before an answer, and the engine runs again until no dialog has a turn left.
    """
    while True:
        num_answers = 0
        for answer in engine.run(samples):
            num_answers += 1
            yield answer
        if turns is None or turns.is_over or not num_answers:
            return


def _open_progress(work: Work, device: str) -> Progress:
    runtime = work.job.cfg.runtime
    return Progress(
        work.metrics,
        total=sum(shard.num_rows for shard in work.mine),
        log_every_s=runtime.log_every_s,
        others=None if work.peers is None else work.peers.others,
        is_shown=work.launch.rank == 0,
        has_bar=not runtime.log_json,
        memory=lambda: memory_of(device),
    )


def _open_trackers(work: Work) -> Trackers:
    cfg, folder = work.job.cfg, work.job.folder
    place = Place(
        output=folder.root.name,
        task_id=cfg.runtime.task_id,
        rank=work.launch.rank,
        is_one_of_many=cfg.runtime.num_tasks > 1 or work.launch.world_size > 1,
    )
    return Trackers(
        cfg.tracking,
        work.metrics,
        place,
        folder=folder.inner / "tracking",
        settings=redact_all(to_plain(cfg)),
    )


def _open_pool(job: Job) -> WorkerPool:
    cfg = job.cfg
    num_workers = cfg.runtime.num_workers
    return WorkerPool(
        job.preprocess_spec(),
        num_workers=default_num_workers() if num_workers is None else num_workers,
        timeout_s=cfg.runtime.sample_timeout_s,
    )


def _read(work: Work, collector: Collector) -> Iterator[Record | None]:
    job = work.job
    kept = job.cfg.output.keep_columns
    for shard in work.shards():
        if shard is None:
            yield None
            continue
        finished = collector.open_shard(shard)
        for record in job.source.read_shard(shard, job.prompt_columns, kept=kept, skip=finished):
            work.num_read += 1
            yield record


def _prepare(
    records: Iterable[Record | None], pool: WorkerPool, turns: Turns | None
) -> Iterator[Prepared]:
    # Kept columns are not sent to the worker processes, and prompt columns are dropped after them.
    kept: dict[int, Mapping[str, Any]] = {}

    def stripped() -> Iterator[Record | None]:
        for record in records if turns is None else turns.to_pool(records):
            if record is None:
                yield None
                continue
            kept[record.row_index] = record.kept
            yield replace(record, kept={})

    for record, outcome in pool.prepare(stripped()):
        if turns is not None:
            turns.leave_pool()
        ours = replace(record, kept=kept.pop(record.row_index))
        if isinstance(outcome, Failure) or not outcome.turns_left:
            ours = replace(ours, values={}, fetched={})
        yield Prepared(record=ours, outcome=outcome)


@dataclass(frozen=True)
class _Samples:
    """The `SampleStream` that the engine reads: the samples among the rows that are ready."""

    ready: Prefetcher[Prepared]
    collector: Collector
    work: Work

    def __iter__(self) -> Iterator[Sample]:
        turns = self.work.turns
        items = self.ready if turns is None else self.ready.items(until=lambda: turns.is_idle)
        return self.collector.take(self.work.take(items))

    def is_ready(self) -> bool:
        return self.ready.is_ready()
