"""Memory of a long job: 100,000 rows through every stage but the model.

    python benchmarks/memory.py --rows 100000 [--write]

Reading, preprocessing in worker processes, batching and writing are the real ones; a fake engine
answers at once, so that nothing but the job's own bookkeeping could grow. Prints the resident
memory of this process and of its workers as the job goes on; `--write` puts the table into
RESULTS.md.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from results import environment, write_section

from batchvlm.pipeline import run_job
from batchvlm.records import Completion, EngineStats, FinishReason, Sample
from batchvlm.settings import compose

MIB = 1 << 20


def resident_mib(pid: int) -> float:
    """Resident memory of a process in MiB (Linux's VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]


class FakeEngine:
    """Answers every sample at once and notes the memory at every tenth of the job."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.readings: list[tuple[int, float, float, int]] = []
        self.done = 0
        self.stats = EngineStats()

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion]]:
        for sample in samples:
            yield (
                sample.row_index,
                Completion(
                    row_index=sample.row_index,
                    token_ids=tuple(range(30)),
                    text="A large red circle at the top left. " * 3,
                    finish_reason=FinishReason.STOP,
                    latency_s=0.0,
                ),
            )
            self.done += 1
            if self.done % (self.num_rows // 10) == 0:
                self.note()

    def note(self) -> None:
        workers = sum(resident_mib(child) for child in children_of(os.getpid()))
        self.readings.append(
            (self.done, resident_mib(os.getpid()), workers, threading.active_count())
        )


def write_input(path: Path, num_rows: int) -> None:
    """One tiny image, repeated; in one row group, as the default writers leave it."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    image = pa.array(
        [{"bytes": file.getvalue(), "path": None}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    with pq.ParquetWriter(path, pa.schema([("image", image.type)])) as writer:
        writer.write_table(pa.table({"image": pa.chunked_array([image] * num_rows)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    engine = FakeEngine(args.rows)
    with tempfile.TemporaryDirectory() as folder:
        write_input(Path(folder) / "in.parquet", args.rows)
        cfg = compose(
            "run",
            ["data=parquet", f"data.path={folder}/in.parquet", f"output.dir={folder}/out"],
        )
        summary = run_job(cfg, engine=engine)
    assert summary.metrics.num_success == args.rows
    lines = [
        "| rows done | this process, MiB | its workers, MiB | threads |",
        "|---:|---:|---:|---:|",
        *(f"| {n:,} | {own:.0f} | {kids:.0f} | {t} |" for n, own, kids, t in engine.readings),
        "",
        f"{summary.metrics.num_rows / summary.metrics.run_s:.0f} rows/s through reading, "
        "preprocessing, batching and writing.",
    ]
    table = "\n".join(lines)
    print(table)
    if args.write:
        command = f"python benchmarks/memory.py --rows {args.rows} --write"
        write_section("Memory over a long job", f"{environment(command)}\n\n{table}")


if __name__ == "__main__":
    sys.exit(main())
