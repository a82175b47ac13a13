"""The time line: counts as they grow, a line at a time, never in the way of the run."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest

from batchvlm.errors import OutputError
from batchvlm.output.folder import OutputFolder
from batchvlm.runtime.metrics import Metrics, TimeLine


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def test_lines_come_soon_at_first_and_each_ten_seconds_later() -> None:
    clock, metrics, lines = Clock(), Metrics(), list[bytes]()
    time_line = TimeLine(metrics, lines.append, clock=clock)
    for _ in range(4000):
        clock.now_s += 0.1
        metrics.num_rows += 1
        time_line.tick()
    times_s = [json.loads(line)["time_s"] - 1_000_000 for line in lines]
    gaps_s = [b - a for a, b in pairwise(times_s)]
    assert times_s[0] == 0 and gaps_s[0] == pytest.approx(0.5, abs=0.2)
    assert gaps_s[-1] == pytest.approx(10, abs=0.2)
    assert 400 / 10 < len(lines) < 100


def test_each_line_counts_from_the_start_of_the_process() -> None:
    clock, metrics, lines = Clock(), Metrics(), list[bytes]()
    time_line = TimeLine(metrics, lines.append, clock=clock)
    metrics.num_rows, metrics.completion_tokens, metrics.wait_s, metrics.run_s = 7, 91, 0.25, 2.0
    metrics.errors["decode"] += 2
    time_line.write()
    assert lines[-1].endswith(b"\n")
    assert json.loads(lines[-1]) == {
        "time_s": 1_000_000.0,
        "num_rows": 7,
        "num_errors": 2,
        "completion_tokens": 91,
        "wait_s": 0.25,
        "run_s": 2.0,
    }


def test_a_disk_that_refuses_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(line: bytes) -> None:
        raise OutputError("cannot write x: no space left")

    with caplog.at_level(logging.WARNING):
        time_line = TimeLine(Metrics(), refuse)
        time_line.write()
    assert [record.getMessage() for record in caplog.records] == [
        "the run goes on without a time line: cannot write x: no space left"
    ]


def test_lines_are_appended_to_the_folder(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    path = folder.metrics / "task.jsonl"
    folder.append_line(path, b"1\n")
    folder.append_line(path, b"2\n")
    assert path.read_bytes() == b"1\n2\n"
    (tmp_path / "file").write_text("")
    blocked = OutputFolder(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write"):
        blocked.append_line(blocked.metrics / "task.jsonl", b"1\n")
