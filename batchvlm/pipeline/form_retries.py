"""Answer rows again in the same run if their answers do not have the required form."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from batchvlm.records import Completion, FinishReason, Sample, derived_seed

_LEAST_TEMPERATURE = 0.5
"""Least temperature of another attempt, because a greedy answer would be the same again."""


class FormRetries:
    """Keeps the samples of rows that may be answered again.

    Args:
        max_times: maximum number of further answers to a row.
        max_bytes: limit for all samples that are kept; rows above it are answered once.
    """

    def __init__(self, max_times: int, *, max_bytes: int) -> None:
        self._max_times = max_times
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._kept: dict[int, Sample] = {}
        self._times: dict[int, int] = {}
        self._queue: deque[Sample] = deque()

    def keep(self, sample: Sample) -> None:
        """Keep a sample until `forget`, if there is room."""
        if self._max_times and self._size_bytes + sample.size_bytes <= self._max_bytes:
            self._kept[sample.row_index] = sample
            self._size_bytes += sample.size_bytes

    def retry(self, row_index: int, completion: Completion) -> bool:
        """Queue the row to be answered again with changed settings; return whether it is."""
        times = self._times.get(row_index, 0)
        sample = self._kept.get(row_index)
        if sample is None or times >= self._max_times:
            return False
        changed = _changed(sample, completion, times)
        self._kept[row_index] = changed
        self._times[row_index] = times + 1
        self._queue.append(changed)
        return True

    def take(self) -> Iterator[Sample]:
        """Yield the queued samples and remove them from the queue."""
        while self._queue:
            yield self._queue.popleft()

    def forget(self, row_index: int) -> int:
        """Drop a row's sample; return the number of answers to the row, at least 1."""
        sample = self._kept.pop(row_index, None)
        if sample is not None:
            self._size_bytes -= sample.size_bytes
        return 1 + self._times.pop(row_index, 0)


def _changed(sample: Sample, completion: Completion, times: int) -> Sample:
    """Return the sample with a higher token limit, or else with another seed."""
    settings = sample.generation
    if completion.finish_reason is FinishReason.LENGTH:
        max_new_tokens = 2 * settings.max_new_tokens
        if sample.room is not None:
            max_new_tokens = min(max_new_tokens, sample.room)
        if max_new_tokens > settings.max_new_tokens:
            return replace(sample, generation=replace(settings, max_new_tokens=max_new_tokens))
    settings = replace(
        settings,
        seed=derived_seed("again", settings.seed, times),
        temperature=max(settings.temperature, _LEAST_TEMPERATURE),
    )
    return replace(sample, generation=settings)
