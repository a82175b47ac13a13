"""torch's own flash attention over rows of variable length: on a GPU, in half precision.

Rows are concatenated and each attends to itself alone, without a mask and without padding. The
kernel is part of torch, so no further package is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Shape legend: B rows, T tokens of all rows, L keys of all rows, H heads, K key-value heads,
# D head size, S slot length.

_MAX_HEAD_SIZE = 256


def is_able(query: Tensor) -> bool:
    """Whether the kernel supports queries like these, [.., D]."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and size % 8 == 0
        and size <= _MAX_HEAD_SIZE
        # The kernel needs Ampere or later.
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The rows' offsets in the concatenated queries and keys."""

    query_B1: Tensor
    """int32 [B + 1]: row i's queries are tokens `query_B1[i]` to `query_B1[i + 1]`."""
    key_B1: Tensor
    """int32 [B + 1]: the same for its keys."""
    max_queries: int
    """Queries of the row with the most."""
    max_keys: int
    """Keys of the row with the most."""
    used_B: Tensor | None = None
    """int32 [B]: the number of each row's first keys that are attended to; None: all."""


def attend(
    query_THD: Tensor,
    key_LKD: Tensor,
    value_LKD: Tensor,
    bounds: Bounds,
    *,
    scaling: float | None,
    is_causal: bool,
    window: int | None = None,
) -> Tensor:
    """Attend with each row's queries to its keys.

    A row's last query is at the position of its last key, so its keys may include those of earlier
    tokens.

    Args:
        query_THD: [T, H, D] in half precision on a GPU.
        key_LKD: [L, K, D] with K a divisor of H; `value_LKD` likewise.
        value_LKD: see `key_LKD`.
        bounds: the rows' offsets.
        scaling: factor on the scores; None: one over the root of D.
        is_causal: whether a query attends to no key after its position.
        window: with `is_causal`, the number of keys that a query attends to, its own included.

    Returns:
        [T, H, D].
    """
    # torch 2.13 has a public function for it, `torch.nn.attention.varlen.varlen_attn`; the one in
    # 2.11 has no `seqused_k`.
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query_THD,
        key_LKD,
        value_LKD,
        bounds.query_B1,
        bounds.key_B1,
        bounds.max_queries,
        bounds.max_keys,
        0.0,
        is_causal,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=bounds.used_B,
    )[0]
    return out


def attend_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    *,
    scaling: float | None,
    window: int | None = None,
) -> Tensor:
    """Attend with each row's query to its slot, up to the row's position.

    Args:
        query: [B, H, 1, D].
        key: [B, K, S, D], in memory [B, S, K, D]; `value` likewise.
        value: see `key`.
        bounds: offsets of H // K queries a row, or of one query if there is a window.
        scaling: see `attend`.
        window: see `attend`.

    Returns:
        [B, 1, H, D].
    """
    num_rows, num_heads, _, size = query.shape
    num_keys = key.shape[1]
    # The slots concatenated, as they are in memory: a view.
    key_LKD, value_LKD = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
    if window is not None:
        out_BHD = attend(
            query[:, :, 0],
            key_LKD,
            value_LKD,
            bounds,
            scaling=scaling,
            is_causal=True,
            window=window,
        )
        return out_BHD[:, None]
    # The query heads of one key head become queries of that head: its keys are read once for all.
    num_groups = num_heads // num_keys
    grouped = query.view(num_rows, num_keys, num_groups, size).transpose(1, 2).flatten(0, 1)
    out = attend(grouped, key_LKD, value_LKD, bounds, scaling=scaling, is_causal=False)
    out = out.view(num_rows, num_groups, num_keys, size).transpose(1, 2)
    return out.reshape(num_rows, 1, num_heads, size)
