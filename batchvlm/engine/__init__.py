"""Batches -> completions. Knows models and devices; knows no file, no dataset and no task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from batchvlm.config import EngineName, JobConfig
from batchvlm.records import Batch, Completion, Failure


class Engine(Protocol):
    """What the pipeline needs of an engine."""

    def run(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer every sample of every batch exactly once, in any order, by its `row_index`.

        An engine takes the stream, not a batch, so that it may go over from one batch to the next
        without waiting for the slowest row.
        """
        ...


def open_engine(cfg: JobConfig, *, device: str) -> Engine:
    """Load the model and choose the engine that it allows.

    Raises:
        ModelError: the model cannot be loaded.
    """
    match cfg.engine.name:
        case EngineName.auto | EngineName.generate:
            from batchvlm.engine.generate import GenerateEngine

            return GenerateEngine.load(cfg.model, device=device)
