"""Layers of a model in fewer steps and fewer passes over memory, for a CPU.

There a step over slots is bound by the number of calls, and a large product by what is read and
written around it. Which layers these stand for is not looked up by name: one that has the parts is
replaced if it gives the original's output, keys and values on random numbers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from batchvlm.engine import attention
from batchvlm.engine.attention import Packed, Slots, Span
from batchvlm.engine.cache import PackedCache, RowCache, SlotCache
from batchvlm.engine.packed import PackedLinear, Part, can_pack, is_plain

log = logging.getLogger(__name__)

# Shape legend: B rows, T tokens, E hidden size, H heads, K key-value heads, D head size.


@dataclass(slots=True)
class Rope:
    """Rotary factors as the layers of one forward use them, made by the first of them."""

    _cos: Tensor | None = None
    _factors: tuple[Tensor, Tensor, Tensor] | None = None

    def factors(
        self, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] -> cos and the two halves of sin, with a dimension for heads."""
        if self._factors is None or self._cos is not cos:
            half = sin.shape[-1] // 2
            self._cos = cos
            cos, sin = (x.unsqueeze(-2).to(dtype or x.dtype) for x in (cos, sin))
            self._factors = cos, sin[..., :half], sin[..., half:]
        return self._factors


def rotate(x: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """x * cos + rotate_half(x) * sin, in three passes; x is [..., heads, D]."""
    cos, sin_low, sin_high = factors
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin_low, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin_high)
    return out


class LeanLayer(nn.Module):
    """A decoder layer of Llama's kind under this engine's attention.

    Queries, keys and values are one product, as are gate and up; the residual is added by the
    product before it. Where no form of attention is announced (`generate()`), the original runs,
    over the same weights.

    Args:
        inner: the layer; its linear layers are replaced by parts of the packed ones.
        asked: what it asks of its attention function beside query, key, value and mask.
        rope: shared by all layers.
        is_last: whether it is the last layer, of which only some tokens are read.
    """

    def __init__(self, inner: Any, asked: dict[str, Any], rope: Rope, *, is_last: bool) -> None:
        super().__init__()
        attn, mlp = inner.self_attn, inner.mlp
        sizes = [p.out_features for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
        self._sizes = sizes
        self._head_dim = attn.head_dim
        self.qkv = PackedLinear(attn.q_proj, attn.k_proj, attn.v_proj)
        self.gate_up = PackedLinear(mlp.gate_proj, mlp.up_proj)
        self._width = mlp.gate_proj.out_features
        self.o_proj, self.down_proj = PackedLinear(attn.o_proj), PackedLinear(mlp.down_proj)
        self.input_norm, self.post_norm = inner.input_layernorm, inner.post_attention_layernorm
        self.q_norm = getattr(attn, "q_norm", None)
        self.k_norm = getattr(attn, "k_norm", None)
        self.inner = inner
        # Read by some models' loops over layers.
        self.attention_type = getattr(inner, "attention_type", None)
        self._asked, self._rope, self._is_last = asked, rope, is_last

    def take_over(self) -> None:
        """Let the original's linear layers be parts of the packed ones, which frees theirs."""
        attn, mlp = self.inner.self_attn, self.inner.mlp
        start = 0
        for name, size in zip(("q_proj", "k_proj", "v_proj"), self._sizes, strict=True):
            setattr(attn, name, Part(self.qkv, start, start + size))
            start += size
        attn.o_proj, mlp.down_proj = self.o_proj, self.down_proj
        mlp.gate_proj = Part(self.gate_up, 0, self._width)
        mlp.up_proj = Part(self.gate_up, self._width, 2 * self._width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """[B, T, E] -> [B, T, E]; see transformers' `LlamaDecoderLayer`."""
        form = attention.announced()
        if form is None or past_key_values is None:
            return self.inner(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        is_packed = isinstance(form, Packed)
        query, key, value = self._projected(hidden_states, position_embeddings)
        if is_packed:
            # They are kept until the row has a slot: a view would keep the whole product with them.
            key, value = key.contiguous(), value.contiguous()
        attn = self.inner.self_attn
        key, value = past_key_values.update(key, value, attn.layer_idx)
        out, _ = attention.attention(attn, query, key, value, attention_mask, **self._asked)
        out_BTE = out.reshape(*hidden_states.shape[:2], -1)
        last_E = form.last_E if self._is_last and isinstance(form, Packed) else None
        if last_E is None:
            return self._fed_forward(self.o_proj(out_BTE, hidden_states))
        # What the last layer makes of the other tokens is read by nobody.
        some = self._fed_forward(self.o_proj(out_BTE[:, last_E], hidden_states[:, last_E]))
        whole = torch.zeros_like(hidden_states)
        whole[:, last_E] = some
        return whole

    def _projected(self, hidden_BTE: Tensor, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Query, key and value, [B, heads, T, D] each."""
        size = self._head_dim
        qkv = self.qkv(self.input_norm(hidden_BTE))
        q, k, v = (n // size for n in self._sizes)
        heads = qkv.view(*qkv.shape[:2], q + k + v, size)
        factors = self._rope.factors(*rope)
        if self.q_norm is None or self.k_norm is None:
            turned = rotate(heads[:, :, : q + k], factors)
            query, key = turned[:, :, :q], turned[:, :, q:]
        else:
            query = rotate(self.q_norm(heads[:, :, :q]), factors)
            key = rotate(self.k_norm(heads[:, :, q : q + k]), factors)
        return [x.transpose(1, 2) for x in (query, key, heads[:, :, q + k :])]

    def _fed_forward(self, hidden_BTE: Tensor) -> Tensor:
        both = self.gate_up(self.post_norm(hidden_BTE))
        inner = self.inner.mlp.act_fn(both[..., : self._width])
        out: Tensor = self.down_proj(inner.mul_(both[..., self._width :]), hidden_BTE)
        return out


_SPY = "batchvlm_lean_spy"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference allowed, in units of the largest value: roundings of five products."""
_asked: list[dict[str, Any]] = []


def make_decoder_lean(model: Any) -> int:
    """Replace what layers of a model's decoder can be, and pack its output layer; in place.

    Args:
        model: a transformers model on a CPU.

    Returns:
        How many were.
    """
    decoder = model.get_decoder()
    # Encoder-decoders, and language models in a shell of their own, have their layers elsewhere.
    if not can_pack(model.dtype) or not hasattr(decoder, "layers"):
        return 0
    rope = Rope()
    has_axes = hasattr(model.base_model, "get_rope_index")
    num_lean = 0
    for i, layer in enumerate(decoder.layers):
        lean = _lean_of(decoder, layer, rope, has_axes=has_axes)
        if lean is None:
            continue
        lean.take_over()
        decoder.layers[i] = lean
        num_lean += 1
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if is_plain([output]) and output.weight is not embedding.weight:
        model.set_output_embeddings(PackedLinear(output))
    return num_lean


def _lean_of(decoder: Any, layer: Any, rope: Rope, *, has_axes: bool) -> LeanLayer | None:
    """A layer's lean form, if it has one that is equal."""
    try:
        attn, mlp = layer.self_attn, layer.mlp
        products = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj]
        products += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if not is_plain(products):
            return None
        sample = _Sample(decoder, layer, has_axes=has_axes)
        expected = sample.outputs(layer)
        known = ("scaling", "sliding_window", "softcap")
        asked = {name: value for name, value in _asked[-1].items() if name in known}
        is_last = layer is decoder.layers[-1]
        lean = LeanLayer(layer, asked, rope, is_last=is_last)
        got = sample.outputs(lean)
    except Exception as error:
        log.debug("%s stays as it is: %s", type(layer).__name__, error)
        return None
    is_same = all(is_close(a, b) for a, b in zip(expected, got, strict=True))
    return lean if is_same else None


def is_close(expected: Tensor, got: Tensor) -> bool:
    """Whether two outputs of a layer are the same up to rounding."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    tolerance = _TOLERANCE[expected.dtype] * float(expected.abs().max())
    return bool((expected - got).abs().max() <= tolerance)


class _Sample:
    """Random numbers that a decoder layer is run on, packed and over slots."""

    def __init__(self, decoder: Any, layer: Any, *, has_axes: bool) -> None:
        self._attn = layer.self_attn
        self._index = int(self._attn.layer_idx)
        weight = self._attn.q_proj.weight
        generator = torch.Generator().manual_seed(0)
        shape = (1, 12, self._attn.q_proj.in_features)
        self._hidden = torch.randn(shape, generator=generator).to(weight.dtype)
        positions = torch.arange(12)[None] * 7
        if has_axes:
            positions = torch.stack([positions, positions + 3, positions // 2])
        self._rope = decoder.rotary_emb(self._hidden, positions)

    @torch.inference_mode()
    def outputs(self, layer: Any) -> list[Tensor]:
        """Hidden states, keys and values of two packed rows, and of a step of both over slots."""
        config = self._attn.config
        before, config._attn_implementation = config._attn_implementation, _SPY
        try:
            packed = PackedCache(self._index + 1)
            with attention.attending(Packed(bounds=(0, 5, 12), past=(None, None))):
                first = self._run(layer, self._hidden, self._rope, packed)
            cached: Any = packed.layers[self._index]
            key, value = cached.packed
            pieces = [(key[0, :, s], value[0, :, s]) for s in (slice(0, 5), slice(5, 12))]
            rows = [RowCache([piece] * (self._index + 1)) for piece in pieces]
            slots = SlotCache(rows[0], num_slots=2, length=8)
            for slot, row in enumerate(rows):
                slots.put(slot, [row])
            lengths = torch.tensor([5, 7])
            slots.use(0, 2, lengths)
            hidden = self._hidden[0, lengths][:, None]
            cos, sin = (x[0, lengths][:, None] for x in self._rope)
            with attention.attending(Slots(lengths, (Span(0, 2, 8),))):
                second = self._run(layer, hidden, (cos, sin), slots)
            cached = slots.layers[self._index]
            return [first, key, value, second, *cached.slots]
        finally:
            config._attn_implementation = before

    def _run(self, layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        out: Tensor = layer(
            hidden,
            attention_mask=None,
            position_embeddings=rope,
            past_key_values=cache,
            use_cache=True,
        )
        return out


def _spy(module: Any, *args: Any, **kwargs: Any) -> Any:
    _asked.append(kwargs)
    return attention.attention(module, *args, **kwargs)


AttentionInterface.register(_SPY, _spy)
