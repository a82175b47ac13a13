"""Attention over packed prompts and over slots, in place of the model's own.

transformers looks up attention functions by name. The function registered as `NAME` attends in one
of the layouts of layout.py, which the caller sets with `attending`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from batchvlm.engine.forward import cpu_attention, flash, slot_kernel, trial
from batchvlm.engine.forward.latent import Latents, padded
from batchvlm.engine.forward.layout import KeysValues, Packed, Runs, Slots, Span

# Shape legend: B rows, T tokens of all packed rows, T_i of row i, P_i earlier tokens of row i,
# H heads, K key-value heads, G = H // K query heads per key-value head, S slot length,
# D head size.

NAME = "batchvlm_rows"

_layout: ContextVar[Packed | Slots | None] = ContextVar("layout", default=None)
"""The layout of the current thread's forward."""


class OnlyLast(nn.Module):
    """Runs a token-wise module of the last layer for the tokens in `last_E` only.

    The last layer's output for other tokens is not used, because their keys and values are computed
    before this module. It is 0 here.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_1TD: Tensor) -> Tensor:
        layout = _layout.get()
        if layout is None or layout.last_E is None:
            return cast(Tensor, self.inner(hidden_1TD))
        some_1ED = self.inner(hidden_1TD[:, layout.last_E])
        out_1TD: Tensor = some_1ED.new_zeros(1, hidden_1TD.shape[1], some_1ED.shape[2])
        out_1TD[:, layout.last_E] = some_1ED
        return out_1TD


@contextmanager
def attending(layout: Packed | Slots) -> Iterator[None]:
    """Set the layout of the forwards within, for this thread."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def keep_latents(decoder: nn.Module) -> frozenset[int]:
    """Let layers with latent keys and values attend to the latents themselves over slots.

    Returns:
        The indices of these layers.
    """
    layers = set()
    module: Any
    for module in decoder.modules():
        expand = getattr(module, "expand_kv", None)
        if expand is None:
            continue
        layers.add(module.layer_idx)
        if not isinstance(expand, Latents):
            module.expand_kv = Latents(module, _is_over_slots)
    return frozenset(layers)


def _is_over_slots() -> bool:
    return isinstance(_layout.get(), Slots)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in the layout that `attending` has set; the signature is transformers'.

    Args:
        module: the layer's attention module.
        query: [1, H, T, D] if packed or if slots have runs, else [B, H, 1, D].
        key: [1, K, T, D] if packed, [B, K, S, D] over slots; `value` likewise. With latents over
            slots, as `SlotCache` returns them.
        attention_mask: for packed rows, bool [1, 1, T, T]; None if every row is causal, as far
            as `sliding_window` reaches.
        scaling: factor on the scores; None: one over the root of D.
        sliding_window: the number of tokens that a token attends to, itself included.
        softcap: bound of the scores: they become softcap * tanh(score / softcap).

    Returns:
        [1, T, H, D] or [B, 1, H, D].
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    score = _Scores(scaling=scaling, softcap=softcap)
    match _layout.get():
        case Packed() as packed:
            past = _past(module, key, packed)
            out = _packed(score, query, key, value, packed, past, attention_mask, sliding_window)
            return out, None
        case Slots() as slots:
            latents = getattr(module, "expand_kv", None)
            if isinstance(latents, Latents) and latents.are_kept:
                # Keys stand in for values, which would have to be padded to their size.
                out = _over(score, latents.query(query), key, key, slots, sliding_window)
                return latents.value(out), None
            return _over(score, query, key, value, slots, sliding_window), None
    raise RuntimeError(f"attention {NAME!r} outside of `attending`")


def _past(module: Any, key: Tensor, packed: Packed) -> list[KeysValues | None]:
    """Return the keys and values of each row's earlier tokens in the layer of these keys."""
    latents = getattr(module, "expand_kv", None)
    if isinstance(latents, Latents):
        rows = [None if rows is None else rows[module.layer_idx] for rows in packed.past]
        return [latents.expanded(row) for row in rows]
    layer = packed.layer_of(module.layer_idx, key)
    return [None if rows is None else rows[layer] for rows in packed.past]


@dataclass(frozen=True, slots=True)
class _Scores:
    scaling: float | None
    softcap: float | None

    def scale(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scaling is None else self.scaling

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool
    ) -> Tensor:
        """Attend with queries [.., H, T, D] to keys and values [.., H or K, L, D].

        `mask` is bool, true where a query attends. Without a softcap it may also be a bias on the
        scores.
        """
        is_grouped = query.shape[-3] != key.shape[-3]
        if is_grouped and mask is not None and query.is_cuda:
            # On a GPU torch's fast kernels take a mask or grouped heads, not both.
            key, value = (_repeated(x, query.shape[-3]) for x in (key, value))
            is_grouped = False
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=is_causal and query.shape[-2] > 1,
                scale=self.scaling,
                enable_gqa=is_grouped,
            )
        if is_grouped:
            key, value = (_repeated(x, query.shape[-3]) for x in (key, value))
        if is_causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], device=query.device).tril().bool()
        scores = query @ key.transpose(-1, -2) * self.scale(query)
        scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _repeated(heads: Tensor, num_heads: int) -> Tensor:
    return heads.repeat_interleave(num_heads // heads.shape[-3], dim=-3)


def _packed(
    score: _Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    past: Sequence[KeysValues | None],
    masks: Tensor | None,
    window: int | None,
) -> Tensor:
    size = query.shape[-1]
    if value.shape[-1] != size:
        past = [before and (before[0], padded(before[1], size)) for before in past]
        out = _packed(score, query, key, padded(value, size), packed, past, masks, window)
        return out[..., : value.shape[-1]]
    is_plain = masks is None and packed.trees is None
    if is_plain and score.softcap is None and flash.is_able(query):
        return flash.attend(
            query[0].transpose(0, 1),
            _with_past(key[0], packed, [before and before[0] for before in past]),
            _with_past(value[0], packed, [before and before[1] for before in past]),
            packed.flash_bounds(query.device),
            scaling=score.scaling,
            is_causal=True,
            window=window,
        )[None]
    may_be_products = query.device.type == "cpu" and is_plain and score.softcap is None
    out = torch.empty_like(query.transpose(1, 2))
    for i, (start, stop) in enumerate(packed.spans):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        mask = masks[:, :, start:stop, start:stop] if masks is not None else None
        before = past[i]
        if before is not None:
            # Rows with earlier tokens are plainly causal or windowed, so they need no given mask.
            mask = None
            k = torch.cat([before[0][None], k], dim=2)
            v = torch.cat([before[1][None], v], dim=2)
        num_before = k.shape[2] - q.shape[2]
        is_cut = mask is None and window is not None and k.shape[2] > window
        if may_be_products and not is_cut and cpu_attention.are_good_for_prompt(q[0], k[0]):
            attended = cpu_attention.attend_prompt(q[0], k[0], v[0], score.scale(q))[None]
        else:
            if packed.trees is not None:
                mask = packed.tree_mask(i, num_before, window)
            elif mask is None and (num_before or is_cut):
                mask = packed.causal_mask(q.shape[2], num_before, window, q.device)
            attended = score.attend(q, k, v, mask, is_causal=mask is None)
        out[:, start:stop] = attended.transpose(1, 2)
    return out


def _with_past(new_KTD: Tensor, packed: Packed, past: Sequence[Tensor | None]) -> Tensor:
    """Concatenate each row's earlier keys or values, [K, P_i, D], and its new ones: [L, K, D]."""
    new_TKD = new_KTD.transpose(0, 1)
    if all(before is None for before in past):
        return new_TKD
    parts = []
    for (start, stop), before in zip(packed.spans, past, strict=True):
        if before is not None:
            parts.append(before.transpose(0, 1))
        parts.append(new_TKD[start:stop])
    return torch.cat(parts)


def _over(
    score: _Scores, query: Tensor, key: Tensor, value: Tensor, slots: Slots, window: int | None
) -> Tensor:
    whole = padded(value, query.shape[-1])
    if slots.runs is None:
        out = _over_slots(score, query, key, whole, slots, window)
    else:
        out = _over_slots_with_runs(score, query, key, whole, slots, slots.runs, window)
    return out[..., : value.shape[-1]]


def _over_slots(
    score: _Scores, query: Tensor, key: Tensor, value: Tensor, slots: Slots, window: int | None
) -> Tensor:
    num_rows, num_heads, _, size = query.shape
    num_groups = num_heads // key.shape[1]
    if score.softcap is None and flash.is_able(query):
        if slots.has_kernel:
            return slot_kernel.attend(
                query, key, value, slots.positions_B, scaling=score.scaling, window=window
            )
        bounds = slots.flash_bounds(key.shape[2], num_queries=num_groups if window is None else 1)
        return flash.attend_slots(query, key, value, bounds, scaling=score.scaling, window=window)
    if query.device.type == "cpu" and is_ungrouped_faster(num_groups, size, query.dtype):
        grouped = query
    else:
        # The query heads of one key head become queries of that head, so that its keys and values
        # are read once for all of them.
        grouped = query.view(num_rows, key.shape[1], num_groups, size)
    outs = []
    for span in slots.spans:
        rows = slice(span.start, span.stop)
        mask = _mask_over(score, slots, span, window, query)
        outs.append(_attend_over(score, grouped[rows], key, value, span, mask))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.reshape(num_rows, 1, num_heads, size)


@cache
def is_ungrouped_faster(num_groups: int, size: int, dtype: torch.dtype) -> bool:
    """Whether attending with H heads is faster than with K heads of G queries each."""
    num_rows, num_keys, length = 8, 4, 512
    with torch.inference_mode():
        query = torch.ones(num_rows, num_keys * num_groups, 1, size, dtype=dtype)
        key = torch.ones(num_rows, num_keys, length, size, dtype=dtype)
        mask = torch.zeros(num_rows, 1, 1, length, dtype=dtype)
        score = _Scores(scaling=None, softcap=None)
        together = query.view(num_rows, num_keys, num_groups, size)
        ways = [
            lambda: score.attend(together, key, key, mask, is_causal=False),
            lambda: score.attend(query, key, key, mask, is_causal=False),
        ]
        return trial.fastest(ways) == 1


def run_trials(num_heads: int, num_keys: int, size: int, dtype: torch.dtype) -> None:
    """Time the ways to attend on a CPU, before other work on it could disturb the trial."""
    is_ungrouped_faster(num_heads // num_keys, size, dtype)
    cpu_attention.are_faster_for_prompts(num_heads, num_keys, size, dtype)


def _over_slots_with_runs(
    score: _Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    runs: Runs,
    window: int | None,
) -> Tensor:
    """Attend with queries [1, H, T, D], several for some slots, to slots that hold their keys."""
    num_heads, size, num_keys = query.shape[1], query.shape[3], key.shape[1]
    num_groups = num_heads // num_keys
    query_MHD = query[0].transpose(0, 1)[runs.tokens_M]
    outs = []
    for span, query_BMHD in zip(slots.spans, slots.by_span(query_MHD), strict=True):
        num_rows, num_tokens = query_BMHD.shape[:2]
        mask = _mask_over(score, slots, span, window, query)
        # As above, the query heads of one key head become its queries, for each token in turn.
        by_key = query_BMHD.view(num_rows, num_tokens, num_keys, num_groups, size).transpose(1, 2)
        if num_tokens > 1:
            mask = mask.repeat_interleave(num_groups, dim=2)
        out = _attend_over(score, by_key.flatten(2, 3), key, value, span, mask)
        out = out.reshape(num_rows, num_keys, num_tokens, num_groups, size).transpose(1, 2)
        outs.append(out.reshape(-1, num_heads, size))
    return torch.cat(outs)[runs.places_T][None]


def _mask_over(
    score: _Scores, slots: Slots, span: Span, window: int | None, query: Tensor
) -> Tensor:
    if query.device.type == "cpu" and score.softcap is None:
        return slots.bias(span, window, query.dtype)
    return slots.mask(span, window)


def _attend_over(
    score: _Scores, query: Tensor, key: Tensor, value: Tensor, span: Span, mask: Tensor
) -> Tensor:
    rows = slice(span.start, span.stop)
    return score.attend(
        query, key[rows, :, : span.length], value[rows, :, : span.length], mask, is_causal=False
    )


def row_masks(
    *,
    mask_function: Callable[..., Any],
    device: torch.device,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask over packed rows, if some row is not plainly causal.

    transformers describes a mask by a function of (batch, head, query, key) indices. It is called
    here with the indices of one row at a time, which gives that row's own mask.

    Returns:
        None if every row is plainly causal or has a sliding window, which `attention` applies
        itself; else bool [1, 1, T, T]. It is false between rows, and for rows with earlier tokens:
        those are plain. A prompt in which tokens attend to later ones is never computed in pieces.
    """
    layout = _layout.get()
    if not isinstance(layout, Packed) or _is_plain(mask_function):
        return None
    if all(past is not None for past in layout.past):
        return None
    num_tokens = layout.bounds[-1]
    mask_TT = torch.zeros(num_tokens, num_tokens, dtype=torch.bool, device=device)
    first = torch.zeros((), dtype=torch.long, device=device)
    for (start, stop), past in zip(layout.spans, layout.past, strict=True):
        if past is not None:
            continue
        places = torch.arange(start, stop, device=device)
        own = _indexed(mask_function, first, places, use_vmap=use_vmap)
        mask_TT[start:stop, start:stop] = own
    layout.sees_ahead |= bool(mask_TT.triu(1).any())
    return mask_TT[None, None]


def _code_of(function: Any) -> list[CodeType]:
    """The code of a function made of others, as those of `masking_utils` are, and of these."""
    code = [function.__code__] if isinstance(function, FunctionType) else []
    for cell in getattr(function, "__closure__", None) or ():
        content = cell.cell_contents
        for part in content if isinstance(content, tuple) else (content,):
            code += _code_of(part)
    return code


_SLIDING_WINDOW = _code_of(sliding_window_causal_mask_function(1))


def _is_plain(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask is causal and no more than a sliding window, of whatever length."""
    return mask_function is causal_mask_function or _code_of(mask_function) == _SLIDING_WINDOW


def _indexed(
    mask_function: Callable[..., Any], first: Tensor, places: Tensor, *, use_vmap: bool
) -> Tensor:
    if not use_vmap:
        mask = mask_function(first, first, places[:, None], places[None, :])
    else:
        over_keys = torch.vmap(mask_function, in_dims=(None, None, None, 0))
        over_both = torch.vmap(over_keys, in_dims=(None, None, 0, None))
        mask = over_both(first, first, places, places)
    return torch.as_tensor(mask, device=places.device).expand(len(places), len(places)).bool()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, row_masks)
