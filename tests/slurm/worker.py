"""The real command with an engine that thinks for a while: `worker.py run ...`, as `batchvlm run`.

ROW_S seconds a row, then the row's number is the answer: so a job is as long as a test needs it,
and costs two cores next to nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator

import batchvlm.pipeline.pipeline
from batchvlm.cli import leave, main
from batchvlm.records import Completion, EngineStats, FinishReason, Sample


class SlowEngine:
    """Answers each row with its number, after a while."""

    def __init__(self, row_s: float) -> None:
        self.row_s = row_s
        self.stats = EngineStats()

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion]]:
        for sample in samples:
            time.sleep(self.row_s)
            yield (
                sample.row_index,
                Completion(
                    row_index=sample.row_index,
                    token_ids=(1, 2),
                    text=f"row {sample.row_index}",
                    finish_reason=FinishReason.STOP,
                    latency_s=0.0,
                ),
            )


if __name__ == "__main__":
    engine = SlowEngine(float(os.environ.get("ROW_S", "0")))
    batchvlm.pipeline.pipeline.open_engine = lambda cfg, **where: engine  # type: ignore[attr-defined]
    leave(main(sys.argv[1:]))
