"""Progress lines and what they count."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from batchvlm.errors import ErrorType
from batchvlm.records import EngineStats, Failure, FinishReason, Result, Status
from batchvlm.runtime.claims import Counts
from batchvlm.runtime.logs import DATA
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.progress import Progress


def result(row: int, failure: Failure | None = None) -> Result:
    return Result(
        row=row,
        row_index=row,
        source_file="f",
        id=str(row),
        status=Status.ERROR if failure else Status.SUCCESS,
        failure=failure,
        completion_tokens=None if failure else 5,
        finish_reason=None if failure else FinishReason.STOP,
    )


def test_the_time_left_follows_from_this_runs_own_rate(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    metrics = Metrics(num_found=15)
    caplog.set_level(logging.INFO)
    with Progress(metrics, total=100, log_every_s=10, clock=lambda: now) as progress:
        for row in range(20):
            now += 1.0
            if row == 3:
                metrics.num_found += 25  # segments of a shard that is opened on the way
            failure = Failure(error_type=ErrorType.DECODE, message="") if row == 0 else None
            metrics.count_result(result(row, failure))
            progress.advance()
    # 20 rows in 20 s, 40 were there before, so 40 rows and 40 s are left.
    # One of 10 rows failed and cost nothing, which no later row is expected to do more often.
    assert [r.getMessage() for r in caplog.records] == [
        "50 of 100 rows (50%), 1.0 rows/s, 4 tok/s, 1 error, 0% waiting for data, 00:50 left",
        "60 of 100 rows (60%), 1.0 rows/s, 5 tok/s, 1 error, 0% waiting for data, 00:40 left",
    ]
    assert caplog.records[-1].__dict__[DATA] == {
        "rows": 60,
        "total_rows": 100,
        "rows_per_s": 1.0,
        "completion_tokens": 95,
        "errors": 1,
        "wait_share": 0.0,
        "memory_bytes": None,
        "left_s": 40.0,
    }


@dataclass
class Simulated:
    """A job whose rows differ in cost by a factor of hundreds, run longest first by windows.

    A token of an answer costs as much as ten of a prompt; nobody tells the progress so.
    """

    seed: int
    now: float = 0.0
    num_rows: int = 8000
    window: int = 512

    def run(self, metrics: Metrics, look: Callable[[float], None]) -> float:
        """Answer every row; `look` is called after each one. Returns the time that it took."""
        draw = random.Random(self.seed)
        rows = [
            (int(draw.lognormvariate(5, 1.2)) + 20, 1 + int(draw.expovariate(1 / 60)))
            for _ in range(self.num_rows)
        ]
        ahead = 0
        for start in range(0, self.num_rows, self.window):
            window = sorted(rows[start : start + self.window], reverse=True)
            # Workers are a window ahead.
            while ahead < min(start + 2 * self.window, self.num_rows):
                metrics.count_prepared(rows[ahead][0])
                ahead += 1
            for i, (prompt, answer) in enumerate(window):
                is_error = (start + i) % 10 == 0
                prompt_s, decode_s = 0.001 * prompt, 0.0 if is_error else 0.01 * answer
                self.now += prompt_s + decode_s
                metrics.engine.prefill_s += prompt_s
                metrics.engine.prompt_tokens += prompt
                metrics.engine.decode_s += decode_s
                failure = Failure(error_type=ErrorType.OOM, message="") if is_error else None
                done = replace(
                    result(start + i, failure),
                    prompt_tokens=prompt,
                    completion_tokens=None if is_error else answer,
                )
                metrics.count_result(done)
                look(self.now)
        return self.now


@pytest.mark.parametrize("seed", range(4))
def test_the_time_left_is_right_after_a_tenth_of_a_skewed_job(seed: int) -> None:
    whole_s = Simulated(seed).run(Metrics(), lambda now: None)
    job, metrics = Simulated(seed), Metrics()
    found: dict[str, float] = {}
    with Progress(metrics, total=job.num_rows, log_every_s=1e9, clock=lambda: job.now) as progress:

        def look(now: float) -> None:
            for share in (0.1, 0.25, 0.5):
                if now >= share * whole_s and f"{share}" not in found:
                    assert progress.left_s is not None
                    found[f"{share}"] = progress.left_s / (whole_s - now)
                    by_rows = now * (job.num_rows / metrics.num_rows - 1)
                    found[f"{share} by rows"] = by_rows / (whole_s - now)

        job.run(metrics, look)
        assert progress.left_s == pytest.approx(0, abs=1e-6)
    for share in ("0.1", "0.25", "0.5"):
        assert found[share] == pytest.approx(1, abs=0.1)
    # Which is not for nothing: in the middle of a window, rows alone tell less.
    assert abs(found["0.1 by rows"] - 1) > 1.5 * abs(found["0.1"] - 1)


def test_the_last_row_is_always_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics()
    with Progress(metrics, total=1, log_every_s=10, clock=lambda: 0.0) as progress:
        metrics.count_result(result(0))
        progress.advance()
    assert caplog.records[-1].getMessage().startswith("1 of 1 rows (100%)")


def test_no_time_is_left_while_nothing_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics(num_prepared=3, prepared_tokens=30)
    with Progress(metrics, total=5, log_every_s=0, clock=lambda: 1.0) as progress:
        assert progress.left_s is None
        progress.advance()
    (line,) = caplog.records
    assert line.getMessage().endswith("0 errors, 0% waiting for data")
    assert line.__dict__[DATA]["left_s"] is None


def test_a_bar_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    metrics = Metrics()
    memory = (3_000_000_000, 80_000_000_000)
    with Progress(metrics, total=2, log_every_s=10, memory=lambda: memory) as progress:
        metrics.num_found = 1
        metrics.count_result(result(0, Failure(error_type=ErrorType.OOM, message="")))
        progress.advance()
    shown = capsys.readouterr().err
    assert "2/2" in shown and "tok/s, 1 error" in shown
    assert "0% waiting for data, 3.0 of 80 GB, 00:00 left" in shown


def test_metrics_of_batches_and_rows() -> None:
    metrics = Metrics(engine=EngineStats(num_batches=1, prompt_tokens=40, prompt_cells=60))
    assert metrics.engine.padding_share == pytest.approx(1 / 3)
    metrics.count_result(result(0))
    metrics.count_result(result(1, Failure(error_type=ErrorType.OOM, message="")))
    metrics.run_s, metrics.wait_s = 2.0, 0.5
    plain = metrics.as_dict()
    assert plain["engine"]["num_batches"] == 1
    assert plain["errors"] == {"oom": 1} and plain["finish_reasons"] == {"stop": 1}
    assert (plain["rows_per_s"], plain["wait_share"]) == (1.0, 0.25)


def test_rank_0_shows_all_ranks_and_the_others_show_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    others = [Counts(num_rows=30, num_found=10, num_errors=1, completion_tokens=60)]
    shown = Progress(
        Metrics(num_rows=10, completion_tokens=20, num_found=20),
        total=100,
        log_every_s=10,
        others=lambda: others,
        clock=lambda: now,
    )
    hidden = Progress(Metrics(num_rows=9), total=9, log_every_s=0, is_shown=False)
    now = 10.0
    for progress in (shown, hidden):
        progress.advance()
    # 40 rows in 10 s, 30 are left.
    assert [r.getMessage() for r in caplog.records] == [
        "70 of 100 rows (70%), 4.0 rows/s, 8 tok/s, 1 error, 0% waiting for data, 00:07 left"
    ]
