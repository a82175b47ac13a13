"""Rates over time: nothing lost, pauses between runs cut out, hangs within one shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from batchvlm.output.folder import OutputFolder
from batchvlm.report.time_line import read_time_line
from tests.report.make import write_time_line

T = 1_700_000_000.0


def test_processes_are_added_up(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    for name, rate in (("a", 2), ("b", 3)):
        lines = [(T + 10 * k, rate * 10 * k, k, 50 * k, 2.5 * k) for k in range(11)]
        write_time_line(folder, name, lines)
    line = read_time_line(folder)
    assert line is not None
    assert line.active_s == 100
    assert line.rows_per_s == pytest.approx(np.full(10, 5.0))
    assert line.errors_per_s == pytest.approx(np.full(10, 0.2))
    assert line.tokens_per_s == pytest.approx(np.full(10, 10.0))
    assert line.wait_share == pytest.approx(np.full(10, 0.25))
    assert line.resumes_s == []


def test_a_pause_between_runs_is_cut_out_and_a_hang_is_not(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    write_time_line(folder, "a", [(T, 0, 0, 0, 0), (T + 50, 100, 0, 0, 0)])
    day = T + 86_400
    # This one answers, hangs for an hour, and answers again.
    hang = [(day, 0, 0, 0, 0), (day + 50, 100, 0, 0, 0), (day + 3650, 100, 0, 0, 3600)]
    write_time_line(folder, "b", [*hang, (day + 3700, 200, 0, 0, 3600)])
    line = read_time_line(folder)
    assert line is not None
    assert line.active_s == 3750 and line.resumes_s == [50]
    width = np.diff(line.edges_s)
    assert (line.rows_per_s * width).sum() == pytest.approx(300)
    assert line.wait_share[1] > 0.9


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    write_time_line(folder, "a", [(T, 0, 0, 0, 0), (T + 10, 5, 0, 0, 0)])
    path = folder.metrics / "a.jsonl"
    path.write_bytes(b'[1]\n"x"\n{}\n' + path.read_bytes() + b'{"time_s": 17000')
    line = read_time_line(folder)
    assert line is not None and (line.rows_per_s * np.diff(line.edges_s)).sum() == 5


def test_no_lines_no_time_line(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    assert read_time_line(folder) is None
    write_time_line(folder, "a", [(T, 0, 0, 0, 0)])
    assert read_time_line(folder) is None
