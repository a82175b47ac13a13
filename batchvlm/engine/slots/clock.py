"""Seconds of encoding, prefill and decoding; on a GPU measured by CUDA events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchvlm.records import EngineStats

_Event = torch.cuda.Event


class Clock:
    """Adds the seconds of work to an engine's stats.

    On a GPU work ends long after its launch. So events are recorded around it, and are read once
    the GPU has passed them, without synchronizing.

    Args:
        device: where the work runs.
        stats: the stats; `vision_s`, `prefill_s` and `decode_s` are added to.
    """

    def __init__(self, device: torch.device, stats: EngineStats) -> None:
        self._device = device
        self._stats = stats
        self._marks: deque[tuple[str, _Event, _Event]] = deque()

    @contextmanager
    def measure(self, name: str, *, share: float = 1.0) -> Iterator[None]:
        """Add the seconds of the work within to the stats' field `name`, unless it raises.

        Args:
            name: the field.
            share: the share of the CPU's threads that do the work. The seconds are multiplied by
                it, so that those of concurrent work add up to no more than the wall time.
        """
        if self._device.type != "cuda":
            start_s = time.perf_counter()
            yield
            self._add(name, share * (time.perf_counter() - start_s))
            return
        start, end = self._mark(), None
        yield
        end = self._mark()
        self._marks.append((name, start, end))
        while self._marks and self._marks[0][2].query():  # type: ignore[no-untyped-call]
            self._read_first()

    def finish(self) -> None:
        """Wait for all launched work and add its seconds."""
        while self._marks:
            self._marks[0][2].synchronize()
            self._read_first()

    def _mark(self) -> _Event:
        event = _Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read_first(self) -> None:
        name, start, end = self._marks.popleft()
        self._add(name, start.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        setattr(self._stats, name, getattr(self._stats, name) + seconds)
