"""JSON of the demo's model, guided and free: how much of it is valid, and how much of it is true.

    python benchmarks/demo_json.py [--scenes 500] [--write]

Scenes of its little world that it was not trained on, each asked for its objects as JSON, through
the whole pipeline.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchvlm.demo.questions import HeldOutItem, held_out
from batchvlm.pipeline.pipeline import run_job
from batchvlm.settings.compose import compose

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))
from results import environment, write_section

SCHEMA = Path(__file__).parent.parent / "batchvlm" / "demo" / "objects.schema.json"
MAX_NEW_TOKENS = 192


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What came of all scenes, one way."""

    num_valid: int
    num_exact: int
    """The text is that of the true answer."""
    num_true: int
    """The value is."""
    constraints: Counter[str | None]
    wall_s: float


def answer(items: Sequence[HeldOutItem], folder: Path, guided: str) -> Answers:
    """Ask the model, guided or not; each answer is validated either way."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": item.images[0], "path": None} for item in items], image)
    table = pa.table({"image": images, "question": [item.question for item in items]})
    pq.write_table(table, folder / "in.parquet")
    start_s = time.perf_counter()
    run_job(
        compose(
            "extract",
            [
                *("data=parquet", f"data.path={folder / 'in.parquet'}", "model=demo"),
                *(f"output.dir={folder / guided}", 'task.prompt="{{ question }}"'),
                *(f"task.output.json_schema={SCHEMA}", f"task.output.guided={guided}"),
                f"generation.max_new_tokens={MAX_NEW_TOKENS}",
            ],
        )
    )
    wall_s = time.perf_counter() - start_s
    rows = ds.dataset(folder / guided / "data").to_table().sort_by("row_index").to_pylist()
    pairs = list(zip(rows, items, strict=True))
    return Answers(
        num_valid=sum(row["json_valid"] is True for row in rows),
        num_exact=sum(row["generated_text"] == item.answer for row, item in pairs),
        num_true=sum(row["parsed"] == json.loads(item.answer) for row, item in pairs),
        constraints=Counter(row["constraint"] for row in rows),
        wall_s=wall_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    items = [item for item in held_out(args.scenes) if item.kind == "json"]
    lines = [
        "| | valid | exact text | true value | constraint | wall s |",
        "|---|--:|--:|--:|---|--:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, guided in (("free", "off"), ("guided", "auto")):
            found = answer(items, Path(folder), guided)
            shares = (found.num_valid, found.num_exact, found.num_true)
            held = ", ".join(f"{count} {kind}" for kind, count in found.constraints.items() if kind)
            cells = " | ".join(f"{num / len(items):.1%}" for num in shares)
            lines.append(f"| {name} | {cells} | {held or '-'} | {found.wall_s:.1f} |")
    body = (
        f"{len(items)} held-out scenes, greedy, at most {MAX_NEW_TOKENS} tokens; "
        "one run each way, with its loading.\n\n" + "\n".join(lines)
    )
    print(body)
    if args.write:
        command = f"python benchmarks/demo_json.py --scenes {args.scenes}"
        packages = ("torch", "transformers", "llguidance")
        write_section(
            "JSON of the demo's model, guided and free",
            f"{environment(command, packages)}\n\n{body}",
        )


if __name__ == "__main__":
    main()
