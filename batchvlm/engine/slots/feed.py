"""Gathers samples for an engine, and waits for one only if the engine has nothing else to do."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from batchvlm.config import BatchingConfig
from batchvlm.engine.protocol import SampleStream
from batchvlm.records import Sample


class Feed:
    """Gathers samples from a stream into windows that can be sorted.

    Samples that become ready while a window is computed join it until it is full, so that the first
    samples need not wait for the others.

    Args:
        samples: the stream; it is taken to be always ready unless it is a `SampleStream`.
        cfg: limits on the number and the bytes of a window's samples, and of those gathered beside.
    """

    def __init__(self, samples: Iterable[Sample], cfg: BatchingConfig) -> None:
        self._samples = iter(samples)
        self._is_ready = samples.is_ready if isinstance(samples, SampleStream) else lambda: True
        self._max_items, self._max_bytes = cfg.sort_window, cfg.max_window_bytes
        self._gathered: deque[Sample] = deque()
        self._size_bytes = 0
        self._num_taken = self._taken_bytes = 0
        """Of the open window."""
        self.is_done = False
        """Whether the stream has ended; gathered samples may remain."""

    def __len__(self) -> int:
        return len(self._gathered)

    @property
    def gathered(self) -> Collection[Sample]:
        """The samples that no window has yet, in the order of the stream."""
        return self._gathered

    @property
    def can_take(self) -> bool:
        """Whether samples are gathered, and the open window has room for one."""
        has_room = self._num_taken < self._max_items and self._taken_bytes < self._max_bytes
        return bool(self._gathered) and has_room

    def gather(self, *, wait: bool) -> None:
        """Take the samples that are ready, up to the limits.

        Args:
            wait: whether to wait for one sample if none is gathered or ready.
        """
        while not self.is_done and self._has_room():
            if not self._is_ready() and not (wait and not self._gathered):
                return
            sample = next(self._samples, None)
            if sample is None:
                self.is_done = True
                return
            self._gathered.append(sample)
            self._size_bytes += sample.size_bytes

    def open_window(self) -> None:
        """Begin a window, which has room for as many samples as the limits allow."""
        self._num_taken = self._taken_bytes = 0

    def take(self) -> list[Sample]:
        """Move gathered samples into the open window, and return them in the stream's order."""
        taken = []
        while self.can_take:
            sample = self._gathered.popleft()
            self._size_bytes -= sample.size_bytes
            self._num_taken += 1
            self._taken_bytes += sample.size_bytes
            taken.append(sample)
        return taken

    def _has_room(self) -> bool:
        return len(self._gathered) < self._max_items and self._size_bytes < self._max_bytes
