"""A job in a process of its own, for the tests that kill it: `job.py OUT SHARDS ROWS SEED [wait]`.

It flushes after every second row or so, and then says in a line what is now promised.
"""

from __future__ import annotations

import random
import sys

from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import find_run, save_run

from .make import make_plan, make_result, open_writer


def run_job(folder: OutputFolder, num_shards: int, num_rows: int, seed: int) -> None:
    """Compute whatever is missing, rows in an order drawn from `seed`."""
    draw = random.Random(seed)
    run = find_run(
        folder,
        identity={"task": {"prompt": "What is it?"}},
        layout={"rows_per_shard": num_rows},
        settings={"seed": seed},
        packages={},
        plan=make_plan(num_shards, num_rows),
    )
    save_run(folder, run)
    plan = list(run.plan)
    finished = folder.finished_shards(len(plan))
    todo = [shard for shard in plan if shard.index not in finished]
    draw.shuffle(todo)
    for shard in todo:
        writer = open_writer(folder, plan, shard.index)
        rows = [row for row in range(shard.num_rows) if row not in writer.finished_rows]
        draw.shuffle(rows)
        for row in rows:
            writer.add(make_result(shard, row))
            if draw.random() < 0.5:
                writer.flush()
                print("flushed", shard.index, row, flush=True)
        writer.commit()
        print("committed", shard.index, -1, flush=True)


if __name__ == "__main__":
    out, num_shards, num_rows, seed, *wait = sys.argv[1:]
    if wait:
        print("ready", flush=True)
        sys.stdin.readline()
    run_job(OutputFolder(out), int(num_shards), int(num_rows), int(seed))
