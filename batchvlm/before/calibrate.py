"""A few real rows answered, to know how long all of them will take."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from batchvlm.engine import Engine, open_engine
from batchvlm.errors import InputError
from batchvlm.job import Job
from batchvlm.preprocess import Preprocessor
from batchvlm.records import Completion, Record, Sample
from batchvlm.runtime.launch import find_launch
from batchvlm.runtime.ranks import find_rank

_WARM_UP_ROWS = 4
_FIRST_ROWS = 16
_ENOUGH_S = 8.0
"""A trial that takes this long is the last; the next would have four times as many rows."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured, for one process on one device."""

    num_rows: int
    """That were answered in the last and longest trial."""
    load_s: float
    run_s: float
    run_cpu_s: float
    """Of this process's threads, in these seconds."""
    prepare_s: float
    """Seconds of one core to prepare these rows."""
    prompt_tokens: int
    completion_tokens: int
    """Of these rows."""

    @property
    def rows_per_s(self) -> float:
        return self.num_rows / self.run_s

    @property
    def s_per_token(self) -> float:
        """Seconds for a token of prompt or answer."""
        return self.run_s / (self.prompt_tokens + self.completion_tokens)


def calibrate(job: Job, records: Sequence[Record], *, engine: Engine | None = None) -> Speed:
    """Answer rows in trials of growing size, until one took long enough to be told by.

    Args:
        records: rows that stand for all of them; the fewer that fail, the better.
        engine: takes the place of the model that the configuration names.

    Raises:
        InputError: none of the rows can be prepared.
        ModelError: the model cannot be loaded.
    """
    preprocessor = Preprocessor(job.preprocess_spec())
    start_s = time.perf_counter()
    engine = engine or open_engine(
        job.cfg, device=find_rank(find_launch(), job.cfg.engine, job.cfg.runtime).device
    )
    load_s = time.perf_counter() - start_s
    num_rows = _FIRST_ROWS
    # Rows of a trial shall be from all over the input.
    records = random.Random(0).sample(records, len(records))
    warm_up, _ = _prepare(preprocessor, records[:_WARM_UP_ROWS])
    if not warm_up:
        raise InputError(
            "none of the rows drawn can be prepared, so there is nothing to calibrate by",
            hint="run batchvlm plan without --calibrate to see why",
        )
    list(engine.run(warm_up))
    while True:
        samples, prepare_s = _prepare(preprocessor, records[:num_rows])
        samples = samples or warm_up
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        outcomes = list(engine.run(samples))
        run_s, run_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        if run_s >= _ENOUGH_S or num_rows >= len(records):
            break
        num_rows *= 4
    answered = [outcome for _, outcome in outcomes if isinstance(outcome, Completion)]
    return Speed(
        num_rows=len(samples),
        load_s=load_s,
        run_s=max(run_s, 1e-9),
        run_cpu_s=run_cpu_s,
        prepare_s=prepare_s,
        prompt_tokens=sum(sample.prompt_tokens for sample in samples),
        completion_tokens=sum(len(c.token_ids) for c in answered),
    )


def _prepare(preprocessor: Preprocessor, records: Sequence[Record]) -> tuple[list[Sample], float]:
    start_s = time.perf_counter()
    outcomes = [preprocessor.prepare(record) for record in records]
    prepare_s = time.perf_counter() - start_s
    return [outcome for outcome in outcomes if isinstance(outcome, Sample)], prepare_s
