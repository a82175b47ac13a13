"""Every stage of a job, joined: the one file that knows them all.

    plan -> source -> prompt -> preprocess -> batching -> engine -> task -> writer

A thread reads shard after shard and keeps worker processes busy; this thread runs the engine and
writes. Shards follow one another without a gap: their rows may share a batch, and each row finds
its writer by its `row_index`.
"""

from __future__ import annotations

import json
import logging
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from batchvlm.config import JobConfig, SourceKind
from batchvlm.engine import Engine, open_engine
from batchvlm.errors import BatchvlmError, ErrorType, InputError
from batchvlm.identity import (
    answer_identity,
    model_name,
    output_layout,
    package_versions,
    pin_model,
)
from batchvlm.output.folder import OutputFolder, new_attempt
from batchvlm.output.run_file import RunFile, find_run, save_run
from batchvlm.output.schema import Provenance, kept_fields, output_schema
from batchvlm.output.writer import ShardWriter
from batchvlm.plan import plan_shards
from batchvlm.preprocess import PreprocessSpec
from batchvlm.prompts import PromptBuilder
from batchvlm.records import (
    Completion,
    Failure,
    Record,
    Result,
    Sample,
    Shard,
    Status,
    size_of_value,
)
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.prefetch import Prefetcher
from batchvlm.runtime.progress import Progress
from batchvlm.runtime.ranks import Rank, find_rank, shards_of_task
from batchvlm.runtime.workers import WorkerPool, default_num_workers
from batchvlm.settings import to_plain
from batchvlm.sources import Source, check_columns, open_source
from batchvlm.tasks import Task, open_task

log = logging.getLogger(__name__)

# What a row costs in the ready queue besides its arrays.
_ROW_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that was checked against its input and its output folder; nothing is loaded yet."""

    cfg: JobConfig
    source: Source
    prompt_columns: tuple[str, ...]
    task: Task
    folder: OutputFolder
    run: RunFile
    schema: Any
    """Arrow schema of the output."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `run_job` did."""

    folder: OutputFolder
    num_rows: int
    """Rows of the whole input."""
    num_shards: int
    num_mine: int
    """Rows that are this process's to compute."""
    num_found: int
    """Those of them that earlier runs had finished."""
    metrics: Metrics = field(default_factory=Metrics)


def open_job(cfg: JobConfig) -> Job:
    """Check a job against its input and its output folder.

    Raises:
        ConfigError, InputError, OutputError: in one line, before anything is loaded.
    """
    source = open_source(cfg.data)
    prompts = PromptBuilder(task=cfg.task, columns=cfg.data.columns, generation=cfg.generation)
    needed = prompts.needed_columns()
    kept = {name: "output.keep_columns" for name in cfg.output.keep_columns}
    named = {cfg.data.columns.id: "data.columns.id"} if cfg.data.columns.id else {}
    check_columns(source.schema, kept | named | needed)
    if cfg.data.source is not SourceKind.jsonl:  # whose types are a guess
        prompts.check_types(source.schema)
    schema = output_schema(
        kept_fields(source.schema, cfg.output.keep_columns),
        generated_texts=cfg.generation.num_return_sequences > 1,
        token_ids=cfg.output.token_ids,
        logprobs=cfg.generation.logprobs,
    )
    task = open_task(cfg.task)
    folder = OutputFolder(cfg.output.dir)
    folder.check_writable()
    files = source.files(list(kept | named | needed))
    plan = plan_shards(files, rows_per_shard=cfg.output.rows_per_shard, max_rows=cfg.data.max_rows)
    if not plan:
        raise InputError(f"data.path={cfg.data.path} holds no rows")
    cfg = replace(cfg, model=pin_model(cfg.model))
    run = find_run(
        folder,
        identity=answer_identity(cfg, files),
        layout=output_layout(cfg),
        settings=to_plain(cfg),
        packages=package_versions(),
        plan=plan,
    )
    return Job(
        cfg=cfg,
        source=source,
        prompt_columns=tuple(needed),
        task=task,
        folder=folder,
        run=run,
        schema=schema,
    )


def run_job(cfg: JobConfig, *, engine: Engine | None = None) -> Summary:
    """Compute what is missing of a job and write it.

    Args:
        cfg: the job, checked by `settings`.
        engine: takes the place of the model that the configuration names.

    Raises:
        BatchvlmError: the job cannot be done; finished rows are on disk.
    """
    job = open_job(cfg)
    cfg = job.cfg
    finished = job.folder.finished_shards(len(job.run.plan))
    mine = shards_of_task(job.run.plan, cfg.runtime)
    metrics = Metrics()
    if any(shard.index not in finished for shard in mine):
        # The workers load their libraries while this process loads torch and the model.
        with _open_pool(job) as pool:
            rank = find_rank(cfg.engine, cfg.runtime)
            mine = mine[rank.index :: rank.world_size]
            todo = [shard for shard in mine if shard.index not in finished]
            metrics.num_found = sum(s.num_rows for s in mine if s.index in finished)
            if todo:
                _compute(Collector(job, metrics, rank), mine, todo, pool, engine)
    num_mine = sum(shard.num_rows for shard in mine)
    return Summary(
        folder=job.folder,
        num_rows=sum(shard.num_rows for shard in job.run.plan),
        num_shards=len(job.run.plan),
        num_mine=num_mine,
        num_found=num_mine - metrics.num_rows,
        metrics=metrics,
    )


def _compute(
    collector: Collector,
    mine: Sequence[Shard],
    todo: Sequence[Shard],
    pool: WorkerPool,
    engine: Engine | None,
) -> None:
    job, rank, metrics = collector.job, collector.rank, collector.metrics
    cfg = job.cfg
    num_todo = sum(shard.num_rows for shard in todo)
    name = model_name(cfg.model)
    log.info("%d rows in %d shards; loading %s on %s", num_todo, len(todo), name, rank.device)
    start = time.perf_counter()
    with ExitStack() as stack:
        ready = stack.enter_context(
            Prefetcher(
                _prepare(_read(job, todo, collector), pool),
                max_items=cfg.batching.sort_window,
                max_bytes=cfg.batching.max_window_bytes,
                size_of=lambda item: item.size_bytes,
            )
        )
        # Rows are read and prepared while the model loads.
        engine = engine or open_engine(cfg, device=rank.device)
        save_run(job.folder, job.run)
        metrics.start_s = time.perf_counter() - start
        ready.wait_s = 0.0
        start = time.perf_counter()
        # Left before the reading thread is: whatever ends the run, finished rows reach the disk.
        stack.callback(collector.write_metrics)
        stack.callback(collector.close)
        progress = stack.enter_context(
            Progress(
                metrics,
                total=sum(shard.num_rows for shard in mine),
                log_every_s=cfg.runtime.log_every_s,
            )
        )
        metrics.engine = engine.stats
        for row_index, outcome in engine.run(_Samples(ready, collector, progress)):
            collector.finish(row_index, outcome, progress)
            metrics.wait_s, metrics.run_s = ready.wait_s, time.perf_counter() - start
        collector.finish_all(progress)
        metrics.wait_s, metrics.run_s = ready.wait_s, time.perf_counter() - start


def _open_pool(job: Job) -> WorkerPool:
    cfg = job.cfg
    num_workers = cfg.runtime.num_workers
    return WorkerPool(
        PreprocessSpec(
            model=cfg.model,
            task=cfg.task,
            columns=cfg.data.columns,
            generation=cfg.generation,
            image_root=job.source.image_root,
            max_source_pixels=cfg.data.max_source_pixels,
            max_image_bytes=cfg.data.max_image_bytes,
        ),
        num_workers=default_num_workers() if num_workers is None else num_workers,
        timeout_s=cfg.runtime.sample_timeout_s,
    )


def _read(job: Job, shards: Sequence[Shard], collector: Collector) -> Iterator[Record]:
    kept = job.cfg.output.keep_columns
    for shard in shards:
        finished = collector.open_shard(shard)
        yield from job.source.read_shard(shard, job.prompt_columns, kept=kept, skip=finished)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A row that is ready for the engine, or has failed before it."""

    record: Record
    outcome: Sample | Failure

    @property
    def size_bytes(self) -> int:
        kept_bytes = size_of_value(self.record.kept)
        sample_bytes = self.outcome.size_bytes if isinstance(self.outcome, Sample) else 0
        return _ROW_BYTES + kept_bytes + sample_bytes


def _prepare(records: Iterable[Record], pool: WorkerPool) -> Iterator[_Prepared]:
    # Kept columns stay on this side of the process border, prompt columns on the other.
    kept: dict[int, Mapping[str, Any]] = {}

    def stripped() -> Iterator[Record]:
        for record in records:
            kept[record.row_index] = record.kept
            yield replace(record, kept={})

    for record, outcome in pool.prepare(stripped()):
        ours = replace(record, values={}, kept=kept.pop(record.row_index))
        yield _Prepared(record=ours, outcome=outcome)


@dataclass(frozen=True)
class _Samples:
    """The engine's view of the rows that are ready: the samples among them."""

    ready: Prefetcher[_Prepared]
    collector: Collector
    progress: Progress

    def __iter__(self) -> Iterator[Sample]:
        return self.collector.take(self.ready, self.progress)

    def is_ready(self) -> bool:
        return self.ready.is_ready()


class Collector:
    """Leads each row to its shard's writer, whichever stage it comes from, and counts it.

    Shards are opened by the reading thread, everything else happens in the engine's.
    """

    def __init__(self, job: Job, metrics: Metrics, rank: Rank) -> None:
        self.job = job
        self.metrics = metrics
        self.rank = rank
        self._starts = [shard.first_row_index for shard in job.run.plan]
        self._provenance = Provenance(
            model=model_name(job.cfg.model),
            fingerprint=job.run.fingerprint,
            run_id=new_attempt(),
        )
        self._writers: dict[int, ShardWriter] = {}
        self._missing: dict[int, int] = {}
        self._under_way: dict[int, tuple[Record, Sample]] = {}

    def open_shard(self, shard: Shard) -> frozenset[int]:
        """Make ready to take a shard's rows.

        Returns:
            Offsets of the rows that an earlier run has finished.
        """
        writer = ShardWriter(
            self.job.folder,
            shard,
            len(self.job.run.plan),
            self.job.schema,
            self._provenance,
            flush_every_s=self.job.cfg.output.flush_every_s,
            flush_every_rows=self.job.cfg.output.flush_every_rows,
        )
        self._missing[shard.index] = shard.num_rows - len(writer.finished_rows)
        self.metrics.num_found += len(writer.finished_rows)
        self._writers[shard.index] = writer
        return writer.finished_rows

    def take(self, prepared: Iterable[_Prepared], progress: Progress) -> Iterator[Sample]:
        """Pass samples on to batching; write the rows that have failed already."""
        for item in prepared:
            if isinstance(item.outcome, Failure):
                self._write(_result(item.record, item.outcome), progress)
            else:
                self._under_way[item.record.row_index] = (item.record, item.outcome)
                yield item.outcome

    def finish(self, row_index: int, outcome: Completion | Failure, progress: Progress) -> None:
        """Write the row that the engine is done with."""
        assert row_index in self._under_way, f"the engine answered row {row_index} twice"
        record, sample = self._under_way.pop(row_index)
        if isinstance(outcome, Failure):
            self._write(_result(record, outcome, sample), progress)
        else:
            self._write(self._answered(record, sample, outcome), progress)

    def finish_all(self, progress: Progress) -> None:
        """Commit what is left when the engine has seen every sample.

        Raises:
            BatchvlmError: the source left rows out; the others are on disk.
        """
        for row_index in list(self._under_way):
            lost = Failure(error_type=ErrorType.ENGINE, message="the engine gave no answer")
            self.finish(row_index, lost, progress)
        self.close()
        for index, num_missing in self._missing.items():
            raise BatchvlmError(
                f"{num_missing} rows of shard {index} were never answered",
                hint="run the same command again; if it says so again, please report it",
            )

    def close(self) -> None:
        """Bring every finished row to disk; commit shards that were complete from the start."""
        for index, writer in list(self._writers.items()):
            # Flushed first: a commit that failed for want of room may leave room for less.
            writer.flush()
            if self._missing[index] == 0:
                self._commit(index)

    def write_metrics(self) -> None:
        """Leave this process's counts in the output folder."""
        task_id = self.job.cfg.runtime.task_id
        name = f"task-{task_id:05d}-rank-{self.rank.index:03d}-{self._provenance.run_id}.json"
        text = json.dumps({"run_id": self._provenance.run_id} | self.metrics.as_dict(), indent=2)
        folder = self.job.folder
        folder.commit_file(lambda file: file.write(text.encode()), folder.metrics / name)

    def _answered(self, record: Record, sample: Sample, completion: Completion) -> Result:
        # With several answers the task judges the first; tokens are counted of all.
        reading = self.job.task.read(completion.text, json_schema=sample.json_schema)
        answers = (completion, *completion.alternatives)
        return replace(
            _result(record, reading.failure, sample),
            generated_text=completion.text,
            generated_texts=tuple(answer.text for answer in answers),
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            parsed=reading.parsed,
            json_valid=reading.json_valid,
            finish_reason=completion.finish_reason,
            completion_tokens=sum(len(answer.token_ids) for answer in answers),
            latency_s=completion.latency_s,
        )

    def _write(self, result: Result, progress: Progress) -> None:
        index = bisect_right(self._starts, result.row_index) - 1
        self._writers[index].add(result)
        self.metrics.count_result(result)
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._commit(index)
        progress.advance()

    def _commit(self, index: int) -> None:
        # Kept until the part is there: whatever ends the commit, `close` still has the rows.
        self._writers[index].commit()
        del self._writers[index], self._missing[index]


def _result(record: Record, failure: Failure | None, sample: Sample | None = None) -> Result:
    """The output row of a record as far as it is known without an answer."""
    return Result(
        row=record.row,
        row_index=record.row_index,
        source_file=record.source_file,
        id=record.id,
        kept=record.kept,
        status=Status.SUCCESS if failure is None else Status.ERROR,
        failure=failure,
        prompt_tokens=sample.prompt_tokens if sample else None,
        image_tokens=sample.image_tokens if sample else None,
        num_images=len(sample.image_sizes) if sample else None,
        image_sizes=sample.image_sizes if sample else None,
    )
