"""The engine alone on a Parquet file: what `peers.py` runs as a process of its own.

    python benchmarks/answer.py --model FOLDER --work FILE --rows 64 --dtype float32 --threads 1

Rows hold `image` {bytes, path}, `prompt` and `max_new_tokens`; EOS is ignored. Samples are prepared
by a thread of this process while the engine works; nothing is done before the clock starts. With
`--processes 2` two processes load a model each, wait for one another, and answer every second row,
as the ranks of a launch do. Prints one line of JSON: seconds, load excluded, and where they went
(of several processes, on the mean); token ids by row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing.synchronize import Barrier
from typing import Any

import pyarrow.parquet as pq
import torch

from batchvlm.config import EngineName
from batchvlm.engine import open_engine
from batchvlm.preprocess.preprocessor import Preprocessor, PreprocessSpec
from batchvlm.records import Completion, Record, Sample
from batchvlm.runtime.prefetch import Prefetcher
from batchvlm.settings.compose import compose

_COUNTS = ("images_encoded", "prompt_tokens", "row_steps")


def main() -> None:
    args = parse_args()
    if args.processes == 1:
        print(json.dumps(answer(args, 0)))
        return
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(args.processes)
    with ProcessPoolExecutor(args.processes, context, _meet_at, (barrier,)) as pool:
        parts = list(pool.map(answer, repeat(args), range(args.processes)))
    answers = {key: ids for part in parts for key, ids in part.pop("answers").items()}
    whole = {key: statistics.fmean(part[key] for part in parts) for key in parts[0]}
    whole |= {key: sum(part[key] for part in parts) for key in (*_COUNTS, "cpu_s")}
    whole["wall_s"] = max(part["wall_s"] for part in parts)
    print(json.dumps({**whole, "answers": answers}))


_barrier: Barrier | None = None
"""Where the processes wait until all have loaded; None: there is but one."""


def _meet_at(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def answer(args: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Load a model, wait until all have, and answer this process's rows."""
    torch.set_num_threads(args.threads)
    cfg = compose(
        "run",
        [
            "data=parquet",
            f"data.path={args.work}",
            "task=vqa",
            "task.prompt='{{ prompt }}'",
            "model=hub",
            f"model.path={args.model}",
            f"model.dtype={args.dtype}",
            "generation.ignore_eos=true",
            "generation.columns.max_new_tokens=max_new_tokens",
            f"engine={args.engine}",
            f"engine.share_images={str(not args.no_sharing).lower()}",
            f"engine.cpu_streams={args.streams or 'null'}",
        ],
    )
    preprocessor = Preprocessor(
        PreprocessSpec(
            model=cfg.model,
            task=cfg.task,
            columns=cfg.data.columns,
            generation=cfg.generation,
            image_root=None,
            max_source_pixels=cfg.data.max_source_pixels,
        )
    )
    engine = open_engine(cfg, device="cpu")
    rows = pq.read_table(args.work).to_pylist()[: args.rows][rank :: args.processes]
    prepare_s = 0.0

    def samples() -> Iterator[Sample]:
        nonlocal prepare_s
        for i, row in enumerate(rows):
            start = time.perf_counter()
            record = Record(row=i, row_index=i, source_file=args.work, id=row["id"], values=row)
            sample = preprocessor.prepare(record)
            assert isinstance(sample, Sample), sample
            prepare_s += time.perf_counter() - start
            yield sample

    if _barrier is not None:
        _barrier.wait()
    start, cpu_start = time.perf_counter(), time.process_time()
    answers: dict[str, Any] = {}
    ahead = Prefetcher(
        samples(), max_items=args.rows, max_bytes=1 << 30, size_of=lambda sample: sample.size_bytes
    )
    with ahead:
        for row_index, outcome in engine.run(ahead):
            assert isinstance(outcome, Completion), outcome
            answers[rows[row_index]["id"]] = outcome.token_ids
    stats = engine.stats
    return {
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu_start,
        "preprocess_s": prepare_s,
        "wait_s": ahead.wait_s,
        "vision_s": stats.vision_s,
        "prefill_s": stats.prefill_s,
        "decode_s": stats.decode_s,
        "images_encoded": stats.images_encoded,
        "prompt_tokens": stats.prompt_tokens,
        "padding_share": stats.padding_share,
        "row_steps": stats.row_steps,
        "answers": answers,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="with `--threads` each")
    parser.add_argument("--streams", type=int, help="engine.cpu_streams")
    parser.add_argument("--engine", default="slots", choices=[str(name) for name in EngineName])
    parser.add_argument("--no-sharing", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
