"""The interface between the pipeline and its engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from batchvlm.records import Completion, EngineStats, Failure, Sample

OnToken = Callable[[int, int], None]
"""A callback that takes a row's index and the next token of its first answer."""

Outcome = tuple[Sample, Completion | Failure]
"""A sample, and its completion or the reason why it has none."""


class Engine(Protocol):
    """What the pipeline uses of an engine."""

    stats: EngineStats

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        """Yield exactly one outcome for every sample, with its `row_index`, in any order.

        The engine batches the samples itself, so that it can take one whenever it has room. If the
        stream is a `SampleStream`, the engine can ask whether taking one would block.
        """
        ...


@runtime_checkable
class SampleStream(Protocol):
    """A stream of samples that can be asked whether the next one is ready."""

    def __iter__(self) -> Iterator[Sample]: ...

    def is_ready(self) -> bool:
        """Whether `next` returns a sample, or the end, without blocking."""
        ...
