"""What `plan --calibrate` and a running job say of the time that is left, beside what came.

    python benchmarks/foretold.py --rows 20000 [--write]

The demo model answers its held-out questions by whole commands, as people type them: answers of one
to some sixty tokens, one and two images a row, a line of log each second. Of each line between a
tenth and nine tenths of the job the time left that it told is held against what came; they are off
by a share of the whole job's time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flat import write_work
from results import environment, write_section

from batchvlm.demo.questions import held_out

BATCHVLM = [sys.executable, "-m", "batchvlm"]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*BATCHVLM, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return done


@dataclass(frozen=True)
class Look:
    """A line of the log that tells the time left."""

    share: float
    """Of the job's time that had gone by."""
    told_s: float
    left_s: float
    """What came."""

    @property
    def error(self) -> float:
        """By how much of the job's time the end was told too late."""
        return (self.told_s - self.left_s) * (1 - self.share) / self.left_s


def look_back(lines: list[dict[str, Any]]) -> tuple[float, list[Look]]:
    """Seconds of the job with loading, and the lines of its log between a tenth and nine tenths."""
    at = [datetime.fromisoformat(line["time"]).timestamp() for line in lines]
    end = at[-1]
    told = [
        (when, line["left_s"])
        for when, line in zip(at, lines, strict=True)
        if line.get("left_s") is not None
    ]
    # Rows are answered from some second on, which the log does not name: that of the first line at
    # the latest.
    start = told[0][0]
    looks = [Look((when - start) / (end - start), left_s, end - when) for when, left_s in told]
    return end - at[0], [look for look in looks if 0.1 <= look.share <= 0.9]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.parquet"
        write_work(held_out(args.rows // 12 + 1)[: args.rows], work)
        job = [
            *("task=vqa", "data=parquet", f"data.path={work}", "data.columns.image=images"),
            *("task.prompt='{{ question }}'", f"output.dir={folder}/out"),
        ]
        plan = json.loads(command("plan", "--calibrate", "--json", *job).stdout)
        done = command("run", *job, "runtime.log_json=true", "runtime.log_every_s=1")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    total_s, looks = look_back(lines)
    worst = max(looks, key=lambda look: abs(look.error))
    half = min(looks, key=lambda look: abs(look.share - 0.5))
    table = [
        "| when | told, s | came, s | off by |",
        "|---|--:|--:|--:|",
        f"| before: `plan --calibrate` | {plan['estimated_s']:.0f} | {total_s:.0f} |"
        f" {plan['estimated_s'] / total_s - 1:+.0%} |",
    ]
    for name, look in (
        ("after a tenth", looks[0]),
        ("after a half", half),
        (f"worst of {len(looks)} lines between, at {worst.share:.0%}", worst),
    ):
        told = f"{look.told_s:.0f} | {look.left_s:.0f} | {look.error:+.0%}"
        table.append(f"| {name}: time left | {told} |")
    line = environment(f"python benchmarks/foretold.py --rows {args.rows}")
    about = f"{args.rows:,} questions, {lines[-1]['rows_per_s']:.0f} rows/s."
    markdown = "\n".join([line, "", about, "", *table])
    print(markdown)
    if args.write:
        write_section("Time foretold", markdown)


if __name__ == "__main__":
    main()
