"""Attention on a CPU as batched matrix products, if these are faster than torch's own attention.

Unless the CPU has matrix units for half precision, torch's attention is no faster in it than in
float32, and in both it multiplies small blocks. Here one batched product takes many heads, and the
scores are stored in between, rounded as in transformers' eager attention. A trial decides which of
the two is used.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from batchvlm.engine.forward import trial

# Shape legend: B images, H heads, K key-value heads, G = H // K query heads per key-value head, T
# queries, L keys, D head size, X heads of all images concatenated, or key-value heads.

_SCORES = 1 << 20
"""Scores of images computed at once: few enough to stay in the CPU's cache."""
_QUERIES = 192
"""Queries of a prompt computed at once: a larger block computes more scores that are masked."""
FEWEST_TOKENS = 100
"""Shorter prompts and images are left to torch's attention, which is as fast for them."""
_PROMPT_SCORES = 16 << 20
"""Scores of a prompt stored at once. Longer prompts are left to torch, which stores none."""
_TRIAL_PATCHES = 512
_TRIAL_TOKENS = 256


def attend_images(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scale: float) -> Tensor:
    """Attend among all patches of each image.

    Args:
        query_BHTD: [B, H, T, D]; the others likewise.
        key_BHTD: see `query_BHTD`.
        value_BHTD: see `query_BHTD`.
        scale: factor on the scores.

    Returns:
        [B, H, T, D].
    """
    num_tokens = query_BHTD.shape[2]
    num_heads = max(1, _SCORES // num_tokens**2)
    num_queries = min(num_tokens, max(1, _SCORES // num_tokens))
    query_XTD, key_XTD, value_XTD = (
        x.flatten(0, 1).contiguous() for x in (query_BHTD, key_BHTD, value_BHTD)
    )
    out_XTD = query_XTD.new_empty(query_XTD.shape)
    for first in range(0, len(query_XTD), num_heads):
        heads = slice(first, first + num_heads)
        key, value = key_XTD[heads], value_XTD[heads]
        for start in range(0, num_tokens, num_queries):
            some = slice(start, start + num_queries)
            scores = _scores(query_XTD[heads, some], key, scale)
            out_XTD[heads, some] = torch.bmm(scores.softmax(-1), value)
    return out_XTD.view(query_BHTD.shape)


def attend_prompt(query_HTD: Tensor, key_KLD: Tensor, value_KLD: Tensor, scale: float) -> Tensor:
    """Attend causally with the last T of L tokens.

    Args:
        query_HTD: [H, T, D].
        key_KLD: [K, L, D]; `value_KLD` likewise.
        value_KLD: see `key_KLD`.
        scale: factor on the scores.

    Returns:
        [H, T, D].
    """
    num_heads, num_tokens, _ = query_HTD.shape
    num_keys, length, size = value_KLD.shape
    num_groups = num_heads // num_keys
    by_key = num_keys, num_groups
    query_KGTD = query_HTD.view(*by_key, *query_HTD.shape[1:])
    out_KGTD = query_HTD.new_empty(num_keys, num_groups, num_tokens, size)
    step = -(-num_tokens // -(-num_tokens // _QUERIES))
    ahead_QQ = _ahead(query_HTD.dtype)
    for start in range(0, num_tokens, step):
        stop = min(start + step, num_tokens)
        seen = slice(length - num_tokens + stop)
        query = query_KGTD[:, :, start:stop].flatten(1, 2)
        scores = _scores(query, key_KLD[:, seen], scale)
        num = stop - start
        scores.view(*by_key, num, -1)[..., -num:].add_(ahead_QQ[:num, :num])
        some = torch.bmm(scores.softmax(-1), value_KLD[:, seen])
        out_KGTD[:, :, start:stop] = some.view(*by_key, num, size)
    return out_KGTD.flatten(0, 1)


@cache
def _ahead(dtype: torch.dtype) -> Tensor:
    """The causal bias on the scores of a block, [_QUERIES, _QUERIES]: -inf above the diagonal."""
    return torch.full((_QUERIES, _QUERIES), -torch.inf, dtype=dtype).triu_(1)


def _scores(query_XTD: Tensor, key_XLD: Tensor, scale: float) -> Tensor:
    # Contiguous before the transpose: otherwise torch makes a transposed copy, which is slower.
    key_XDL = key_XLD.contiguous().transpose(1, 2)
    return torch.baddbmm(query_XTD.new_empty(1), query_XTD, key_XDL, beta=0, alpha=scale)


def are_good_for_prompt(query_HTD: Tensor, key_KLD: Tensor) -> bool:
    """Whether `attend_prompt` is faster here and the prompt neither too short nor too long."""
    num_heads, num_tokens, size = query_HTD.shape
    num_keys, length, _ = key_KLD.shape
    return (
        num_tokens >= FEWEST_TOKENS
        and num_heads * min(num_tokens, _QUERIES) * length <= _PROMPT_SCORES
        and are_faster_for_prompts(num_heads, num_keys, size, query_HTD.dtype)
    )


@cache
def are_faster_for_images(num_heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether `attend_images` is faster on this CPU than torch's attention."""
    with torch.inference_mode():
        query = torch.ones(1, _TRIAL_PATCHES, num_heads, size, dtype=dtype).transpose(1, 2)
        ways = [
            lambda: F.scaled_dot_product_attention(query, query, query, scale=1.0),
            lambda: attend_images(query, query, query, 1.0),
        ]
        return trial.fastest(ways) == 1


@cache
def are_faster_for_prompts(num_heads: int, num_keys: int, size: int, dtype: torch.dtype) -> bool:
    """Whether `attend_prompt` is faster on this CPU than torch's attention."""
    with torch.inference_mode():
        query, key = (
            torch.ones(1, _TRIAL_TOKENS, num, size, dtype=dtype).transpose(1, 2)
            for num in (num_heads, num_keys)
        )
        ways = [
            lambda: F.scaled_dot_product_attention(
                query, key, key, is_causal=True, enable_gqa=num_heads != num_keys
            ),
            lambda: attend_prompt(query[0], key[0], key[0], 1.0),
        ]
        return trial.fastest(ways) == 1
