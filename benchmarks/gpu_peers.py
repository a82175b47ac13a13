"""transformers used plainly, for `gpu.py` to be held against."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_roofline import synchronize
from PIL import Image

from batchvlm.config import ModelConfig
from batchvlm.model.loading import load_processor


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
