"""What the hardware allows: its two ceilings, and what `gpu.py`'s rows need under them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from gpu_work import MERGE, PATCH, TEMPORAL, Shape


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


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
    row_steps = sum(answer - 1 for _, _, answer in sizes)
    weights = body + vocabulary
    products_s = 2 * row_steps * weights / rate
    reading_weights_s = 2 * row_steps / width * weights / bandwidth
    seconds = {
        "vision": vision / rate,
        "prefill": prefill / rate,
        "decode": max(products_s, reading_weights_s) + keys_read * key_bytes / bandwidth,
    }
    return seconds | {"all": sum(seconds.values())}
