"""Rows and tokens a second on a GPU, beside plain transformers and what the hardware allows.

    python benchmarks/gpu.py --shape 3b --rows 2048 --baseline-rows 64 --write

A model of random weights in the shape of Qwen2.5-VL-3B or 7B in bfloat16 answers rows of one JPEG
(448 to 1,024 pixels a side), a prompt of some 10 to 60 tokens and an answer of 16 to 256 tokens,
whatever the model says of its end. The whole job is run: Parquet in, worker processes, engine,
Parquet out; seconds count from the first prepared row to the last answer. Loading and compiling are
apart.

Beside it, on the first rows, transformers' pipeline (batches of 8 in the order of the file, each to
its own largest limit) and `generate()` over batches of 32 sorted by that limit, images opened and
processed in advance by threads. The roofline counts the operations of encoder and prompts over the
rate of a matrix product; of decoding the operations of products or the reading of weights,
whichever takes longer, and the reading of keys and values over the rate of a copy. Both rates are
measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_peers import run_pipeline, run_sorted
from gpu_roofline import ceilings, roofline
from gpu_work import SHAPES, make_model, make_work
from results import environment, write_section

from batchvlm.engine import Engine
from batchvlm.engine.select import choose_engine
from batchvlm.model.loading import load_processor
from batchvlm.pipeline.pipeline import run_job
from batchvlm.records import Completion, EngineStats, Failure, Sample
from batchvlm.settings.compose import compose


class Timed:
    """An engine whose seconds count from the first row that is ready."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.wall_s = self.wait_s = 0.0
        self.num_tokens = self.num_failed = 0
        self.sizes: list[tuple[int, int, int]] = []
        """Patches, prompt tokens and answer tokens of each row."""

    @property
    def stats(self) -> EngineStats:
        return self.inner.stats

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        ready = _Watched(samples, self)
        for row_index, outcome in self.inner.run(ready):
            if isinstance(outcome, Completion):
                self.num_tokens += len(outcome.token_ids)
            else:
                self.num_failed += 1
                print(f"row {row_index}: {outcome.message}", file=sys.stderr)
            yield row_index, outcome
        self.wall_s = time.perf_counter() - ready.start_s
        self.wait_s = ready.wait_s


class _Watched:
    def __init__(self, inner: Any, timed: Timed) -> None:
        self._inner, self._timed = inner, timed
        self.start_s = self.wait_s = 0.0

    def is_ready(self) -> bool:
        return bool(self._inner.is_ready()) if hasattr(self._inner, "is_ready") else True

    def __iter__(self) -> Iterator[Sample]:
        samples, asked_s = iter(self._inner), time.perf_counter()
        while (sample := next(samples, None)) is not None:
            now_s = time.perf_counter()
            if self.start_s:
                self.wait_s += now_s - asked_s
            self.start_s = self.start_s or now_s
            grid = sample.features["image_grid_thw"]
            size = (int(grid.prod()), sample.prompt_tokens, sample.generation.max_new_tokens)
            self._timed.sizes.append(size)
            yield sample
            asked_s = time.perf_counter()


def run_batchvlm(
    engine: Engine | None,
    model: Any,
    folder: Path,
    work: Path,
    args: argparse.Namespace,
    *,
    num_rows: int,
    out: Path,
) -> tuple[dict[str, Any], Engine]:
    """The whole job over the first rows, by an engine that has compiled before or by a new one."""
    cfg = compose(
        "run",
        [
            "data=parquet",
            f"data.path={work}",
            f"data.max_rows={num_rows}",
            "task=vqa",
            "task.prompt='{{ prompt }}'",
            "model=hub",
            f"model.path={folder}",
            "generation.ignore_eos=true",
            "generation.columns.max_new_tokens=max_new_tokens",
            f"engine.device={args.device}",
            "engine.compile=true",
            f"output.dir={out}",
            "runtime.log_every_s=5",
            *args.set,
        ],
    )
    tokenizer = load_processor(cfg.model).tokenizer
    start = time.perf_counter()
    timed = Timed(engine or choose_engine(model, tokenizer, cfg))
    open_s = time.perf_counter() - start
    stats = timed.stats
    before = replace(stats)
    start = time.perf_counter()
    run_job(cfg, engine=timed)
    around_s = time.perf_counter() - start - timed.wall_s
    print(f"{num_rows} rows: {around_s:.1f} s around, {timed.wall_s:.1f} s", file=sys.stderr)
    assert len(timed.sizes) == num_rows
    return {
        "wall_s": timed.wall_s,
        "open_s": open_s,
        "rows": num_rows,
        "tokens": timed.num_tokens,
        "failed": timed.num_failed,
        "wait_s": timed.wait_s,
        "vision_s": stats.vision_s - before.vision_s,
        "prefill_s": stats.prefill_s - before.prefill_s,
        "decode_s": stats.decode_s - before.decode_s,
        "row_steps": stats.row_steps - before.row_steps,
        "sizes": timed.sizes,
    }, timed.inner


def table(shape: str, args: argparse.Namespace, found: dict[str, Any]) -> str:
    """The results as Markdown."""
    mine, roof = found["batchvlm"], found["roofline"]

    def speed(run: dict[str, Any]) -> tuple[float, float]:
        return run["rows"] / run["wall_s"], run["tokens"] / run["wall_s"]

    rows_s, tokens_s = speed(mine)
    lines = [
        f"**Qwen2.5-VL-{shape.upper()}'s shape, {args.dtype}, {mine['rows']:,} rows**,"
        f" {found['gpu']}",
        "",
        "| system | rows | wall s | rows/s | output tokens/s | batchvlm is |",
        "|---|--:|--:|--:|--:|--:|",
        f"| batchvlm, slots | {mine['rows']:,} | {mine['wall_s']:.1f} | {rows_s:.1f}"
        f" | {tokens_s:,.0f} | |",
    ]
    for name, title in (
        ("sorted", "transformers, sorted by limit, batch 32"),
        ("pipeline", "transformers' pipeline, batch 8"),
    ):
        if name in found:
            its_rows_s, its_tokens_s = speed(found[name])
            lines.append(
                f"| {title} | {found[name]['rows']} | {found[name]['wall_s']:.1f}"
                f" | {its_rows_s:.2f} | {its_tokens_s:,.0f} | {rows_s / its_rows_s:.1f} times |"
            )
    share = roof["all"] / mine["wall_s"]
    lines += [
        f"| roofline | {mine['rows']:,} | {roof['all']:.1f} | {mine['rows'] / roof['all']:.1f}"
        f" | {mine['tokens'] / roof['all']:,.0f} | {share:.0%} of it |",
        "",
        f"Where batchvlm's seconds went, as the GPU spent them (roofline): vision"
        f" {mine['vision_s']:.1f} ({roof['vision']:.1f}), prefill {mine['prefill_s']:.1f}"
        f" ({roof['prefill']:.1f}), decode {mine['decode_s']:.1f} ({roof['decode']:.1f}); waiting"
        f" for data {mine['wait_s']:.1f}. {mine['row_steps']:,} row-steps for {mine['tokens']:,}"
        f" tokens; {mine['failed']} rows failed. Ceilings: {found['rate'] / 1e12:.0f} TFLOP/s"
        f" (8192 x 8192 product), {found['bandwidth'] / 1e12:.2f} TB/s (copy). Before the first"
        f" row: engine {found['open_s']:.1f} s, compiling and capturing"
        f" {found['warm_up_s']:.1f} s.",
    ]
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    shape = SHAPES[args.shape]
    dtype = getattr(torch, args.dtype)
    found: dict[str, Any] = {"gpu": "no GPU"}
    if args.device.startswith("cuda"):
        found["gpu"] = f"one {torch.cuda.get_device_name()}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = folder / "work.parquet"
        # By processes of its own, which come before there is anything on a GPU.
        rows = make_work(shape, args.rows, work)
        print("work is made", file=sys.stderr, flush=True)
        found["rate"], found["bandwidth"] = ceilings(args.device, dtype)
        model = make_model(shape, folder / "model", args.device, dtype)
        num_warm = min(args.rows, args.warm_up_rows)
        start = time.perf_counter()
        run = partial(run_batchvlm, model=model, folder=folder / "model", work=work, args=args)
        warm, engine = run(None, num_rows=num_warm, out=folder / "warm")
        found["warm_up_s"], found["open_s"] = warm["wall_s"], warm["open_s"]
        print(f"warm-up {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        mine, engine = run(engine, num_rows=args.rows, out=folder / "out")
        found["batchvlm"] = mine
        found["roofline"] = roofline(
            shape, mine.pop("sizes"), found["rate"], found["bandwidth"], args.width
        )
        report(args, found)
        if args.baseline_rows:
            # Each alone with the model's own forms: what was fused goes on the way out.
            plain = make_model(shape, folder / "model", args.device, dtype)
            del model, engine, run
            some = rows[: args.baseline_rows]
            found["pipeline"] = run_pipeline(plain, folder / "model", some[:16], args.device)
            report(args, found)
            found["sorted"] = run_sorted(plain, folder / "model", some, args.device)
            report(args, found)


def report(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print what is known, and write it where that is asked for."""
    markdown = table(args.shape, args, found)
    print(markdown, flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, default=str) + "\n", encoding="utf-8")
    if args.write:
        command = f"python benchmarks/gpu.py --shape {args.shape} --rows {args.rows}"
        command += f" --baseline-rows {args.baseline_rows} --write"
        write_section(f"On a GPU, {args.shape.upper()}", f"{environment(command)}\n\n{markdown}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--warm-up-rows", type=int, default=96)
    parser.add_argument("--baseline-rows", type=int, default=0)
    parser.add_argument("--width", type=int, default=512, help="rows decoded at once (roofline)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--set", action="append", default=[], help="a setting of the job")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="write the table to RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
