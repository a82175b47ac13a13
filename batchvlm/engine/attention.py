"""Attention over packed prompts and over slots, in the place of the model's own.

transformers lets a name stand for an attention function. Under `NAME`, a forward of the decoder
runs in one of two forms, which the caller announces with `attending`:

- `Packed`: several prompts behind one another in one row. Each attends to itself alone, so there
  is no padding and no dense mask over all of them.
- `Slots`: one new token for each of B slots, whose keys and values lie in static buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from batchvlm.engine import flash

# Shape legend: B rows, T tokens of all packed rows, T_i of row i, P_i tokens of row i computed
# before, H heads, K key-value heads, G = H // K query heads for each of these, S slot length,
# D head size.

NAME = "batchvlm_rows"

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one row in one layer, each [K, T_i, D]."""


@dataclass(slots=True)
class Packed:
    """Prompts behind one another: row i is tokens `bounds[i]` to `bounds[i + 1]`."""

    bounds: tuple[int, ...]
    past: tuple[Sequence[KeysValues] | None, ...]
    """For each row, by layer, what was computed of its prompt before; None: it starts here."""
    last_E: Tensor | None = None
    """int64 [E]: the tokens whose logits are asked for; None: all count."""
    sees_ahead: bool = False
    """Set by a forward in which some token attends to a later one, as in PaliGemma's prompts."""
    trees: tuple[Tensor, ...] | None = None
    """Of tokens that go on from a prompt in several ways: for each row, which of its tokens each
    attends to besides the prompt, bool [T_i, T_i]; one lies as far behind the prompt as it attends
    to others."""
    _flash: flash.Bounds | None = None
    _tree_masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    @property
    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def flash_bounds(self, device: torch.device) -> flash.Bounds:
        """Where each row's queries and, what was computed before included, its keys lie."""
        if self._flash is None:
            num_new = [stop - start for start, stop in self.spans]
            num_before = [0 if rows is None else rows[0][0].shape[1] for rows in self.past]
            num_keys = [new + before for new, before in zip(num_new, num_before, strict=True)]
            ends = torch.tensor([num_new, num_keys]).cumsum(1).to(torch.int32)
            both = F.pad(ends, (1, 0)).pin_memory().to(device, non_blocking=True)
            self._flash = flash.Bounds(
                query_B1=both[0],
                key_B1=both[1],
                max_queries=max(num_new),
                max_keys=max(num_keys),
            )
        return self._flash

    def tree_mask(self, row: int, num_before: int, window: int | None) -> Tensor:
        """What the tokens of one row's tree attend to: bool [T_i, P_i + T_i]."""
        assert self.trees is not None
        key = row, window
        if key not in self._tree_masks:
            tree_TT = self.trees[row]
            mask = torch.cat([tree_TT.new_ones(len(tree_TT), num_before), tree_TT], dim=1)
            if window is not None:
                before = torch.arange(num_before, device=mask.device)
                own = num_before + tree_TT.sum(1) - 1
                mask &= torch.cat([before, own]) > own[:, None] - window
            self._tree_masks[key] = mask
        return self._tree_masks[key]


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring slots whose attention is computed together."""

    start: int
    stop: int
    length: int
    """Positions that the longest of them attends to, the new token's among them."""


@dataclass(frozen=True, slots=True)
class Slots:
    """One new token for each slot."""

    positions_B: Tensor
    """int64 [B]: where each row's new token lies."""
    spans: tuple[Span, ...]
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    _flash: dict[tuple[int, int], flash.Bounds] = field(default_factory=dict)

    def mask(self, span: Span, window: int | None) -> Tensor:
        """What the rows of a span attend to: bool [B, 1, 1, length]."""
        key = (span.start, window)
        if key not in self._masks:
            places_S = torch.arange(span.length, device=self.positions_B.device)
            newest_B1 = self.positions_B[span.start : span.stop, None]
            mask_BS = places_S <= newest_B1
            if window is not None:
                mask_BS &= places_S > newest_B1 - window
            self._masks[key] = mask_BS[:, None, None]
        return self._masks[key]

    def bias(self, span: Span, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores, made once for all layers: [B, 1, 1, length]."""
        key = (span.start, window, dtype)
        if key not in self._biases:
            mask = self.mask(span, window)
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            self._biases[key] = zeros.masked_fill_(~mask, -torch.inf)
        return self._biases[key]

    def flash_bounds(self, slot_length: int, *, num_queries: int) -> flash.Bounds:
        """So many queries a row, at its position, over slots of one length behind one another."""
        key = slot_length, num_queries
        if key not in self._flash:
            count_B1 = torch.arange(
                len(self.positions_B) + 1, dtype=torch.int32, device=self.positions_B.device
            )
            self._flash[key] = flash.Bounds(
                query_B1=count_B1 * num_queries,
                key_B1=count_B1 * slot_length,
                max_queries=num_queries,
                max_keys=slot_length,
                used_B=(self.positions_B + 1).to(torch.int32),
            )
        return self._flash[key]


_form: Packed | Slots | None = None


class OnlyLast(nn.Module):
    """A module of the last layer that works token by token, for the tokens that count.

    What the last layer makes of the other tokens of a prompt is read by nobody: their keys and
    values are taken before. Theirs is 0 here.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_1TD: Tensor) -> Tensor:
        if not isinstance(_form, Packed) or _form.last_E is None:
            return cast(Tensor, self.inner(hidden_1TD))
        some_1ED = self.inner(hidden_1TD[:, _form.last_E])
        out_1TD: Tensor = some_1ED.new_zeros(1, hidden_1TD.shape[1], some_1ED.shape[2])
        out_1TD[:, _form.last_E] = some_1ED
        return out_1TD


@contextmanager
def attending(form: Packed | Slots) -> Iterator[None]:
    """Say in which form the forwards within are."""
    global _form
    before, _form = _form, form
    try:
        yield
    finally:
        _form = before


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
    """Attend in the announced form; the signature is that of transformers' attention functions.

    Args:
        module: the layer's attention module.
        query: [1, H, T, D] packed, [B, H, 1, D] over slots.
        key: [1, K, T, D] packed, [B, K, S, D] over slots; `value` likewise.
        attention_mask: packed, bool [1, 1, T, T] where not every row is plainly causal.
        scaling: factor on the scores.
        sliding_window: a token attends to this many tokens, itself among them.
        softcap: scores are squashed to within +-softcap.

    Returns:
        [1, T, H, D] or [B, 1, H, D].
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    score = _Scores(scaling=scaling, softcap=softcap)
    match _form:
        case Packed() as packed:
            past = [None if rows is None else rows[module.layer_idx] for rows in packed.past]
            window = sliding_window if attention_mask is None else None
            return _packed(score, query, key, value, packed, past, attention_mask, window), None
        case Slots() as slots:
            return _over_slots(score, query, key, value, slots, sliding_window), None
    raise RuntimeError(f"attention {NAME!r} outside of `attending`")


@dataclass(frozen=True, slots=True)
class _Scores:
    scaling: float | None
    softcap: float | None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool
    ) -> Tensor:
        """[.., H, T, D] queries over [.., H or K, L, D] keys; `mask` bool, true where seen.

        Without a soft cap it may also be what is added to the scores.
        """
        is_grouped = query.shape[-3] != key.shape[-3]
        if is_grouped and mask is not None and query.is_cuda:
            # There torch's fast kernels take a mask or grouped heads, not both.
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
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = self.softcap * torch.tanh(query @ key.transpose(-1, -2) * scale / self.softcap)
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
    is_plain = masks is None and packed.trees is None
    if is_plain and score.softcap is None and flash.is_able(query):
        return flash.attend(
            query[0].transpose(0, 1),
            _behind_past(key[0], packed, [before and before[0] for before in past]),
            _behind_past(value[0], packed, [before and before[1] for before in past]),
            packed.flash_bounds(query.device),
            scaling=score.scaling,
            is_causal=True,
            window=window,
        )[None]
    out = torch.empty_like(query.transpose(1, 2))
    for i, (start, stop) in enumerate(packed.spans):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        mask = masks[:, :, start:stop, start:stop] if masks is not None else None
        before = past[i]
        if before is not None:
            k = torch.cat([before[0][None], k], dim=2)
            v = torch.cat([before[1][None], v], dim=2)
        num_before = k.shape[2] - q.shape[2]
        if packed.trees is not None:
            mask = packed.tree_mask(i, num_before, window)
        elif mask is None and (num_before or (window is not None and k.shape[2] > window)):
            mask = _causal(q.shape[2], num_before, window, q.device)
        attended = score.attend(q, k, v, mask, is_causal=mask is None)
        out[:, start:stop] = attended.transpose(1, 2)
    return out


def _behind_past(new_KTD: Tensor, packed: Packed, past: Sequence[Tensor | None]) -> Tensor:
    """[L, K, D]: what each row had before, [K, P_i, D], and what is new of it."""
    new_TKD = new_KTD.transpose(0, 1)
    if all(before is None for before in past):
        return new_TKD
    parts = []
    for (start, stop), before in zip(packed.spans, past, strict=True):
        if before is not None:
            parts.append(before.transpose(0, 1))
        parts.append(new_TKD[start:stop])
    return torch.cat(parts)


def _causal(num_new: int, num_before: int, window: int | None, device: torch.device) -> Tensor:
    newest = torch.arange(num_before, num_before + num_new, device=device)[:, None]
    places = torch.arange(num_before + num_new, device=device)
    mask = places <= newest
    return mask if window is None else mask & (places > newest - window)


def _over_slots(
    score: _Scores, query: Tensor, key: Tensor, value: Tensor, slots: Slots, window: int | None
) -> Tensor:
    num_rows, num_heads, _, size = query.shape
    if score.softcap is None and flash.is_able(query):
        return _over_slots_by_flash(score, query, key, value, slots, window)
    num_groups = num_heads // key.shape[1]
    is_cpu = query.device.type == "cpu"
    if is_cpu and num_groups == 2 and query.dtype != torch.float32:
        grouped = query  # in half precision one query computed twice costs less than two together
    else:
        # The query heads of one key head side by side, as if they were queries behind one another:
        # keys and values are read once for all of them.
        grouped = query.view(num_rows, key.shape[1], num_groups, size)
    has_bias = is_cpu and score.softcap is None
    outs = []
    for span in slots.spans:
        rows = slice(span.start, span.stop)
        outs.append(
            score.attend(
                grouped[rows],
                key[rows, :, : span.length],
                value[rows, :, : span.length],
                slots.bias(span, window, query.dtype) if has_bias else slots.mask(span, window),
                is_causal=False,
            )
        )
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.reshape(num_rows, 1, num_heads, size)


def _over_slots_by_flash(
    score: _Scores, query: Tensor, key: Tensor, value: Tensor, slots: Slots, window: int | None
) -> Tensor:
    num_rows, num_heads, _, size = query.shape
    num_keys = key.shape[1]
    # Slots behind one another, as they lie in memory.
    key_LKD, value_LKD = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
    if window is not None:
        bounds = slots.flash_bounds(key.shape[2], num_queries=1)
        out_BHD = flash.attend(
            query[:, :, 0],
            key_LKD,
            value_LKD,
            bounds,
            scaling=score.scaling,
            is_causal=True,
            window=window,
        )
        return out_BHD[:, None]
    # The query heads of one key head as queries behind one another, as above: its keys are read
    # once for all of them.
    num_groups = num_heads // num_keys
    grouped = query.view(num_rows, num_keys, num_groups, size).transpose(1, 2).flatten(0, 1)
    out = flash.attend(
        grouped,
        key_LKD,
        value_LKD,
        slots.flash_bounds(key.shape[2], num_queries=num_groups),
        scaling=score.scaling,
        is_causal=False,
    )
    out = out.view(num_rows, num_groups, num_keys, size).transpose(1, 2)
    return out.reshape(num_rows, 1, num_heads, size)


def row_masks(
    *,
    mask_function: Callable[..., Any],
    device: torch.device,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """What each packed row may attend to where it is more or less than what came before.

    transformers describes a mask by a function of (batch, head, query, key) indices; asked for one
    row's tokens alone it gives that row's own mask.

    Returns:
        None where every row is plainly causal; else bool [1, 1, T, T], false between rows. Rows of
        a family that sees ahead must not be computed in pieces.
    """
    if not isinstance(_form, Packed) or mask_function is causal_mask_function:
        return None
    if any(past is not None for past in _form.past):
        return None  # plainly causal, or in a sliding window, which `attention` knows of
    num_tokens = _form.bounds[-1]
    mask_TT = torch.zeros(num_tokens, num_tokens, dtype=torch.bool, device=device)
    first = torch.zeros((), dtype=torch.long, device=device)
    for start, stop in _form.spans:
        places = torch.arange(start, stop, device=device)
        own = _indexed(mask_function, first, places, use_vmap=use_vmap)
        mask_TT[start:stop, start:stop] = own
    _form.sees_ahead |= bool(mask_TT.triu(1).any())
    return mask_TT[None, None]


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
