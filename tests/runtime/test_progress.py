"""Progress lines and what they count."""

from __future__ import annotations

import logging

import pytest

from batchvlm.errors import ErrorType
from batchvlm.records import EngineStats, Failure, FinishReason, Result, Status
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
    assert [r.getMessage() for r in caplog.records] == [
        "50 of 100 rows (50%), 1.0 rows/s, 4 tok/s, 1 errors, 00:50 left",
        "60 of 100 rows (60%), 1.0 rows/s, 5 tok/s, 1 errors, 00:40 left",
    ]


def test_the_last_row_is_always_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics()
    with Progress(metrics, total=1, log_every_s=10, clock=lambda: 0.0) as progress:
        metrics.count_result(result(0))
        progress.advance()
    assert caplog.records[-1].getMessage().startswith("1 of 1 rows (100%)")


def test_a_bar_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    metrics = Metrics()
    with Progress(metrics, total=2, log_every_s=10) as progress:
        metrics.num_found = 1
        metrics.count_result(result(0, Failure(error_type=ErrorType.OOM, message="")))
        progress.advance()
    shown = capsys.readouterr().err
    assert "2/2" in shown and "tok/s, 1 errors" in shown


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
