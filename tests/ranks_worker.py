"""The real command, whose ranks wait for one another before the first answer.

`ranks_worker.py run ...` as `batchvlm run`. Each rank has claimed rows and loaded the model by
then, so all of them answer some, however small the job and however busy the machine.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import batchvlm.pipeline.pipeline
from batchvlm.cli import leave, main
from batchvlm.records import Completion, Failure, Sample

_MAX_WAIT_S = 120.0


class Together:
    """An engine that begins when each rank has its first row."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.stats = engine.stats
        self._has_waited = False

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        rows = iter(samples)
        first = list(itertools.islice(rows, 1))
        if not self._has_waited:
            self._has_waited = True
            _wait_for_all()
        return self._engine.run(itertools.chain(first, rows))  # type: ignore[no-any-return]


def _wait_for_all() -> None:
    meeting = Path(os.environ["MEETING"])
    size = int(os.environ.get("MEETING_SIZE", os.environ["WORLD_SIZE"]))
    (meeting / os.environ["RANK"]).touch()
    end = time.monotonic() + _MAX_WAIT_S
    while len(list(meeting.iterdir())) < size:
        assert time.monotonic() < end, "the other ranks never came"
        time.sleep(0.05)


if __name__ == "__main__":
    open_engine = batchvlm.pipeline.pipeline.open_engine
    if "MEETING" in os.environ:
        batchvlm.pipeline.pipeline.open_engine = (  # type: ignore[attr-defined]
            lambda cfg, **where: Together(open_engine(cfg, **where))
        )
    leave(main(sys.argv[1:]))
