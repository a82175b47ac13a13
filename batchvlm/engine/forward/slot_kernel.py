"""Attention of one new token a row over slots: a Triton kernel for GPUs.

Flash attention is made for many queries: a tile has 128, of which the query heads of one key head
fill eight, or four. Here a tile is only as large as they need, so that a step takes the time of
reading keys and values. Queries are read in place, and the output needs no reordering.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from batchvlm.engine.forward import flash, trial
from batchvlm.engine.forward.layout import Slots, Span
from batchvlm.words import one_line

log = logging.getLogger(__name__)

# Shape legend: B rows, H heads, K key-value heads, G = H // K query heads per key-value head,
# S slot length, L keys of a tile, D head size.

_FEWEST_QUERIES = 16
"""The smallest tile that the tensor cores take."""
_TILE = 64 * 128
"""Elements of keys in one tile; several tiles of keys and of values are loaded at once."""
_LOG2_E = 1.4426950408889634
_TRIED_LENGTH = 1024
_TRIED_BYTES = 256 << 20
"""Bytes of keys and values in the trial: more than any cache holds."""
_TOLERANCE = 2e-2


@cache
def _kernel() -> tuple[Any, Any]:
    """The kernel and the triton module, which is imported only where there is a GPU."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def attend_slots(  # type: ignore[no-untyped-def]
        query,
        key,
        value,
        positions,
        out,
        scale,
        window,
        query_row,
        query_head,
        slot,
        head,
        token,
        NUM_GROUPS: tl.constexpr,
        NUM_QUERIES: tl.constexpr,
        SIZE: tl.constexpr,
        WIDTH: tl.constexpr,
        TILE: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        key_head = tl.program_id(1)
        g = tl.arange(0, NUM_QUERIES)[:, None]
        d = tl.arange(0, WIDTH)[None, :]
        is_query = (g < NUM_GROUPS) & (d < SIZE)
        own_head = key_head * NUM_GROUPS + g
        q_GD = tl.load(query + row * query_row + own_head * query_head + d, is_query, other=0.0)
        length = tl.load(positions + row).to(tl.int32) + 1
        first = tl.maximum(length - window, 0)
        keys = key + row * slot + key_head * head
        values = value + row * slot + key_head * head
        largest_G = tl.full([NUM_QUERIES], float("-inf"), tl.float32)
        sum_G = tl.zeros([NUM_QUERIES], tl.float32)
        out_GD = tl.zeros([NUM_QUERIES, WIDTH], tl.float32)
        for start in range(first // TILE * TILE, length, TILE):
            place_L = start + tl.arange(0, TILE)
            is_seen_L = (place_L >= first) & (place_L < length)
            at_LD = place_L[:, None] * token + d
            is_seen_LD = is_seen_L[:, None] & (d < SIZE)
            k_LD = tl.load(keys + at_LD, is_seen_LD, other=0.0)
            score_GL = tl.dot(q_GD, tl.trans(k_LD)) * scale
            score_GL = tl.where(is_seen_L[None, :], score_GL, float("-inf"))
            now_G = tl.maximum(largest_G, tl.max(score_GL, 1))
            weight_GL = tl.exp2(score_GL - now_G[:, None])
            fade_G = tl.exp2(largest_G - now_G)
            v_LD = tl.load(values + at_LD, is_seen_LD, other=0.0)
            out_GD = out_GD * fade_G[:, None] + tl.dot(weight_GL.to(v_LD.dtype), v_LD)
            sum_G = sum_G * fade_G + tl.sum(weight_GL, 1)
            largest_G = now_G
        out_GD = (out_GD / sum_G[:, None]).to(out.dtype.element_ty)
        num_heads = tl.num_programs(1) * NUM_GROUPS
        tl.store(out + (row * num_heads + own_head) * SIZE + d, out_GD, is_query)

    return attend_slots, triton


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions_B: Tensor,
    *,
    scaling: float | None,
    window: int | None = None,
) -> Tensor:
    """Attend with each row's query to its slot, up to the row's position.

    Args:
        query: [B, H, 1, D] in half precision.
        key: [B, K, S, D] with K a divisor of H; keys past a row's position are not read.
        value: see `key`; it has the same strides.
        positions_B: int64 [B], the position of each row's new token.
        scaling: factor on the scores; None: one over the root of D.
        window: the number of keys that a row attends to, its newest included.

    Returns:
        [B, 1, H, D].
    """
    kernel, triton = _kernel()
    num_rows, num_heads, _, size = query.shape
    num_keys, length = key.shape[1:3]
    num_groups = num_heads // num_keys
    width = triton.next_power_of_2(size)
    out = torch.empty(num_rows, 1, num_heads, size, dtype=query.dtype, device=query.device)
    scale = size**-0.5 if scaling is None else scaling
    # Triton launches on the current device; torch's operators switch to that of their tensors.
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        kernel[(num_rows, num_keys)](
            query,
            key,
            value,
            positions_B,
            out,
            scale * _LOG2_E,
            length if window is None else window,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            key.stride(2),
            NUM_GROUPS=num_groups,
            NUM_QUERIES=max(_FEWEST_QUERIES, triton.next_power_of_2(num_groups)),
            SIZE=size,
            WIDTH=max(16, width),
            TILE=max(16, min(128, _TILE // width)),
            num_warps=4,
            num_stages=3,
        )
    return out


@cache
def is_faster(
    num_heads: int, num_keys: int, size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether this kernel agrees with flash attention on this device and is faster."""
    per_row = 2 * num_keys * _TRIED_LENGTH * size * dtype.itemsize
    num_rows = max(16, min(256, _TRIED_BYTES // per_row))
    try:
        draw = torch.Generator(device).manual_seed(0)
        make = partial(torch.randn, dtype=dtype, device=device, generator=draw)
        query = make(num_rows, num_heads, 1, size)
        shape = num_rows, _TRIED_LENGTH, num_keys, size
        key, value = (make(shape).transpose(1, 2) for _ in range(2))
        # Rows of different lengths, as in the middle of a job.
        num_unused_B = torch.arange(num_rows, device=device) * 37 % (_TRIED_LENGTH // 2)
        positions_B = _TRIED_LENGTH - 1 - num_unused_B
        whole = (Span(0, num_rows, _TRIED_LENGTH),)
        bounds = Slots(positions_B, whole).flash_bounds(
            _TRIED_LENGTH, num_queries=num_heads // num_keys
        )
        ways: list[Callable[[], Tensor]] = [
            partial(flash.attend_slots, query, key, value, bounds, scaling=None),
            partial(attend, query, key, value, positions_B, scaling=None),
        ]
        with torch.inference_mode():
            expected, got = (way().float() for way in ways)
            error = float((got - expected).norm() / expected.norm())
            if not error <= _TOLERANCE:
                log.warning("the kernel for slots is off by %.0e here and is not used", error)
                return False
            is_first = trial.fastest(ways, device) == 1
        log.debug("attention over slots: %s", "triton kernel" if is_first else "flash attention")
        return is_first
    except torch.AcceleratorError:
        raise
    except Exception as error:
        # Triton is missing or does not compile, or there is no memory for a trial.
        log.debug("no kernel for slots: %s", one_line(error))
        return False
