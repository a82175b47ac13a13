"""Gathers samples for an engine, and waits for one only if the engine has nothing else to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batchvlm.config import BatchingConfig
from batchvlm.engine.protocol import SampleStream
from batchvlm.records import Sample


class Feed:
    """Gathers samples from a stream into windows that can be sorted.

    Args:
        samples: the stream; it is taken to be always ready unless it is a `SampleStream`.
        cfg: limits on the number and the bytes of gathered samples.
    """

    def __init__(self, samples: Iterable[Sample], cfg: BatchingConfig) -> None:
        self._samples = iter(samples)
        self._is_ready = samples.is_ready if isinstance(samples, SampleStream) else lambda: True
        self._max_items, self._max_bytes = cfg.sort_window, cfg.max_window_bytes
        self._gathered: list[Sample] = []
        self._size_bytes = 0
        self.is_done = False
        """Whether the stream has ended; gathered samples may remain."""

    def __len__(self) -> int:
        return len(self._gathered)

    @property
    def gathered(self) -> Sequence[Sample]:
        """The samples of the next window so far, in the order of the stream."""
        return self._gathered

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

    def take_window(self) -> list[Sample]:
        """Remove and return all gathered samples, in the order of the stream."""
        window, self._gathered, self._size_bytes = self._gathered, [], 0
        return window

    def _has_room(self) -> bool:
        return len(self._gathered) < self._max_items and self._size_bytes < self._max_bytes
