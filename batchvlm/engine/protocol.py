"""What the pipeline and an engine need of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from batchvlm.records import Completion, EngineStats, Failure, Sample

OnToken = Callable[[int, int], None]
"""Takes a row's index and the next token of its first answer."""

Outcome = tuple[Sample, Completion | Failure]
"""A sample and its answer, or why it has none."""


class Engine(Protocol):
    """What the pipeline needs of an engine."""

    stats: EngineStats

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer every sample exactly once, in any order, by its `row_index`.

        An engine takes the stream and does its own batching, so that it may take up a sample
        whenever it has room for one. A `SampleStream` tells it when taking one would wait.
        """
        ...


@runtime_checkable
class SampleStream(Protocol):
    """Samples that become ready one by one."""

    def __iter__(self) -> Iterator[Sample]: ...

    def is_ready(self) -> bool:
        """Whether the next sample, or the end, is there without waiting."""
        ...
