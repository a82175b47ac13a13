"""One line that says how far the run is: a bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

from batchvlm.runtime.logs import DATA
from batchvlm.runtime.metrics import Metrics

log = logging.getLogger(__name__)

_BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class Progress:
    """Shows rows, rows/s, output tokens/s, errors, waits, memory and the time left.

    The time left follows from the work done since the model was ready, counted in tokens: rows
    that earlier runs finished, and the time to load the model, do not count.

    Args:
        metrics: what is counted elsewhere and shown here; `num_found` may grow on the way, since
            segments are found shard by shard.
        total: rows that this process owes.
        log_every_s: seconds between lines where stderr is no terminal.
        has_bar: draw a bar where stderr is a terminal.
        memory: bytes in use on the accelerator and bytes there are; None without one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        total: int,
        log_every_s: float,
        has_bar: bool = True,
        memory: Callable[[], tuple[int, int] | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._total = total
        self._log_every_s = log_every_s
        self._memory = memory
        self._clock = clock
        self._start = self._last_line = clock()
        self._bar = None
        if has_bar and sys.stderr.isatty():
            # smoothing=0: batches come in bursts, longest first; only the mean rate is honest.
            self._bar = tqdm(
                total=total,
                initial=metrics.num_found,
                unit="row",
                smoothing=0,
                dynamic_ncols=True,
                bar_format=_BAR,
            )
            self._num_found = metrics.num_found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def left_s(self) -> float:
        """Seconds until the last row, as far as can be told."""
        elapsed_s = self._clock() - self._start
        share = self._metrics.share_done(self._total - self._metrics.num_found)
        return elapsed_s * (1 - share) / share if share else 0.0

    def advance(self) -> None:
        """Show that one more row is done."""
        now, metrics = self._clock(), self._metrics
        if self._bar is not None:
            num_new = metrics.num_found - self._num_found
            self._num_found += num_new
            self._bar.initial += num_new
            self._bar.n += num_new
            is_last = self._bar.n + 1 >= self._total
            if is_last or now - self._last_line >= self._bar.mininterval:
                self._last_line = now
                self._bar.set_postfix_str(", ".join(self._facts(now)), refresh=False)
            self._bar.update()
            return
        done = metrics.num_found + metrics.num_rows
        if now - self._last_line >= self._log_every_s or done == self._total:
            self._last_line = now
            rows_per_s = metrics.num_rows / max(now - self._start, 1e-9)
            log.info(
                "%d of %d rows (%.0f%%), %.1f rows/s, %s",
                done,
                self._total,
                100 * done / self._total,
                rows_per_s,
                ", ".join(self._facts(now)),
                extra={
                    DATA: {
                        "rows": done,
                        "total_rows": self._total,
                        "rows_per_s": round(rows_per_s, 3),
                        "completion_tokens": metrics.completion_tokens,
                        "errors": dict(metrics.errors),
                        "wait_share": round(metrics.wait_share, 4),
                        "memory_bytes": (self._memory() or (None,))[0],
                        "left_s": round(self.left_s, 1),
                    }
                },
            )

    def _facts(self, now: float) -> list[str]:
        metrics = self._metrics
        tokens_per_s = metrics.completion_tokens / max(now - self._start, 1e-9)
        facts = [
            f"{tokens_per_s:,.0f} tok/s",
            f"{metrics.num_errors} errors",
            f"{metrics.wait_share:.0%} waiting for data",
        ]
        if (memory := self._memory()) is not None:
            used, there = (number / 1e9 for number in memory)
            facts.append(f"{used:.1f} of {there:.0f} GB")
        return [*facts, f"{tqdm.format_interval(self.left_s)} left"]
