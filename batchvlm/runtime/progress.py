"""Progress of a run: a bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from tqdm import tqdm

from batchvlm.runtime.claims import Counts
from batchvlm.runtime.logs import DATA
from batchvlm.runtime.metrics import Metrics
from batchvlm.words import number_of

log = logging.getLogger(__name__)

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """Counts over all ranks at one moment."""

    num_done: int
    rows_per_s: float
    tokens_per_s: float
    completion_tokens: int
    num_errors: int
    left_s: float | None
    """None before any work is done."""


class Progress:
    """Shows rows, rows/s, output tokens/s, errors, waits, memory and the time left.

    The time left is extrapolated from the work done since the model was ready, in tokens. Rows
    that earlier runs finished, and the time to load the model, do not count.

    Args:
        metrics: the counters, updated elsewhere. `num_found` may grow during the run, because
            segments are found shard by shard.
        total: rows that this process and the other ranks have to finish together.
        log_every_s: seconds between log lines if stderr is not a terminal.
        others: returns the progress of the other ranks of the launch; None if there are none.
        is_shown: whether this rank shows the progress; one rank shows that of all.
        has_bar: whether to draw a bar if stderr is a terminal.
        memory: returns used and total bytes of the accelerator; None without one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        total: int,
        log_every_s: float,
        others: Callable[[], Iterable[Counts]] | None = None,
        is_shown: bool = True,
        has_bar: bool = True,
        memory: Callable[[], tuple[int, int] | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._total = total
        self._log_every_s = log_every_s
        self._others = others
        self._is_shown = is_shown
        self._memory = memory
        self._clock = clock
        self._start = self._last_line = clock()
        self._num_shown = -1
        self._bar = None
        if is_shown and has_bar and sys.stderr.isatty():
            # smoothing=0: batches finish in bursts, longest first, so only the mean rate is useful.
            self._bar = tqdm(
                total=total,
                initial=metrics.num_found,
                unit="row",
                smoothing=0,
                dynamic_ncols=True,
                bar_format=_BAR,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def left_s(self) -> float | None:
        """Estimated seconds until the last row; None before any work is done."""
        return self._snapshot(self._clock()).left_s

    def advance(self) -> None:
        """Update the bar, or log a line if one is due.

        Called after each finished row, and while this rank waits for others.
        """
        if not self._is_shown:
            return
        now = self._clock()
        every_s = self._log_every_s if self._bar is None else self._bar.mininterval
        mine = self._metrics
        is_due = now - self._last_line >= every_s
        # Called for each row, so it must be cheap. In a launch, only the counts of all ranks tell
        # whether this row is the last.
        if not is_due and mine.num_found + mine.num_rows < self._total and not self._others:
            if self._bar is not None:
                self._bar.initial = mine.num_found
                self._bar.update(mine.num_found + mine.num_rows - self._bar.n)
            return
        snapshot = self._snapshot(now)
        is_last = snapshot.num_done == self._total and self._num_shown != snapshot.num_done
        if not is_due and not is_last:
            return
        self._last_line, self._num_shown = now, snapshot.num_done
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._facts(snapshot)), refresh=False)
            self._bar.update(snapshot.num_done - self._bar.n)
            self._bar.refresh()
            return
        log.info(
            "%d of %d rows (%.0f%%), %.1f rows/s, %s",
            snapshot.num_done,
            self._total,
            100 * snapshot.num_done / self._total,
            snapshot.rows_per_s,
            ", ".join(self._facts(snapshot)),
            extra={
                DATA: {
                    "rows": snapshot.num_done,
                    "total_rows": self._total,
                    "rows_per_s": round(snapshot.rows_per_s, 3),
                    "completion_tokens": snapshot.completion_tokens,
                    "errors": snapshot.num_errors,
                    "wait_share": round(mine.wait_share, 4),
                    "memory_bytes": (self._memory() or (None,))[0],
                    "left_s": None if snapshot.left_s is None else round(snapshot.left_s, 1),
                }
            },
        )

    def _snapshot(self, now: float) -> _Snapshot:
        mine, others = self._metrics, list(self._others()) if self._others else []
        num_rows = mine.num_rows + sum(counts.num_rows for counts in others)
        num_found = mine.num_found + sum(counts.num_found for counts in others)
        tokens = mine.completion_tokens + sum(counts.completion_tokens for counts in others)
        elapsed_s = max(now - self._start, 1e-9)
        # Only the row counts of other ranks are known; their rows are assumed to cost the same.
        share = mine.share_done(self._total - num_found) * num_rows / max(mine.num_rows, 1)
        num_done = num_found + num_rows
        share = 1.0 if num_done >= self._total else min(share, 1.0)
        return _Snapshot(
            num_done=num_done,
            rows_per_s=num_rows / elapsed_s,
            tokens_per_s=tokens / elapsed_s,
            completion_tokens=tokens,
            num_errors=mine.num_errors + sum(counts.num_errors for counts in others),
            left_s=elapsed_s * (1 - share) / share if share > 0 else None,
        )

    def _facts(self, snapshot: _Snapshot) -> list[str]:
        facts = [
            f"{snapshot.tokens_per_s:,.0f} tok/s",
            number_of(snapshot.num_errors, "error"),
            f"{self._metrics.wait_share:.0%} waiting for data",
        ]
        if (memory := self._memory()) is not None:
            used, total = (number / 1e9 for number in memory)
            facts.append(f"{used:.1f} of {total:.0f} GB")
        if snapshot.left_s is not None:
            facts.append(f"{tqdm.format_interval(snapshot.left_s)} left")
        return facts
