"""Latent keys and values (MLA): one small vector a token, of which each head makes its own.

transformers caches the latents, and makes keys and values of all of them anew at every step. Here
this is done for prompts only. Over slots the two linear maps move to the other side of the
products: queries are mapped into the space of the latents, and the attended latents out of it. All
heads then attend to one key head, whose keys are also the values. A slot holds a token's latent and
the rotary part of its key side by side, so they are that key as they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchvlm.engine.forward.layout import KeysValues
from batchvlm.engine.forward.replacements import PackedLinear

# Shape legend: as in attention.py; R size of a latent, N of a key without its rotary part, P of the
# rotary part, which is the same for all heads, V of a value.


class Latents:
    """Replaces `expand_kv` of an attention module, which makes keys and values of latents.

    Args:
        module: one of transformers' modules of multi-head latent attention.
        is_over_slots: whether the current forward attends over slots.
    """

    def __init__(self, module: Any, is_over_slots: Callable[[], bool]) -> None:
        self._expand: Callable[[Tensor, Tensor], KeysValues] = module.expand_kv
        self._is_over_slots = is_over_slots
        self._key_size = module.qk_nope_head_dim
        up_XR = _plain_weight(module.kv_b_proj)
        by_head = None if up_XR is None else up_XR.view(module.num_heads, -1, up_XR.shape[1])
        self._by_head_HXR = by_head
        """The weights of each head's key, then of its value; None if they are quantized."""

    @property
    def are_kept(self) -> bool:
        """Whether attention over slots is given latents in place of keys and values."""
        return self._by_head_HXR is not None

    def __call__(self, first: Tensor, second: Tensor) -> KeysValues:
        """Return keys [B, H, T, N + P] and values [B, H, T, V].

        Args:
            first: latents [B, 1, T, R]; over slots the keys of `SlotCache`, [B, 1, S, R + P].
            second: rotary parts [B, 1, T, P]; over slots the values, [B, 1, S, R].

        Returns:
            Over slots the arguments, if they are kept as they are.
        """
        if not self._is_over_slots():
            return self._expand(first, second)
        if self.are_kept:
            return first, second
        # The kernels of quantized weights take contiguous inputs only.
        return self._expand(second.contiguous(), first[..., second.shape[-1] :])

    def expanded(self, row: KeysValues | None) -> KeysValues | None:
        """Return keys and values [H, T_i, ..] of a row's latents."""
        if row is None:
            return None
        key, value = self._expand(row[0][None], row[1][None])
        return key[0], value[0]

    def query(self, query_BHTD: Tensor) -> Tensor:
        """Map queries [B, H, T, N + P] to [B, H, T, R + P], for keys that are latents."""
        assert self._by_head_HXR is not None
        plain, rotary = query_BHTD.tensor_split([self._key_size], dim=-1)
        keys_HNR = self._by_head_HXR[:, : self._key_size]
        return torch.cat([torch.einsum("bhtn,hnr->bhtr", plain, keys_HNR), rotary], dim=-1)

    def value(self, out_BTHD: Tensor) -> Tensor:
        """Map attended latents [B, T, H, R + P] to attended values [B, T, H, V]."""
        assert self._by_head_HXR is not None
        values_HVR = self._by_head_HXR[:, self._key_size :]
        latent = out_BTHD[..., : values_HVR.shape[-1]]
        return torch.einsum("bthr,hvr->bthv", latent, values_HVR)


def padded(value: Tensor, size: int) -> Tensor:
    """Pad values to the size of keys, which is that of all heads to attention."""
    return value if value.shape[-1] == size else F.pad(value, (0, size - value.shape[-1]))


def _plain_weight(linear: nn.Module) -> Tensor | None:
    if isinstance(linear, PackedLinear):
        dense: Tensor = linear.weight.to_dense()
        return dense
    return linear.weight.detach() if type(linear) is nn.Linear else None
