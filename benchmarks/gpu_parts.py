"""One batch of images, one pack of prompts and one decode step on a GPU, each beside its roofline.

    python benchmarks/gpu_parts.py --shape 3b [--profile FOLDER] [--write]

Where `gpu.py` runs a whole job, this runs its three parts alone, some twenty times each, on random
weights and values: images of 728 by 728 pixels, prompts of 800 tokens, rows in the middle of their
answers. The decode step is measured with flash attention and with the kernel for slots, whichever
the engine's own trial prefers, at several numbers of rows. `--profile` writes the kernels of each
part, by their time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_roofline import ceilings, roofline, synchronize
from gpu_work import PATCH, SHAPES, TEMPORAL, Shape, make_model
from results import environment, write_section

from batchvlm.engine.forward.cache import RowCache, SlotCache
from batchvlm.engine.forward.decoder import Decoder, Piece, Prompt
from batchvlm.engine.forward.fusing import align, is_half_on_gpu
from batchvlm.engine.forward.layout import Newest, Span
from batchvlm.engine.forward.replacements import tune
from batchvlm.engine.slots.vision import ImageFeatures
from batchvlm.records import EngineStats, Generation, PixelTable, Sample

Part = tuple[str, Callable[[], object], float]
"""Its title, what runs it once, and the seconds of its roofline."""


class Parts:
    """The parts of one model's work.

    Args:
        model: of `make_model`.
        shape: its shape.
        args: how large the parts are.
    """

    def __init__(self, model: Any, shape: Shape, args: argparse.Namespace) -> None:
        self._shape, self._args = shape, args
        self._model = model
        self._ceilings = ceilings(args.device, getattr(torch, args.dtype))
        tune(model)
        if is_half_on_gpu(model):
            align(model)
        self._decoder = Decoder(model)
        self.preferred = "nothing: there is no choice"
        """What the engine itself attends to slots with, where it has the choice."""
        if self._decoder.is_varlen:
            has_kernel = self._decoder.has_kernel
            self.preferred = "the kernel for slots" if has_kernel else "flash attention"
        if args.compile:
            self._decoder.fuse()

    def all(self) -> Iterator[Part]:
        """Each part, ready to run."""
        args = self._args
        yield f"{args.images} images", self._vision(), self._roofline("vision")
        yield f"{args.prompts} prompts", self._prefill(), self._roofline("prefill")
        ways = {"flash attention": False, "the kernel for slots": True}
        for num_rows in args.rows:
            roof_s = self._roofline("decode", num_rows)
            if not self._decoder.is_varlen:
                yield f"a step of {num_rows} rows", self._step(num_rows), roof_s
                continue
            for way, has_kernel in ways.items():
                self._decoder.has_kernel = has_kernel
                yield f"a step of {num_rows} rows, {way}", self._step(num_rows), roof_s

    def _roofline(self, name: str, num_rows: int = 1) -> float:
        args = self._args
        patches = (args.side // PATCH) ** 2
        sizes = {
            "vision": [(patches, 0, 1)] * args.images,
            "prefill": [(0, args.prompt, 1)] * args.prompts,
            "decode": [(0, args.context, 2)] * num_rows,
        }[name]
        return roofline(self._shape, sizes, *self._ceilings, num_rows)[name]

    def _vision(self) -> Callable[[], object]:
        args = self._args
        side = args.side // PATCH
        draw = np.random.default_rng(0)
        shape = side * side, 3 * TEMPORAL * PATCH**2
        images = ImageFeatures(self._model, EngineStats(), around=self._decoder.encoding)
        # Bytes, as they come from a worker.
        colours_C256 = np.tile(np.linspace(-1.8, 2.1, 256, dtype=np.float32), (3, 1))
        samples = [
            Sample(
                row_index=i,
                features={
                    "pixel_values": draw.integers(0, 256, shape, dtype=np.uint8),
                    "image_grid_thw": np.array([[1, side, side]]),
                },
                image_tokens=0,
                image_sizes=((args.side, args.side),),
                image_keys=(str(i),),
                pixel_table=PixelTable(values_C256=colours_C256, is_patched=True),
                generation=Generation(max_new_tokens=1),
            )
            for i in range(args.images)
        ]
        units = [unit for sample in samples for unit in images.units(sample)]
        return lambda: images.encode(units)

    def _prefill(self) -> Callable[[], object]:
        args, decoder = self._args, self._decoder
        places_T = torch.arange(args.prompt, device=decoder.device)
        none_T = torch.zeros_like(places_T)
        prompts = [
            Prompt(
                ids_T=places_T % 300,
                positions_RT=places_T.expand(3, -1),
                rope_delta=0,
                types={"mm_token_type_ids": none_T, "token_type_ids": none_T},
            )
            for _ in range(args.prompts)
        ]
        pieces = [Piece(prompt, 0, args.prompt) for prompt in prompts]
        return lambda: decoder.prefill(pieces, None, ends=range(len(pieces)))

    def _step(self, num_rows: int) -> Callable[[], object]:
        shape, decoder, device = self._shape, self._decoder, self._decoder.device
        decoder.forget_slots()
        size = shape.hidden // shape.heads
        dtype = getattr(torch, self._args.dtype)
        like = torch.zeros(shape.kv_heads, 1, size, dtype=dtype, device=device)
        length = self._args.context + 256
        row = RowCache([(like, like)] * shape.layers)
        cache = SlotCache(row, num_slots=num_rows, length=length)
        ids_N = torch.ones(num_rows, dtype=torch.long, device=device)
        # About a quarter shorter or longer than the mean, as rows of one bucket are.
        missing_N = torch.arange(num_rows, device=device) * 37 % (self._args.context // 2)
        positions_N = self._args.context * 5 // 4 - missing_N - 1
        newest = Newest(ids_N, positions_N, deltas_N=torch.zeros_like(ids_N))
        spans = (Span(0, num_rows, length),)
        return lambda: decoder.step(cache, newest, spans)


def median_s(run: Callable[[], object], num: int, device: str) -> float:
    """Seconds of one run among others of its kind; the first ones, which compile, do not count."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(num):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def profiling(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=key, row_limit=40), encoding="utf-8")


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
        parts = Parts(make_model(shape, Path(folder), args.device, dtype), shape, args)
        for title, run, roof_s in parts.all():
            seconds = median_s(run, args.repeat, args.device)
            row = f"| {title} | {seconds * 1e3:.2f} | {roof_s * 1e3:.2f} | {roof_s / seconds:.0%} |"
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
            if args.write:
                write_section(f"Parts on a GPU, {args.shape.upper()}", table(args, parts, rows))
            name = title.replace(" ", "-").replace(",", "") + ".txt"
            with profiling(args.profile / name if args.profile else None):
                run()
                synchronize(args.device)
            del run  # the slots of a step go before those of the next one come
    print(table(args, parts, rows))


def table(args: argparse.Namespace, parts: Parts, rows: Sequence[str]) -> str:
    """What is known so far, as Markdown."""
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else "no GPU"
    command = f"python benchmarks/gpu_parts.py --shape {args.shape} --repeat {args.repeat} --write"
    about = (
        f"Qwen2.5-VL-{args.shape.upper()}'s shape, {args.dtype}, {gpu}, medians of {args.repeat};"
        f" images of {args.side} pixels a side, prompts of {args.prompt} tokens, rows of"
        f" {args.context} tokens on average. The engine's own trial prefers {parts.preferred}."
    )
    head = ["| part | ms | roofline ms | share |", "|---|--:|--:|--:|"]
    return "\n".join([environment(command), "", about, "", *head, *rows])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--side", type=int, default=728, help="pixels")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=800, help="tokens")
    parser.add_argument("--context", type=int, default=860, help="tokens before a step")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", type=Path, help="a folder for the kernels of each part")
    parser.add_argument("--write", action="store_true", help="write the table to RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
