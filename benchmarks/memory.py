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
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from results import environment, write_section

from batchvlm.config import BatchingConfig
from batchvlm.pipeline.pipeline import Summary, run_job
from batchvlm.records import Completion, EngineStats, FinishReason, Sample
from batchvlm.settings.compose import compose

MIB = 1 << 20
WINDOW = BatchingConfig().sort_window


def resident_mib(pid: int) -> float:
    """Resident memory of a process in MiB (Linux's VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def children_of(pid: int) -> list[int]:
    """The child processes of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(c) for task in tasks for c in (task / "children").read_text().split()]


def workers_of(pid: int) -> list[int]:
    """The worker processes of a process, which its fork server has started."""
    return [
        worker
        for child in children_of(pid)
        if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
        for worker in children_of(child)
    ]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the job holds at one moment."""

    num_rows: int
    own_mib: float
    workers_mib: tuple[float, ...]
    num_threads: int
    num_files: int
    """Open file descriptors of this process."""


class FakeEngine:
    """Answers every sample at once and takes a reading at every tenth of the job.

    It gathers a window first, as an engine does. Meanwhile, and while the window's answers are
    written, as many samples wait before it as may: the first reading already counts them.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.readings: list[Reading] = []
        self.done = 0
        self.stats = EngineStats()

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion]]:
        stream = iter(samples)
        while window := list(islice(stream, WINDOW)):
            for sample in window:
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
        pid = os.getpid()
        self.readings.append(
            Reading(
                num_rows=self.done,
                own_mib=resident_mib(pid),
                workers_mib=tuple(resident_mib(child) for child in workers_of(pid)),
                num_threads=threading.active_count(),
                num_files=len(os.listdir(f"/proc/{pid}/fd")),
            )
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


def run_long_job(folder: Path, num_rows: int, *overrides: str) -> tuple[Summary, list[Reading]]:
    """Caption `num_rows` images with the demo model's processor and no model.

    Args:
        folder: where the input and the output go.
        num_rows: rows of the input.
        overrides: settings, as on the command line.
    """
    engine = FakeEngine(num_rows)
    write_input(folder / "in.parquet", num_rows)
    paths = [f"data.path={folder}/in.parquet", f"output.dir={folder}/out"]
    summary = run_job(compose("run", ["data=parquet", *paths, *overrides]), engine=engine)
    return summary, engine.readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--workers", default="null", help="runtime.num_workers")
    parser.add_argument("--folder", type=Path, help="keep the input, the output and readings.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        overrides = [f"runtime.num_workers={args.workers}"]
        summary, readings = run_long_job(folder, args.rows, *overrides)
        (folder / "readings.json").write_text(json.dumps([asdict(r) for r in readings]))
    assert summary.metrics.num_success == args.rows
    lines = [
        "| rows done | this process, MiB | its workers, MiB | threads | open files |",
        "|---:|---:|---:|---:|---:|",
        *(
            f"| {r.num_rows:,} | {r.own_mib:.0f} | {sum(r.workers_mib):.0f} | {r.num_threads} |"
            f" {r.num_files} |"
            for r in readings
        ),
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
