"""Time limit of a SLURM job: shortly before it, no further rows are started."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping

from batchvlm.runtime.launch import slurm_job

_MAX_SHARE = 0.25
"""The margin is at most this fraction of the time left at the start, so that a short job still
makes progress."""
_SQUEUE_TIMEOUT_S = 10.0
_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")
"""squeue's format: days, hours, minutes, seconds."""


class Deadline:
    """The time after which no further row is started.

    Args:
        margin_s: `runtime.walltime_margin_s`; with 0 there is no deadline.
        environ: newer releases of SLURM set SLURM_JOB_END_TIME, in seconds since 1970, anew for a
            requeued job. For older ones `squeue` is called.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        margin_s: float,
        *,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._begin_until_s: float | None = None
        left_s = _left_s(environ, clock()) if margin_s else None
        if left_s is not None:
            self._begin_until_s = clock() + left_s - min(margin_s, _MAX_SHARE * left_s)
        self.has_come = False
        """Whether `is_near` has returned True."""

    def is_near(self) -> bool:
        """Whether the deadline has passed. Once True, it stays True."""
        if self._begin_until_s is not None and self._clock() >= self._begin_until_s:
            self.has_come = True
        return self.has_come


def _left_s(environ: Mapping[str, str], now_s: float) -> float | None:
    """Return the seconds left to the job; None without a job or a time limit."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdecimal():
        return max(0.0, int(end) - now_s)
    job = slurm_job(environ)
    if not job:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    try:
        reply = subprocess.run(
            command, capture_output=True, text=True, timeout=_SQUEUE_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return read_time_left(reply.stdout.strip())


def read_time_left(text: str) -> float | None:
    """Parse squeue's `1-02:03:04`, `2:03:04` or `3:04` into seconds; None for `UNLIMITED` etc."""
    match = _LEFT.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
