"""What it costs to hold rows to their schemas: guided against free, 32 rows in flight.

    python benchmarks/guided.py [--peer FOLDER] [--rows 64] [--tokens 64] [--repeat 3] [--write]

The rows have mixed schemas, ignore the end of sequence and so answer with the same number of
tokens either way. Without `--peer` the demo's model answers, of 1.6 million parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.records import Completion, Generation, Sample

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))
from guiding import load, open_engine
from results import environment, write_section

COLORS = ["red", "green", "blue", "yellow"]


def schema_of(i: int) -> dict[str, Any]:
    """Sixteen schemas that go on for as long as there is room."""
    part = [
        {"type": "integer"},
        {"enum": COLORS},
        {"type": "string"},
        {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "boolean"}}},
    ][i % 4]
    items = {"type": "object", "properties": {f"k{i % 16}": part}, "required": [f"k{i % 16}"]}
    return {"type": "array", "items": items, "minItems": 1000}


def samples(tokenizer: Any, num: int, num_tokens: int, *, guided: bool) -> list[Sample]:
    made = []
    for i in range(num):
        ids = tokenizer(f"List the objects as JSON. {i}", return_tensors="np")["input_ids"]
        settings = Generation(max_new_tokens=num_tokens, ignore_eos=True, stop_on_repetition=False)
        schema = json.dumps(schema_of(i)) if guided else None
        made.append(
            Sample(
                row_index=i,
                features={"input_ids": ids},
                image_tokens=0,
                image_sizes=(),
                generation=settings,
                json_schema=schema,
            )
        )
    return made


def seconds(engine: SlotEngine, rows: Sequence[Sample]) -> tuple[float, float]:
    """CPU and wall seconds of answering the rows."""
    cpu, wall = time.process_time(), time.perf_counter()
    outcomes = [outcome for _, outcome in engine.run(rows)]
    assert all(isinstance(o, Completion) for o in outcomes)
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="folder of a larger model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    args = parser.parse_args()
    model, tokenizer, name = load(args.peer, dtype="float32", device=args.device)
    engine = open_engine(model, tokenizer, form=None, num_slots=32)
    free = samples(tokenizer, args.rows, args.tokens, guided=False)
    guided = samples(tokenizer, args.rows, args.tokens, guided=True)
    seconds(engine, [replace(row, row_index=i) for i, row in enumerate(guided)])  # compiles
    found: dict[str, list[tuple[float, float]]] = {"free": [], "guided": []}
    for _ in range(args.repeat):
        found["free"].append(seconds(engine, free))
        found["guided"].append(seconds(engine, guided))
    num_tokens = args.rows * args.tokens
    lines = ["| | CPU s, median | wall s, median | tokens/s |", "|---|--:|--:|--:|"]
    medians = {}
    for way, times in found.items():
        cpu, wall = (statistics.median(t[i] for t in times) for i in (0, 1))
        medians[way] = cpu, wall
        lines.append(f"| {way} | {cpu:.2f} | {wall:.2f} | {num_tokens / wall:,.0f} |")
    ratios = [medians["free"][i] / medians["guided"][i] for i in (0, 1)]
    body = (
        f"{name}, {len(tokenizer):,} tokens, {args.rows} rows of {args.tokens} tokens, 32 at a "
        f"time, 16 schemas.\n\n" + "\n".join(lines) + f"\n\nGuided has {ratios[1]:.0%} of free's "
        f"throughput, {ratios[0]:.0%} by CPU seconds."
    )
    print(body)
    if args.write:
        command = f"python benchmarks/guided.py --rows {args.rows} --tokens {args.tokens}"
        command += " --peer FOLDER" if args.peer else ""
        write_section(f"Guided against free, {name}", f"{environment(command)}\n\n{body}")


if __name__ == "__main__":
    main()
