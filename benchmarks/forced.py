"""What it saves not to take a step for each token that a grammar forces: with and without.

    python benchmarks/forced.py [--peer FOLDER] [--rows 64] [--slots 32] [--repeat 5] [--write]

The demo's model lists the objects of held-out scenes by its schema. A larger model, such as m50 of
`benchmarks/peers.py`, fills in an invoice; its weights may be random, so the fields are short. The
answers are the same tokens either way, which is looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchvlm import demo
from batchvlm.config import ColumnsConfig, GenerationConfig, ModelConfig, TaskConfig
from batchvlm.demo.questions import held_out
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.preprocess.preprocessor import Preprocessor, PreprocessSpec
from batchvlm.records import Completion, Form, FormKind, Generation, Record, Sample

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))
from guiding import load, open_engine
from results import environment, write_section

SHORT = {"type": "string", "maxLength": 12}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 9999}
INVOICE = {
    "type": "object",
    "properties": {
        "invoice_number": SHORT,
        "issue_date": {"type": "string", "format": "date"},
        "vendor_name": SHORT,
        "currency": {"enum": ["EUR", "USD", "GBP", "CHF"]},
        "line_items": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"description": SHORT, "quantity": NUMBER, "unit_price": NUMBER},
                "required": ["description", "quantity", "unit_price"],
                "additionalProperties": False,
            },
        },
        "total_amount": NUMBER,
        "payment_status": {"enum": ["paid", "unpaid", "overdue"]},
    },
    "additionalProperties": False,
}
INVOICE["required"] = list(INVOICE["properties"])


def scenes(num: int) -> tuple[list[Sample], Form]:
    """The demo's own work: pictures, and the schema of their objects."""
    spec = PreprocessSpec(
        model=ModelConfig(path=str(demo.MODEL_DIR), dtype="float32"),
        task=TaskConfig(prompt="List the objects as JSON."),
        columns=ColumnsConfig(image="image"),
        generation=GenerationConfig(max_new_tokens=192),
        image_root=None,
        max_source_pixels=1 << 20,
    )
    maker = Preprocessor(spec)
    items = [item for item in held_out(num) if item.kind == "json"][:num]
    samples = []
    for i, item in enumerate(items):
        values = {"image": [{"bytes": data} for data in item.images]}
        record = Record(row=i, row_index=i, source_file="", id=str(i), values=values)
        sample = maker.prepare(record)
        assert isinstance(sample, Sample), sample
        samples.append(sample)
    schema = Path(demo.__file__).with_name("objects.schema.json").read_text()
    return samples, Form(FormKind.JSON_SCHEMA, schema)


def invoices(tokenizer: Any, num: int) -> tuple[list[Sample], Form]:
    """Text alone, since only decoding is looked at."""
    samples = []
    for i in range(num):
        ids = tokenizer(f"Read the invoice, page {i}.", return_tensors="np")["input_ids"]
        # Drawn, or all rows of random weights would say the same.
        settings = Generation(max_new_tokens=400, temperature=1.0, seed=i)
        samples.append(
            Sample(
                row_index=i,
                features={"input_ids": ids},
                image_tokens=0,
                image_sizes=(),
                generation=settings,
            )
        )
    return samples, Form(FormKind.JSON_SCHEMA, json.dumps(INVOICE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="folder of a larger model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    args = parser.parse_args()
    model, tokenizer, name = load(args.peer, dtype=args.dtype)
    samples, form = invoices(tokenizer, args.rows) if args.peer else scenes(args.rows)
    engine = open_engine(model, tokenizer, form=form, num_slots=args.slots)
    longest = engine._decoding.max_run
    answer(engine, samples)  # compiles, and warms up
    found: dict[str, list[dict[str, float]]] = {"a step for each": [], "in one go": []}
    said = {}
    for _ in range(args.repeat):
        for way, max_run in (("a step for each", 0), ("in one go", longest)):
            engine._decoding.max_run = max_run
            counts, said[way] = answer(engine, samples)
            found[way].append(counts)
    assert said["a step for each"] == said["in one go"], "the answers differ"
    num_tokens = sum(len(ids) for ids in said["in one go"].values())
    body = table(found, num_tokens, args.rows, args.slots)
    print(body)
    if args.write:
        command = f"python benchmarks/forced.py --rows {args.rows} --slots {args.slots}"
        command += f" --repeat {args.repeat} --dtype {args.dtype}"
        command += " --peer FOLDER" if args.peer else ""
        title = f"Forced tokens, {name}, {args.dtype}, {args.slots} slots"
        write_section(title, f"{environment(command)}\n\n{body}")


def answer(
    engine: SlotEngine, samples: Sequence[Sample]
) -> tuple[dict[str, float], dict[int, tuple[int, ...]]]:
    """Seconds and counts of answering the rows, and the ids of each answer."""
    stats = engine.stats
    steps, forced, decode_s = stats.row_steps, stats.forced_tokens, stats.decode_s
    cpu, wall = time.process_time(), time.perf_counter()
    outcomes = dict(engine.run(samples))
    counts = {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "decode_s": stats.decode_s - decode_s,
        "row_steps": stats.row_steps - steps,
        "forced": stats.forced_tokens - forced,
    }
    ids = {}
    for row, outcome in outcomes.items():
        assert isinstance(outcome, Completion), outcome
        ids[row] = outcome.token_ids
    return counts, ids


def table(
    found: dict[str, list[dict[str, float]]], num_tokens: int, num_rows: int, num_slots: int
) -> str:
    """Both ways side by side."""
    lines = [
        "| | row-steps | forced | CPU s, median (range) | wall s | decoding, wall s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    medians = {}
    for name, runs in found.items():
        m = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        medians[name] = m
        cpu = [run["cpu_s"] for run in runs]
        lines.append(
            f"| {name} | {m['row_steps']:,.0f} | {m['forced']:,.0f} | {m['cpu_s']:.2f} "
            f"({min(cpu):.2f} to {max(cpu):.2f}) | {m['wall_s']:.2f} | {m['decode_s']:.2f} |"
        )
    one, other = medians.values()
    ratios = [
        statistics.median(b["cpu_s"] / a["cpu_s"] for a, b in zip(*found.values(), strict=True)),
        other["row_steps"] / one["row_steps"],
    ]
    return (
        f"{num_rows} rows, {num_slots} at a time, {num_tokens:,} tokens, the same both ways.\n\n"
        + "\n".join(lines)
        + f"\n\n{1 - ratios[1]:.0%} of the row-steps are saved; the run takes {ratios[0]:.0%} of "
        "the CPU seconds (median of the pairs)."
    )


if __name__ == "__main__":
    main()
