"""One line that says how far the run is: a bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

from batchvlm.runtime.metrics import Metrics

log = logging.getLogger(__name__)


class Progress:
    """Shows rows, rows/s, output tokens/s, errors and the time left.

    The time left follows from the rate since the model was ready: rows that earlier runs finished,
    and the time to load the model, do not count.

    Args:
        metrics: what is counted elsewhere and shown here; `num_found` may grow on the way, since
            segments are found shard by shard.
        total: rows that this process owes.
        log_every_s: seconds between lines where stderr is no terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        total: int,
        log_every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._total = total
        self._num_found = metrics.num_found
        self._log_every_s = log_every_s
        self._clock = clock
        self._start = self._last_line = clock()
        self._bar = None
        if sys.stderr.isatty():
            # smoothing=0: batches come in bursts, longest first; only the mean rate is honest.
            self._bar = tqdm(
                total=total,
                initial=metrics.num_found,
                unit="row",
                smoothing=0,
                dynamic_ncols=True,
            )

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

    def advance(self) -> None:
        """Show that one more row is done."""
        now = self._clock()
        elapsed_s = max(now - self._start, 1e-9)
        tokens_per_s = self._metrics.completion_tokens / elapsed_s
        if self._bar is not None:
            num_new = self._metrics.num_found - self._num_found
            self._num_found += num_new
            self._bar.initial += num_new
            self._bar.n += num_new
            self._bar.set_postfix_str(
                f"{tokens_per_s:,.0f} tok/s, {self._metrics.num_errors} errors", refresh=False
            )
            self._bar.update()
            return
        done = self._metrics.num_found + self._metrics.num_rows
        if now - self._last_line >= self._log_every_s or done == self._total:
            self._last_line = now
            rows_per_s = self._metrics.num_rows / elapsed_s
            left_s = (self._total - done) / rows_per_s if rows_per_s else 0.0
            log.info(
                "%d of %d rows (%.0f%%), %.1f rows/s, %.0f tok/s, %d errors, %s left",
                done,
                self._total,
                100 * done / self._total,
                rows_per_s,
                tokens_per_s,
                self._metrics.num_errors,
                tqdm.format_interval(left_s),
            )
