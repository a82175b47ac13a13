"""Measure speed by answering some rows, to estimate how long all of them will take."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchvlm.engine import Engine, open_engine
from batchvlm.errors import InputError
from batchvlm.pipeline.job import Job
from batchvlm.preprocess.preprocessor import Preprocessor
from batchvlm.records import Completion, Record, Sample
from batchvlm.runtime.ranks import find_device

_WARM_UP_ROWS = 4
_FIRST_ROWS = 16
_ENOUGH_S = 8.0
"""A trial of at least this many seconds is the last; the next would have four times the rows."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measurements of the last and longest trial, for one process on one device."""

    row_indices: tuple[int, ...]
    """Indices of its rows that could be prepared."""
    load_s: float
    """Seconds to load the model."""
    run_s: float
    """Seconds in the engine."""
    run_cpu_s: float
    """CPU seconds of this process while in the engine."""
    prepare_s: float
    """Seconds of one core to prepare these rows."""
    prompt_tokens: int
    completion_tokens: int
    """Tokens of all answers to these rows and of all turns of dialogs."""

    @property
    def num_rows(self) -> int:
        return len(self.row_indices)

    @property
    def rows_per_s(self) -> float:
        return self.num_rows / self.run_s


def calibrate(job: Job, records: Sequence[Record], *, engine: Engine | None = None) -> Speed:
    """Answer rows in trials of growing size, until one took at least `_ENOUGH_S`.

    Args:
        records: rows that represent the input, ideally without failures.
        engine: used in place of the model that the configuration names.

    Raises:
        InputError: none of the rows can be prepared.
        ModelError: the model cannot be loaded.
    """
    preprocessor = Preprocessor(job.preprocess_spec())
    start_s = time.perf_counter()
    engine = engine or open_engine(job.cfg, device=find_device(job.cfg))
    load_s = time.perf_counter() - start_s
    num_rows = _FIRST_ROWS
    # Shuffled, so that the rows of a trial are from the whole input.
    records = random.Random(0).sample(records, len(records))
    warm_up, _ = _prepare(preprocessor, records[:_WARM_UP_ROWS])
    if not warm_up:
        raise InputError(
            "none of the rows drawn can be prepared, so there is nothing to calibrate by",
            hint="run batchvlm plan without --calibrate to see why",
        )
    list(engine.run(warm_up))
    while True:
        speed = _answer(preprocessor, engine, records[:num_rows], load_s=load_s)
        if speed.run_s >= _ENOUGH_S or num_rows >= len(records):
            return speed
        num_rows *= 4


def _answer(
    preprocessor: Preprocessor, engine: Engine, records: Sequence[Record], *, load_s: float
) -> Speed:
    """Answer rows, including every turn of dialogs, and measure the time."""
    samples, prepare_s = _prepare(preprocessor, records)
    row_indices = tuple(sample.row_index for sample in samples)
    run_s = run_cpu_s = 0.0
    prompt_tokens = completion_tokens = 0
    current = {record.row_index: record for record in records}
    while samples:
        prompt_tokens += sum(sample.prompt_tokens for sample in samples)
        unfinished = {sample.row_index for sample in samples if sample.turns_left}
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        outcomes = list(engine.run(samples))
        run_s += time.perf_counter() - start_s
        run_cpu_s += time.process_time() - start_cpu_s
        again: list[Record] = []
        for row_index, outcome in outcomes:
            if not isinstance(outcome, Completion):
                continue
            completion_tokens += sum(len(c.token_ids) for c in (outcome, *outcome.alternatives))
            record = current[row_index]
            current[row_index] = replace(record, answers=(*record.answers, outcome))
            if row_index in unfinished:
                again.append(current[row_index])
        samples, further_s = _prepare(preprocessor, again)
        prepare_s += further_s
    return Speed(
        row_indices=row_indices,
        load_s=load_s,
        run_s=max(run_s, 1e-9),
        run_cpu_s=run_cpu_s,
        prepare_s=prepare_s,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )


def _prepare(preprocessor: Preprocessor, records: Sequence[Record]) -> tuple[list[Sample], float]:
    start_s = time.perf_counter()
    outcomes = [preprocessor.prepare(record) for record in records]
    prepare_s = time.perf_counter() - start_s
    return [outcome for outcome in outcomes if isinstance(outcome, Sample)], prepare_s
