"""Many questions about each image: what sharing images and beginnings of prompts saves.

    python benchmarks/sharing.py --peer FOLDER --images 16 --questions 16 [--write]

FOLDER is that of `peers.py`. Its first images are asked its first prompts, each about each, once
with sharing and once without, by the engine alone in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from results import environment, write_section

ANSWER = Path(__file__).with_name("answer.py")


def write_work(source: Path, target: Path, num_images: int, num_questions: int) -> None:
    rows = pq.read_table(source).slice(0, max(num_images, num_questions)).to_pylist()
    work = [
        {
            "id": f"{i}-{q}",
            "image": rows[i]["image"],
            "prompt": rows[q]["prompt"],
            "max_new_tokens": rows[q]["max_new_tokens"],
        }
        for i in range(num_images)
        for q in range(num_questions)
    ]
    pq.write_table(pa.Table.from_pylist(work), target)


def run(args: argparse.Namespace, work: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ANSWER), "--model", str(args.peer / "models/m50")]
    command += ["--work", str(work), "--rows", str(args.images * args.questions), *options]
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    lines = [
        "| sharing | CPU s, median | preprocess | vision | prefill | decode | images encoded "
        "| prompt tokens computed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    medians = {}
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work.parquet"
        write_work(args.peer / "work.parquet", work, args.images, args.questions)
        for name, options in (("on", ()), ("off", ("--no-sharing",))):
            runs = [run(args, work, *options) for _ in range(args.repeat)]
            medians[name] = statistics.median(r["cpu_s"] for r in runs)
            one, answers[name] = runs[0], runs[0]["answers"]
            lines.append(
                f"| {name} | {medians[name]:.1f} | {one['preprocess_s']:.1f} "
                f"| {one['vision_s']:.1f} | {one['prefill_s']:.1f} | {one['decode_s']:.1f} "
                f"| {one['images_encoded']} "
                f"| {one['prompt_tokens']:,} |"
            )
    same = sum(answers["on"][key] == ids for key, ids in answers["off"].items())
    lines += [
        "",
        f"On takes {medians['on'] / medians['off']:.2f} of the CPU seconds of off; "
        f"{same} of {len(answers['off'])} answers are the same tokens.",
    ]
    command = f"python benchmarks/sharing.py --peer FOLDER --repeat {args.repeat}"
    markdown = "\n".join([environment(command), "", *lines])
    print(markdown)
    if args.write:
        write_section(f"{args.images} images, {args.questions} questions each", markdown)


if __name__ == "__main__":
    main()
