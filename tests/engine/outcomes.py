"""Running one batch, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchvlm.engine.protocol import Engine
from batchvlm.records import Sample


def run(engine: Engine, samples: Sequence[Sample]) -> list[Any]:
    """The outcome of each sample of one batch, in their order; each must come exactly once."""
    outcomes = list(engine.run(samples))
    assert sorted(row for row, _ in outcomes) == sorted(s.row_index for s in samples)
    by_row = dict(outcomes)
    return [by_row[sample.row_index] for sample in samples]
