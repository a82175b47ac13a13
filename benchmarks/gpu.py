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
rate of a matrix product, and the bytes of weights, keys and values that decoding reads over that of
a copy, both measured in the same run.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from results import environment, write_section
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from batchvlm.config import ModelConfig
from batchvlm.engine import Engine
from batchvlm.engine.select import choose_engine
from batchvlm.loading import load_processor
from batchvlm.pipeline import run_job
from batchvlm.records import Completion, EngineStats, Failure, Sample
from batchvlm.settings import compose

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, MERGE, TEMPORAL = 14, 2, 2
WORDS = tuple(
    [
        "a",
        "cat",
        "sits",
        "on",
        "the",
        "mat",
        "while",
        "seven",
        "red",
        "boats",
        "cross",
        "the",
        "cold",
        "lake",
        "at",
        "dawn",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model of Qwen2.5-VL's kind."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool
    rope: tuple[int, int, int] = (16, 24, 24)
    vision_depth: int = 32
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    vision_heads: int = 16
    vision_full: tuple[int, ...] = (7, 15, 23, 31)
    window: int = 112
    sides: tuple[int, int] = (448, 1024)
    answers: tuple[int, int] = (16, 256)


SHAPES = {
    "3b": Shape(
        hidden=2048,
        intermediate=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        vocabulary=151936,
        is_tied=True,
    ),
    "7b": Shape(
        hidden=3584,
        intermediate=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        is_tied=False,
    ),
    "tiny": Shape(
        hidden=64,
        intermediate=128,
        layers=2,
        heads=4,
        kv_heads=2,
        vocabulary=512,
        is_tied=True,
        rope=(2, 3, 3),
        vision_depth=2,
        vision_hidden=32,
        vision_intermediate=64,
        vision_heads=4,
        vision_full=(1,),
        window=56,
        sides=(56, 140),
        answers=(2, 12),
    ),
}


def make_processor(shape: Shape) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 8, trainer)
    core.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    image_processor = transformers.Qwen2VLImageProcessor(size=size)
    try:
        video_processor = transformers.Qwen2VLVideoProcessor()
        return transformers.Qwen2_5_VLProcessor(
            image_processor, tokenizer, video_processor, chat_template=TEMPLATE
        )
    except ImportError:

        class WithoutVideo(transformers.Qwen2_5_VLProcessor):  # type: ignore[misc,name-defined]
            @classmethod
            def get_attributes(cls) -> list[str]:
                names = transformers.Qwen2_5_VLProcessor.get_attributes()
                return [name for name in names if name != "video_processor"]

        WithoutVideo.__name__ = "Qwen2_5_VLProcessor"
        return WithoutVideo(image_processor, tokenizer, chat_template=TEMPLATE)


def make_config(shape: Shape, tokenizer: Any) -> Any:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": list(shape.rope),
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": shape.is_tied,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(shape.vision_full),
            "window_size": shape.window,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.is_tied,
    )


def make_model(shape: Shape, folder: Path, device: str, dtype: torch.dtype) -> Any:
    """A model of random weights on the device, and its repository without weights in a folder."""
    processor = make_processor(shape)
    config = make_config(shape, processor.tokenizer)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    vocabulary = processor.tokenizer
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=vocabulary.eos_token_id, pad_token_id=vocabulary.pad_token_id
    )
    return model.eval()


def make_picture(seed: int, sides: tuple[int, int]) -> bytes:
    draw = np.random.default_rng(seed)
    width, height = (int(side) for side in draw.integers(sides[0], sides[1] + 1, 2))
    coarse = draw.integers(0, 255, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = draw.normal(0, 6, (height, width, 1))
    pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=88)
    return out.getvalue()


def make_work(shape: Shape, num_rows: int, path: Path) -> list[dict[str, Any]]:
    draw = random.Random(7)
    with ProcessPoolExecutor() as pool:
        pictures = list(
            pool.map(make_picture, range(num_rows), [shape.sides] * num_rows, chunksize=16)
        )
    rows = [
        {
            "image": {"bytes": picture, "path": f"{i}.jpg"},
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(8, 45))),
            "max_new_tokens": draw.randint(*shape.answers),
        }
        for i, picture in enumerate(pictures)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)
    return rows


class Timed:
    """An engine whose seconds count from the first row that is ready."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.wall_s = self.wait_s = 0.0
        self.num_tokens = 0
        self.sizes: list[tuple[int, int, int]] = []
        """Patches, prompt tokens and answer tokens of each row."""

    @property
    def stats(self) -> EngineStats:
        return self.inner.stats

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        ready = _Watched(samples, self)
        for row_index, outcome in self.inner.run(ready):
            assert isinstance(outcome, Completion), outcome
            self.num_tokens += len(outcome.token_ids)
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
        "wait_s": timed.wait_s,
        "vision_s": stats.vision_s - before.vision_s,
        "prefill_s": stats.prefill_s - before.prefill_s,
        "decode_s": stats.decode_s - before.decode_s,
        "row_steps": stats.row_steps - before.row_steps,
        "sizes": timed.sizes,
    }, timed.inner


def chats(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "image": Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"),
                    },
                    {"type": "text", "text": row["prompt"]},
                ],
            }
        ]
        for row in rows
    ]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run_pipeline(model: Any, folder: Path, rows: Sequence[Any], device: str) -> dict[str, Any]:
    """transformers' pipeline in batches of 8."""
    processor = load_processor(ModelConfig(path=str(folder)))
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    tokens = 0
    synchronize(device)
    start = time.perf_counter()
    for first in range(0, len(rows), 8):
        batch = rows[first : first + 8]
        limit = max(row["max_new_tokens"] for row in batch)
        kwargs = {"max_new_tokens": limit, "min_new_tokens": limit, "do_sample": False}
        pipe(text=chats(batch), batch_size=8, generate_kwargs=kwargs)
        tokens += sum(row["max_new_tokens"] for row in batch)
    synchronize(device)
    return {"wall_s": time.perf_counter() - start, "rows": len(rows), "tokens": tokens}


@torch.inference_mode()
def run_sorted(model: Any, folder: Path, rows: Sequence[Any], device: str) -> dict[str, Any]:
    """`generate()` over batches of 32, sorted by the limit of their answers."""
    processor = load_processor(ModelConfig(path=str(folder)))
    order = sorted(rows, key=lambda row: -row["max_new_tokens"])
    batches = [order[first : first + 32] for first in range(0, len(order), 32)]

    def prepare(batch: Sequence[dict[str, Any]]) -> Any:
        return processor.apply_chat_template(
            chats(batch),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )

    tokens = 0
    synchronize(device)
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        for batch, inputs in zip(batches, pool.map(prepare, batches), strict=True):
            limit = batch[0]["max_new_tokens"]
            inputs = inputs.to(device, model.dtype)
            model.generate(
                **inputs, max_new_tokens=limit, min_new_tokens=limit, do_sample=False
            ).tolist()
            tokens += sum(row["max_new_tokens"] for row in batch)
    return {"wall_s": time.perf_counter() - start, "rows": len(rows), "tokens": tokens}


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of a matrix product, and bytes a second of a copy, read plus written."""
    is_gpu = device.startswith("cuda")
    size, num_bytes = (8192, 4 << 30) if is_gpu else (512, 64 << 20)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median(run: Any) -> float:
        seconds = []
        for turn in range(13):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= 3:
                seconds.append(time.perf_counter() - start)
        return sorted(seconds)[len(seconds) // 2]

    rate = 2 * size**3 / median(lambda: a @ b)
    bandwidth = 2 * num_bytes / median(lambda: target.copy_(source))
    if is_gpu:
        torch.cuda.empty_cache()
    return rate, bandwidth


def roofline(
    shape: Shape, sizes: Sequence[tuple[int, int, int]], rate: float, bandwidth: float, width: int
) -> dict[str, float]:
    """Seconds that the hardware needs at least for rows of these sizes.

    Args:
        shape: the model's.
        sizes: patches, prompt tokens and answer tokens of each row.
        rate: operations a second.
        bandwidth: bytes a second.
        width: rows decoded at once.
    """
    head = shape.hidden // shape.heads
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * head * shape.kv_heads
    layer += 3 * shape.hidden * shape.intermediate
    body = shape.layers * layer
    vocabulary = shape.hidden * shape.vocabulary
    v = shape.vision_hidden
    vision_layer = 4 * v**2 + 3 * v * shape.vision_intermediate
    merged = v * MERGE**2
    per_patch = shape.vision_depth * vision_layer + 3 * TEMPORAL * PATCH**2 * v
    per_patch += (merged**2 + merged * shape.hidden) // MERGE**2
    in_window = (shape.window // PATCH) ** 2
    num_full = len(shape.vision_full)
    vision = prefill = 0.0
    keys_read = 0.0
    for patches, prompt, answer in sizes:
        seen = num_full * patches + (shape.vision_depth - num_full) * min(in_window, patches)
        vision += 2 * patches * per_patch + 4 * patches * seen * v
        # Causal: half of the square.
        prefill += 2 * prompt * body + 2 * prompt**2 * shape.hidden * shape.layers + 2 * vocabulary
        steps = answer - 1
        keys_read += steps * (prompt + answer / 2)
    key_bytes = 2 * 2 * shape.layers * shape.kv_heads * head
    num_steps = sum(answer - 1 for _, _, answer in sizes) / width
    decode = num_steps * 2 * (body + vocabulary) + keys_read * key_bytes
    seconds = {
        "vision": vision / rate,
        "prefill": prefill / rate,
        "decode": decode / bandwidth,
    }
    return seconds | {"all": sum(seconds.values())}


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
        f" tokens. Ceilings: {found['rate'] / 1e12:.0f} TFLOP/s (8192 x 8192 product),"
        f" {found['bandwidth'] / 1e12:.2f} TB/s (copy). Before the first row: engine"
        f" {found['open_s']:.1f} s, compiling and capturing {found['warm_up_s']:.1f} s.",
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
        found["rate"], found["bandwidth"] = ceilings(args.device, dtype)
        model = make_model(shape, folder / "model", args.device, dtype)
        work = folder / "work.parquet"
        rows = make_work(shape, args.rows, work)
        print("work is made", file=sys.stderr, flush=True)
        num_warm = min(args.rows, args.warm_up_rows)
        start = time.perf_counter()
        run = partial(run_batchvlm, model=model, folder=folder / "model", work=work, args=args)
        warm, engine = run(None, num_rows=num_warm, out=folder / "warm")
        found["warm_up_s"], found["open_s"] = warm["wall_s"], warm["open_s"]
        print(f"warm-up {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        mine, engine = run(engine, num_rows=args.rows, out=folder / "out")
        found["batchvlm"] = mine
        if args.profile:
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profiler:
                run(engine, num_rows=num_warm, out=folder / "profiled")
            averages = profiler.key_averages()
            args.profile.write_text(averages.table(sort_by="self_cuda_time_total", row_limit=60))
        found["roofline"] = roofline(
            shape, mine.pop("sizes"), found["rate"], found["bandwidth"], args.width
        )
        report(args, found)
        if args.baseline_rows:
            # Each alone with the model's own forms: what was fused goes on the way out.
            plain = make_model(shape, folder / "model", args.device, dtype)
            del model, engine, run
            some = rows[: args.baseline_rows]
            found["sorted"] = run_sorted(plain, folder / "model", some, args.device)
            report(args, found)
            found["pipeline"] = run_pipeline(plain, folder / "model", some[:16], args.device)
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
    parser.add_argument("--width", type=int, default=256, help="rows decoded at once (roofline)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--set", action="append", default=[], help="a setting of the job")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="profile as many rows as warm up")
    parser.add_argument("--write", action="store_true", help="write the table to RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
