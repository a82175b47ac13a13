"""Counters of a run: rows, tokens, errors, and the time spent in each stage."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from batchvlm.errors import OutputError
from batchvlm.records import EngineStats, Result, Status

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_FIRST_LINE_S = 0.5
"""Shorter at first, so that a run of a few seconds has several lines too."""


@dataclass(kw_only=True)
class Metrics:
    """Counters of one process, written to `_batchvlm/metrics/` and shown in the summary."""

    num_rows: int = 0
    num_found: int = 0
    """Rows that earlier runs finished."""
    found_errors: Counter[str] = field(default_factory=Counter)
    """Their error types."""
    num_success: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Error type -> the id and message of the first row with it."""
    finish_reasons: Counter[str] = field(default_factory=Counter)
    num_prepared: int = 0
    """Rows that are ready for the engine or failed in preprocessing."""
    prepared_tokens: int = 0
    """Their prompt tokens."""
    prompt_tokens: int = 0
    """Of finished rows, as all counters below."""
    constraints: Counter[str] = field(default_factory=Counter)
    """Rows by how strictly their answers were constrained to the requested form."""
    image_tokens: int = 0
    completion_tokens: int = 0
    start_s: float = 0.0
    """Seconds until the model was ready."""
    wait_s: float = 0.0
    """Seconds for which the engine waited for samples."""
    run_s: float = 0.0
    """Seconds from when the model was ready to the last row."""
    engine: EngineStats = field(default_factory=EngineStats)

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    @property
    def wait_share(self) -> float:
        """Fraction of `run_s` for which the engine waited for samples."""
        return self.wait_s / self.run_s if self.run_s else 0.0

    @property
    def rows_per_s(self) -> float:
        return self.num_rows / self.run_s if self.run_s else 0.0

    @property
    def completion_tokens_per_s(self) -> float:
        return self.completion_tokens / self.run_s if self.run_s else 0.0

    def count_prepared(self, prompt_tokens: int, *, is_again: bool = False) -> None:
        """Count a row that is ready for the engine, or failed in preprocessing (0 tokens).

        Args:
            is_again: whether the row was counted before, as for a later turn of a dialog.
        """
        self.num_prepared += not is_again
        self.prepared_tokens += prompt_tokens

    def share_done(self, num_todo: int) -> float:
        """Estimate the fraction of the work that is done, between 0 and 1, in tokens.

        Rows are answered longest first, so finished rows are longer than average. They are prepared
        in input order, so the mean of the prepared rows stands for those not read yet.

        Args:
            num_todo: rows of this process, finished or not.
        """
        num_answered = max(self.num_success, 1)
        answer = self._token_cost() * self.completion_tokens / num_answered
        done = self.prompt_tokens + answer * self.num_success
        num_prepared = max(self.num_prepared, self.num_rows, 1)
        under_way = self.prepared_tokens - self.prompt_tokens
        mean = self.prepared_tokens / num_prepared
        # The remaining rows are assumed to fail as often as the finished ones.
        answer *= self.num_success / max(self.num_rows, 1)
        left = max(under_way, 0) + (num_prepared - self.num_rows) * answer
        left += max(num_todo - num_prepared, 0) * (mean + answer)
        if done + left <= 0:  # nothing but failures so far
            return self.num_rows / max(num_todo, 1)
        return done / (done + left)

    def _token_cost(self) -> float:
        """Cost of a completion token relative to a prompt token, by the times measured so far."""
        prompt_s = self.engine.vision_s + self.engine.prefill_s
        if not (prompt_s and self.engine.decode_s and self.engine.prompt_tokens):
            return 1.0
        a_prompt_token = prompt_s / self.engine.prompt_tokens
        an_answer_token = self.engine.decode_s / max(self.completion_tokens, 1)
        return min(max(an_answer_token / a_prompt_token, 1 / 16), 64.0)

    def count_result(self, result: Result) -> None:
        """Count a finished row."""
        self.num_rows += 1
        self.num_success += result.status is Status.SUCCESS
        if result.failure is not None:
            kind = str(result.failure.error_type)
            self.errors[kind] += 1
            self.examples.setdefault(kind, f"{result.id}: {result.failure.message}")
        if result.finish_reason is not None:
            self.finish_reasons[str(result.finish_reason)] += 1
        self.prompt_tokens += result.prompt_tokens or 0
        if result.constraint is not None:
            self.constraints[str(result.constraint)] += 1
        self.completion_tokens += result.completion_tokens or 0
        self.image_tokens += result.image_tokens or 0

    def causes(self) -> list[str]:
        """Return a line per error type, most frequent first, with its count and one example."""
        width = max(map(len, self.errors), default=0)
        return [
            f"{count:>8,}  {kind:<{width}}  {self.examples[kind]}"
            for kind, count in self.errors.most_common()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return all counters and rates as JSON-serializable values."""
        return {
            **{
                key: dict(value) if isinstance(value, Counter) else value
                for key, value in vars(self).items()
            },
            "engine": asdict(self.engine),
            "rows_per_s": self.rows_per_s,
            "completion_tokens_per_s": self.completion_tokens_per_s,
            "padding_share": self.engine.padding_share,
            "wait_share": self.wait_share,
        }


class TimeLine:
    """Writes the counters over time as JSON lines.

    The interval is a tenth of the time so far, between 0.5 and 10 seconds. Lines hold totals since
    the start of the process, so one that is lost or torn by a kill loses no counts.

    Args:
        metrics: the counters, updated elsewhere.
        append: appends one line, its newline included.
        clock: seconds since 1970, so that lines of several machines share one time axis.
    """

    def __init__(
        self,
        metrics: Metrics,
        append: Callable[[bytes], object],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._append = append
        self._clock = clock
        self._is_open = True
        self._start_s = self._last_s = clock()
        self.write()

    def tick(self) -> None:
        """Write a line if one is due."""
        now_s = self._clock()
        every_s = max(_FIRST_LINE_S, min(_LINE_EVERY_S, 0.1 * (now_s - self._start_s)))
        if now_s - self._last_s >= every_s:
            self.write()

    def write(self) -> None:
        """Write a line. If that fails, warn once and write no more; the run continues."""
        self._last_s = self._clock()
        metrics = self._metrics
        line = {
            "time_s": round(self._last_s, 3),
            "num_rows": metrics.num_rows,
            "num_errors": metrics.num_errors,
            "completion_tokens": metrics.completion_tokens,
            "wait_s": round(metrics.wait_s, 3),
            "run_s": round(metrics.run_s, 3),
        }
        if self._is_open:
            try:
                self._append(json.dumps(line).encode() + b"\n")
            except OutputError as error:
                self._is_open = False
                log.warning("the run goes on without a time line: %s", error)
