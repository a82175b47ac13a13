"""Rates over time, summed over all processes, from the time line that each of them wrote."""

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
"""A longer time without any process is a pause between two runs, not the loading of a model."""
_NAMES = ("num_rows", "num_errors", "completion_tokens", "wait_s")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TimeLine:
    """Rates over the running time of the job, which excludes pauses between runs."""

    edges_s: Floats
    """[N + 1] seconds of running time."""
    rows_per_s: Floats
    """[N], summed over all processes."""
    errors_per_s: Floats
    tokens_per_s: Floats
    wait_share: Floats
    """[N] share of the processes' time spent waiting for data, 0 to 1."""
    resumes_s: Sequence[float]
    """The running times at which the job continued after a pause."""
    start_s: float
    """Start in seconds since 1970."""

    @property
    def active_s(self) -> float:
        return float(self.edges_s[-1])


def read_time_line(folder: OutputFolder) -> TimeLine | None:
    """Return the time line of a folder; None if no process wrote one of more than one line."""
    paths = [path for path, _ in folder.written(folder.metrics) if path.suffix == ".jsonl"]
    processes = [_counts(read_lines(folder, path)) for path in paths]
    return merge([process for process in processes if len(process) > 1])


def _counts(lines: Sequence[Any]) -> Floats:
    """Return an array [L, 5]: time and cumulative counts."""
    rows = [[number(line, "time_s"), *(number(line, name) for name in _NAMES)] for line in lines]
    table = np.array(rows, dtype=np.float64).reshape(-1, 1 + len(_NAMES))
    # If the clock was set back, rates would be negative.
    return np.maximum.accumulate(table, axis=0)


def merge(processes: Sequence[Floats]) -> TimeLine | None:
    """Sum processes, each an array [L, 5] of times and cumulative counts.

    Returns:
        None if there are none, or if the running time is 0.
    """
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
    )


def _spans(processes: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Return wall-clock times and the corresponding running times, for interpolation.

    There are two of each for every span in which a process ran. A process that hangs counts as
    running, so that the lost hours are visible.
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
