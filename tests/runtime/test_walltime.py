"""When it is too late to begin a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchvlm.runtime.walltime import Deadline, read_time_left


def test_a_job_without_an_end_has_no_deadline() -> None:
    assert not Deadline(90, environ={}, clock=lambda: 1e12).is_near()
    assert not Deadline(90, environ={"SLURM_JOB_END_TIME": "Unknown"}).is_near()
    assert not Deadline(0, environ={"SLURM_JOB_END_TIME": "1"}).is_near()


def test_nothing_is_begun_within_the_margin() -> None:
    now = 1000.0
    deadline = Deadline(90, environ={"SLURM_JOB_END_TIME": "2000"}, clock=lambda: now)
    now = 1909.0
    assert not deadline.is_near() and not deadline.has_come
    now = 1910.0
    assert deadline.is_near() and deadline.has_come
    now = 1000.0  # a clock that is set back
    assert deadline.is_near()


def test_a_short_job_gets_on_as_well() -> None:
    now = 1000.0
    deadline = Deadline(90, environ={"SLURM_JOB_END_TIME": "1060"}, clock=lambda: now)
    assert not deadline.is_near()
    now = 1045.0
    assert deadline.is_near()


def test_a_job_that_is_over_begins_nothing() -> None:
    assert Deadline(90, environ={"SLURM_JOB_END_TIME": "500"}, clock=lambda: 1000.0).is_near()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:04", 4),
        ("29:59", 1799),
        ("2:03:04", 7384),
        ("1-02:03:04", 93784),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_what_squeue_says(text: str, seconds: float | None) -> None:
    assert read_time_left(text) == seconds


def test_an_older_slurm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$3" = 71 ] && echo 10:00\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    now = 1000.0
    deadline = Deadline(90, environ={"SLURM_JOB_ID": "71"}, clock=lambda: now)
    now = 1509.0
    assert not deadline.is_near()
    now = 1510.0
    assert deadline.is_near()
    squeue.unlink()
    assert not Deadline(90, environ={"SLURM_JOB_ID": "71"}, clock=lambda: now).is_near()


def test_the_last_element_of_an_array_asks_for_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\necho 10:00\n[ "$3" = 71_9 ] || echo 10:00\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    now = 1000.0
    environ = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "9"}
    deadline = Deadline(90, environ=environ, clock=lambda: now)
    now = 1510.0
    assert deadline.is_near()
