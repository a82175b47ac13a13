"""A process that has imported what the command needs, and forks one child for each command.

Reads a line of JSON for each: `{"argv": [...], "cwd": ..., "log": ..., "is_fake": ...,
"signal_after": null or [number, seconds]}`, and says `exit CODE` when the child is gone. The child
calls `batchvlm.cli.main` as the command does; only its imports are done. With `is_fake` an engine
that thinks for two milliseconds a row takes the model's place.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import batchvlm.commands
import batchvlm.engine.generate
import batchvlm.output.compact
import batchvlm.pipeline.pipeline
import batchvlm.pipeline.summary
from batchvlm.cli import main
from batchvlm.model import loading
from batchvlm.records import Completion, EngineStats, FinishReason, Sample


class FastEngine:
    """Answers each row with its number."""

    def __init__(self) -> None:
        self.stats = EngineStats()

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion]]:
        for sample in samples:
            time.sleep(0.002)
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


def run_child(order: dict[str, Any]) -> int:
    """What the child does; returns its exit code."""
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["is_fake"]:
        batchvlm.pipeline.pipeline.open_engine = lambda cfg, **where: FastEngine()
    try:
        return int(main(order["argv"]))
    except BaseException:
        traceback.print_exc()
        return 99


def serve() -> None:
    """Fork a child for each line until there are no more."""
    assert batchvlm.commands and batchvlm.engine.generate and batchvlm.pipeline.summary and loading
    assert batchvlm.output.compact
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = run_child(order)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        if order["signal_after"] is not None:
            number, after_s = order["signal_after"]
            time.sleep(after_s)
            # Perhaps it has ended by itself. Nobody else has its number: it was not waited for.
            os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
        print(f"exit {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve()
