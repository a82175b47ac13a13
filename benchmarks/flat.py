"""Cost of a row over short and long jobs: the demo model on its held-out questions.

    python benchmarks/flat.py --rows 1000 10000 [--write]

Whole jobs through the command's own pipeline, one worker process, loading left out. CPU seconds are
those of the engine's process while it answers.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from results import environment, write_section

from batchvlm.demo.questions import HeldOutItem, held_out
from batchvlm.pipeline.pipeline import run_job
from batchvlm.settings.compose import compose


def write_work(items: list[HeldOutItem], path: Path) -> None:
    table = pa.table(
        {
            "images": [[{"bytes": data, "path": None} for data in i.images] for i in items],
            "question": [item.question for item in items],
        }
    )
    pq.write_table(table, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    lines = [
        "| rows | CPU ms a row | wall ms a row | waiting for data | padding in prompts |",
        "|--:|--:|--:|--:|--:|",
    ]
    # A scene is asked some 13 questions.
    items = held_out(max(args.rows) // 12 + 1)
    with tempfile.TemporaryDirectory() as folder:
        # The first job imports everything; it is not shown.
        for num_rows in [20, *args.rows]:
            work = Path(folder) / f"{num_rows}.parquet"
            write_work(items[:num_rows], work)
            cfg = compose(
                "vqa",
                [
                    "data=parquet",
                    f"data.path={work}",
                    "data.columns.image=images",
                    f"output.dir={folder}/out-{num_rows}",
                    "generation.max_new_tokens=192",
                    "runtime.num_workers=1",
                ],
            )
            start, cpu_start = time.perf_counter(), time.process_time()
            metrics = run_job(cfg).metrics
            cpu_s = time.process_time() - cpu_start
            wall_s = time.perf_counter() - start - metrics.start_s
            assert metrics.num_success == num_rows, metrics.errors
            if num_rows == 20:
                continue
            lines.append(
                f"| {num_rows:,} | {1000 * cpu_s / num_rows:.2f} | {1000 * wall_s / num_rows:.2f} "
                f"| {metrics.wait_share:.1%} | {metrics.engine.padding_share:.1%} |"
            )
            print(lines[-1], flush=True)
    command = f"python benchmarks/flat.py --rows {' '.join(map(str, args.rows))}"
    markdown = "\n".join([environment(command), "", *lines])
    print(markdown)
    if args.write:
        write_section("Cost of a row over short and long jobs", markdown)


if __name__ == "__main__":
    main()
