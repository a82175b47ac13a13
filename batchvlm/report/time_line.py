"""Counts over time, of all processes together, from the lines that each of them left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchvlm.output.folder import OutputFolder
from batchvlm.report.outputs import number, read_lines

_MAX_BINS = 60
_PAUSE_S = 120.0
"""No process for longer than this: a pause between two runs, and not one loading a model."""
_NAMES = ("num_rows", "num_errors", "completion_tokens", "wait_s")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TimeLine:
    """Rates over the time in which the job was running; pauses between two runs are cut out."""

    edges_s: Floats
    """[N + 1] seconds of running time."""
    rows_per_s: Floats
    """[N], of all processes."""
    errors_per_s: Floats
    tokens_per_s: Floats
    wait_share: Floats
    """[N] share of the processes' time spent waiting for data, 0 to 1."""
    resumes_s: Sequence[float]
    """Where the job went on after a pause, in running time."""
    start_s: float
    """Seconds since 1970."""
    end_s: float

    @property
    def active_s(self) -> float:
        return float(self.edges_s[-1])


def read_time_line(folder: OutputFolder) -> TimeLine | None:
    """The time line of a folder; None where no process left one, or none of any length."""
    paths = [path for path, _ in folder.written(folder.metrics) if path.suffix == ".jsonl"]
    processes = [_counts(read_lines(folder, path)) for path in paths]
    return merge([process for process in processes if len(process) > 1])


def _counts(lines: Sequence[Any]) -> Floats:
    """[L, 5]: time, and the counts up to then."""
    rows = [[number(line, "time_s"), *(number(line, name) for name in _NAMES)] for line in lines]
    table = np.array(rows, dtype=np.float64).reshape(-1, 1 + len(_NAMES))
    # A clock that was set back would make rates negative.
    return np.maximum.accumulate(table, axis=0)


def merge(processes: Sequence[Floats]) -> TimeLine | None:
    """Add up processes, each an array [L, 5] of times and growing counts."""
    if not processes:
        return None
    starts_s, active = _spans(processes)
    total_s = float(active[-1])
    if total_s <= 0:
        return None
    num_bins = min(_MAX_BINS, max(1, max(len(process) for process in processes) - 1))
    edges = np.linspace(0, total_s, num_bins + 1)
    sums = np.zeros((5, num_bins))
    for process in processes:
        times = np.interp(process[:, 0], starts_s, active)
        covered = np.clip(edges, times[0], times[-1])
        sums[0] += np.diff(covered)
        for column in range(1, 5):
            sums[column] += np.diff(np.interp(edges, times, process[:, column]))
    width = total_s / num_bins
    with np.errstate(divide="ignore", invalid="ignore"):
        wait = np.where(sums[0] > 0, sums[4] / sums[0], 0.0)
    return TimeLine(
        edges_s=edges,
        rows_per_s=sums[1] / width,
        errors_per_s=sums[2] / width,
        tokens_per_s=sums[3] / width,
        wait_share=np.clip(wait, 0, 1),
        resumes_s=[float(active[i]) for i in range(2, len(active), 2)],
        start_s=float(starts_s[0]),
        end_s=float(starts_s[-1]),
    )


def _spans(processes: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Knots of wall-clock time, two for each span in which a process ran, and of running time.

    A process that hangs is running: the hours in which it got nowhere shall be seen.
    """
    spans: list[list[float]] = []
    for first, last in sorted((process[0, 0], process[-1, 0]) for process in processes):
        if spans and first <= spans[-1][1] + _PAUSE_S:
            spans[-1][1] = max(spans[-1][1], last)
        else:
            spans.append([first, last])
    wall = np.array(spans)
    ends = np.cumsum(wall[:, 1] - wall[:, 0])
    begins = np.concatenate(([0.0], ends[:-1]))
    return wall.ravel(), np.stack([begins, ends], axis=1).ravel()
