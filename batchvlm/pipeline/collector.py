"""Passes finished and failed rows to their shards' writers, and counts them."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchvlm.errors import BatchvlmError, ErrorType, OutputError, TooManyErrors
from batchvlm.identity import model_name
from batchvlm.output.disk import new_attempt
from batchvlm.output.schema import Provenance
from batchvlm.output.typed import UnfitError
from batchvlm.output.writer import Answered, ShardWriter, update_part
from batchvlm.pipeline.form_retries import FormRetries
from batchvlm.pipeline.job import Job
from batchvlm.pipeline.turns import Turns
from batchvlm.records import (
    Completion,
    Failure,
    FinishReason,
    Record,
    Result,
    Sample,
    Shard,
    Status,
    shard_of,
    size_of_value,
)
from batchvlm.runtime.launch import this_place
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.progress import Progress
from batchvlm.runtime.signals import interrupted_at_s
from batchvlm.words import number_of

log = logging.getLogger(__name__)

# Bytes of a row in the ready queue besides its arrays.
_ROW_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A row that is ready for the engine, or has failed before it."""

    record: Record
    outcome: Sample | Failure

    @property
    def size_bytes(self) -> int:
        kept_bytes = size_of_value(self.record.kept)
        sample_bytes = self.outcome.size_bytes if isinstance(self.outcome, Sample) else 0
        # Kept for the next turns of a dialog.
        source_bytes = size_of_value(self.record.values) + size_of_value(self.record.fetched)
        return _ROW_BYTES + kept_bytes + sample_bytes + source_bytes


class Collector:
    """Passes each row to its shard's writer, whichever stage it comes from, and counts it.

    The reading thread opens shards, the engine's thread adds rows, and a third thread flushes rows
    that would wait in memory for a long batch. A lock serializes them.

    Args:
        metrics: counts the rows.
        rank: names this process's metrics file.
        turns: takes rows that have another turn; None unless the task is a dialog.
    """

    def __init__(self, job: Job, metrics: Metrics, rank: int, turns: Turns | None) -> None:
        self._job = job
        self._metrics = metrics
        self._rank = rank
        self._turns = turns
        self._progress: Progress | None = None
        self._beat: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self._provenance = Provenance(
            model=model_name(job.cfg.model),
            fingerprint=job.run.fingerprint,
            run_id=new_attempt(),
        )
        self._writers: dict[int, ShardWriter] = {}
        self._waiting: dict[int, Answered] = {}
        self._missing: dict[int, int] = {}
        self._under_way: dict[int, tuple[Record, Sample]] = {}
        self._retries = FormRetries(
            job.cfg.retry.invalid_json, max_bytes=job.cfg.batching.max_window_bytes
        )

    def start(self, progress: Progress, beat: Callable[[], None]) -> None:
        """Begin to report progress, once the model is loaded, however long that took.

        Args:
            beat: tells the watchdog.
        """
        self._progress, self._beat = progress, beat
        self._beat()

    def advance(self) -> None:
        """Report progress to the watchdog and to the display."""
        assert self._progress is not None, "a row before the model is ready"
        self._beat()
        self._progress.advance()

    def open_shard(self, shard: Shard) -> frozenset[int]:
        """Open the writer of a shard.

        Returns:
            Offsets of the shard's rows that an earlier run has finished.
        """
        writer = ShardWriter(
            self._job.folder,
            shard,
            len(self._job.run.plan),
            self._job.schema,
            self._provenance,
            flush_every_s=self._job.cfg.output.flush_every_s,
            flush_every_rows=self._job.cfg.output.flush_every_rows,
            retry=self._job.cfg.retry,
        )
        with self._lock:
            self._missing[shard.index] = shard.num_rows - len(writer.finished_rows)
            self._metrics.num_found += len(writer.finished_rows)
            self._metrics.found_errors.update(writer.found_errors)
            self._writers[shard.index] = writer
        self._beat()
        return writer.finished_rows

    def take(self, prepared: Iterable[Prepared]) -> Iterator[Sample]:
        """Pass samples on to the engine; write the rows that have failed already."""
        for item in prepared:
            if isinstance(item.outcome, Failure):
                self._metrics.count_prepared(0, is_again=bool(item.record.answers))
                self._write(_result(item.record, item.outcome))
            else:
                # Only the engine holds the pixels, and no longer than it needs them.
                sample = item.outcome.without_images()
                is_again = bool(item.record.answers)
                self._metrics.count_prepared(sample.prompt_tokens, is_again=is_again)
                self._retries.keep(item.outcome)
                self._under_way[item.record.row_index] = (item.record, sample)
                yield item.outcome
            yield from self.take_retries()

    def take_retries(self) -> Iterator[Sample]:
        """Pass on again the samples whose answers did not have the requested form."""
        return self._retries.take()

    def finish(self, row_index: int, outcome: Completion | Failure) -> None:
        """Take an outcome of the engine: write the row, or send it on for a turn or a retry."""
        assert row_index in self._under_way, f"the engine answered row {row_index} twice"
        record, sample = self._under_way[row_index]
        if sample.turns_left and isinstance(outcome, Completion):
            del self._under_way[row_index]
            self._retries.forget(row_index)
            assert self._turns is not None
            self._turns.requeue(replace(record, answers=(*record.answers, outcome)))
            self._beat()
            return
        if isinstance(outcome, Failure):
            result = _result(record, outcome, sample)
        else:
            result = self._answered(record, sample, outcome)
            is_invalid = result.failure and result.failure.error_type is ErrorType.INVALID_JSON
            if is_invalid and self._retries.retry(row_index, outcome):
                return
        del self._under_way[row_index]
        self._write(replace(result, attempts=self._retries.forget(row_index)))

    def finish_all(self) -> None:
        """Write rows that the engine left unanswered as errors, and commit all shards.

        Raises:
            BatchvlmError: the source omitted rows; the others are on disk.
        """
        for row_index in list(self._under_way):
            lost = Failure(error_type=ErrorType.ENGINE, message="the engine gave no answer")
            self.finish(row_index, lost)
        self.close()
        if self._missing:
            index, num_missing = next(iter(self._missing.items()))
            were = "was" if num_missing == 1 else "were"
            raise BatchvlmError(
                f"{number_of(num_missing, 'row')} of shard {index} {were} never answered",
                hint="run the same command again; if it says so again, please report it",
            )

    def close(self) -> None:
        """Write every finished row to disk; commit shards that were complete from the start.

        After a signal, new answers of merged parts stay in segments: the next run takes them.
        """
        with self._lock:
            # All are flushed first: if a part does not fit on the disk, other shards' rows may.
            for writer in self._writers.values():
                writer.flush()
            for index in [index for index, missing in self._missing.items() if missing == 0]:
                self._commit(index)
        if interrupted_at_s() is None:
            self._update_parts()

    def flush(self) -> None:
        """Write every finished row and the metrics to disk."""
        with self._lock:
            for writer in self._writers.values():
                writer.flush()
            self.write_metrics()

    def flush_if_due(self) -> None:
        """Write rows that have waited for `output.flush_every_s`, and the metrics, to disk."""
        try:
            with self._lock:
                for writer in self._writers.values():
                    writer.flush_if_due()
                self.write_metrics()
        except OutputError as error:
            # The rows stay in memory, and the next write tries again.
            log.warning("%s", error)

    def write_metrics(self, *, is_over: bool = False) -> None:
        """Write this process's metrics file in the output folder."""
        head = {
            "run_id": self._provenance.run_id,
            "is_over": is_over,
            "where": this_place(),
            "flush_every_s": self._job.cfg.output.flush_every_s,
        }
        text = json.dumps(head | self._metrics.as_dict(), indent=2)
        path = self._metrics_file("json")
        self._job.folder.commit_file(lambda file: file.write(text.encode()), path)

    def append_metrics(self, line: bytes) -> None:
        """Append a line to this process's time line in the output folder."""
        self._job.folder.append_line(self._metrics_file("jsonl"), line)

    def _metrics_file(self, suffix: str) -> Path:
        task = f"task-{self._job.cfg.runtime.task_id:05d}-rank-{self._rank:03d}"
        return self._job.folder.metrics / f"{task}-{self._provenance.run_id}.{suffix}"

    def _cut_off(self, sample: Sample, completion: Completion) -> Failure:
        """The failure of an answer that was cut off, with the limit to raise."""
        where = "" if completion.num_tokens is None else f" at {completion.num_tokens:,} tokens"
        column = self._job.cfg.generation.columns.max_new_tokens
        # A retry may have had more tokens than the sample's settings say.
        num_allowed = max(sample.generation.max_new_tokens, completion.num_tokens or 0)
        if sample.room is not None and num_allowed >= sample.room:
            hint = "no more fits behind its prompt; shorten the prompt, or use smaller images"
        elif column is not None:
            hint = f"raise column {column}, or generation.max_new_tokens where that is null"
        else:
            hint = "raise generation.max_new_tokens"
        return Failure(
            error_type=ErrorType.INVALID_JSON,
            message=f"the answer was cut{where} before its JSON ended; {hint}",
        )

    def _answered(self, record: Record, sample: Sample, completion: Completion) -> Result:
        # If there are several answers, the task reads the first; tokens of all are counted.
        reading = self._job.task.read(
            completion.text, json_schema=sample.json_schema, choices=sample.choices
        )
        if reading.is_unfinished and completion.finish_reason is FinishReason.LENGTH:
            reading = replace(reading, failure=self._cut_off(sample, completion))
        parsed: Any = None
        if reading.parsed is not None:
            try:
                parsed = self._job.parsed.fit(reading.parsed)
            except UnfitError as error:
                failure = Failure(error_type=ErrorType.INVALID_JSON, message=str(error))
                reading = replace(reading, failure=failure)
        answers = (*record.answers, completion, *completion.alternatives)
        result = _result(record, reading.failure, sample)
        if completion.usage is not None:
            result = replace(result, prompt_tokens=completion.usage.prompt_tokens)
        return replace(
            result,
            generated_text=completion.text,
            generated_texts=tuple(answer.text for answer in answers),
            finish_reasons=tuple(answer.finish_reason for answer in answers),
            token_ids=completion.token_ids if completion.usage is None else None,
            logprobs=completion.logprobs,
            parsed=parsed,
            json_valid=reading.json_valid,
            constraint=completion.constraint,
            scores=completion.scores,
            finish_reason=completion.finish_reason,
            completion_tokens=_num_tokens(answers),
            latency_s=completion.latency_s + sum(answer.latency_s for answer in record.answers),
        )

    def _write(self, result: Result) -> None:
        index = shard_of(self._job.run.plan, result.row_index).index
        with self._lock:
            attempts = self._writers[index].attempts.get(result.row, 1) + result.attempts - 1
            self._writers[index].add(replace(result, attempts=attempts))
            self._metrics.count_result(result)
            self._missing[index] -= 1
            if self._missing[index] == 0:
                self._commit(index)
        if self._turns is not None:
            self._turns.end()
        self.advance()
        self._check_error_rate()

    def _check_error_rate(self) -> None:
        metrics, limits = self._metrics, self._job.cfg.runtime
        # Rows under way count as seen. Preparation errors come long before the answers of the same
        # window, and would otherwise look like its error rate.
        num_seen = metrics.num_rows + len(self._under_way)
        if limits.max_error_rate is None or num_seen < limits.max_error_rate_after:
            return
        if metrics.num_errors > limits.max_error_rate * num_seen:
            raise TooManyErrors(
                f"{metrics.num_errors} of {num_seen} rows failed, more than "
                f"runtime.max_error_rate={limits.max_error_rate:g}",
                hint="fix the cause and run the same command again, with "
                f"retry.errors=[{','.join(metrics.errors)}] for the rows that failed",
                causes=metrics.causes(),
            )

    def _commit(self, index: int) -> None:
        # Deleted only after the commit: if that is interrupted, `close` still has the rows.
        writer = self._writers[index]
        # A merged part takes seconds to write, for one shard or for all.
        if (answered := writer.leave_to_update()) is not None:
            self._waiting[index] = answered
        else:
            writer.commit()
        del self._writers[index], self._missing[index]

    def _update_parts(self) -> None:
        """Rewrite merged parts, each once for all of its shards that were answered again."""
        job = self._job
        if self._waiting:
            num_shards = number_of(len(self._waiting), "shard")
            log.info("putting the new answers of %s into merged parts", num_shards)
        # Without the lock: rows that are not on disk yet can be flushed meanwhile.
        while self._waiting:
            for index in update_part(
                job.folder, self._waiting, len(job.run.plan), job.schema, self._provenance
            ):
                del self._waiting[index]
            self._beat()


def _result(record: Record, failure: Failure | None, sample: Sample | None = None) -> Result:
    """The output row of a record, without the fields of an answer."""
    is_counted = sample is not None and bool(sample.features)
    return Result(
        row=record.row,
        row_index=record.row_index,
        source_file=record.source_file,
        id=record.id,
        kept=record.kept,
        status=Status.SUCCESS if failure is None else Status.ERROR,
        failure=failure,
        generated_texts=tuple(answer.text for answer in record.answers) or None,
        finish_reasons=tuple(answer.finish_reason for answer in record.answers) or None,
        completion_tokens=_num_tokens(record.answers) or None,
        prompt_tokens=sample.prompt_tokens if sample and is_counted else None,
        image_tokens=sample.image_tokens if sample and is_counted else None,
        num_images=len(sample.image_sizes) if sample else None,
        image_sizes=sample.image_sizes if sample else None,
    )


def _num_tokens(answers: Iterable[Completion]) -> int | None:
    """Tokens of these answers; None if a server did not report them for one."""
    counts = [answer.num_tokens for answer in answers]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
