"""How long a job takes to know its work: opening an input and planning its shards.

python benchmarks/plan.py --rows 1000000 --write
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from results import environment, write_section

from batchvlm.config import DataConfig, SourceKind
from batchvlm.plan import plan_shards
from batchvlm.sources import check_columns, open_source

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c4944415408d763f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)
"""One red pixel."""
ROWS_PER_SHARD = 4096
MAX_S = 5.0
"""The plan of a million rows must not take longer."""


def write_input(path: Path, *, num_rows: int, row_group_rows: int | None) -> None:
    """A Parquet file of numbered rows with one image."""
    image = pa.array([{"bytes": PNG, "path": None}]).take(pa.array([0] * num_rows))
    pq.write_table(
        pa.table({"id": pa.array(range(num_rows)), "image": image}),
        path,
        row_group_size=row_group_rows,
    )


def time_plan(path: Path) -> tuple[float, int]:
    """Seconds to open and plan an input, and its number of shards."""
    start = time.perf_counter()
    source = open_source(DataConfig(source=SourceKind.parquet, path=str(path)))
    check_columns(source.schema, {"image": "data.columns.image", "id": "data.columns.id"})
    files = source.files(["image", "id"])
    shards = plan_shards(files, rows_per_shard=ROWS_PER_SHARD, max_rows=None)
    return time.perf_counter() - start, len(shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()

    lines = [
        "| Row groups | Rows | File | Shards | open + check + plan, median (range) |",
        "|---|--:|--:|--:|--:|",
    ]
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for label, row_group_rows in (("as written by default", None), ("of 1,000 rows", 1000)):
            path = Path(folder) / f"{row_group_rows}.parquet"
            write_input(path, num_rows=args.rows, row_group_rows=row_group_rows)
            timed = [time_plan(path) for _ in range(args.repeats)]
            seconds = [s for s, _ in timed]
            slowest = max(slowest, *seconds)
            lines.append(
                f"| {label} | {args.rows:,} | {path.stat().st_size / 2**20:.1f} MiB"
                f" | {timed[0][1]:,} | {statistics.median(seconds) * 1e3:.1f} ms"
                f" ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}) |"
            )
    table = "\n".join(lines)
    print(table)
    if args.write:
        note = (
            f"`output.rows_per_shard={ROWS_PER_SHARD}`; a shard of whole row groups holds 4 of"
            f" 1,000 rows. Limit: {MAX_S:.0f} s."
        )
        command = f"python benchmarks/plan.py --rows {args.rows} --write"
        write_section("Plan", f"{environment(command)}\n\n{table}\n\n{note}")
    if slowest > MAX_S:
        raise SystemExit(f"planning took {slowest:.1f} s, more than {MAX_S} s")


if __name__ == "__main__":
    main()
