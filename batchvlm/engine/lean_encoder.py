"""Parts of image encoders in fewer passes over memory, for a CPU; see `lean.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchvlm.engine.lean import Rope, is_close, rotate
from batchvlm.engine.packed import PackedLinear, can_pack, is_plain

log = logging.getLogger(__name__)

# Shape legend: T patches of all images, E hidden size, H heads, D head size.

_QUICK_GELU = 1.702


class LeanImageAttention(nn.Module):
    """Attention of an encoder that takes images, or windows, behind one another (Qwen-VL's kind).

    Queries and keys are rotated together, and neighbouring windows of one size attended to in one
    call.
    """

    def __init__(self, original: Any, rope: Rope) -> None:
        super().__init__()
        self.qkv, self.proj = _product(original.qkv), _product(original.proj)
        self._num_heads, self._head_dim = int(original.num_heads), int(original.head_dim)
        self._scaling = float(original.scaling)
        self._rope = rope

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """[T, E] -> [T, E]; see transformers' `Qwen2VLAttention`'s neighbour `VisionAttention`."""
        num_patches, num_heads = len(hidden_states), self._num_heads
        heads = self.qkv(hidden_states).view(num_patches, 3 * num_heads, self._head_dim)
        # In float32, as the original: an angle in half precision is a patch off.
        factors = self._rope.factors(*position_embeddings, dtype=torch.float32)
        turned = rotate(heads[:, : 2 * num_heads].float(), factors).to(heads.dtype)
        q_THD, k_THD = turned[:, :num_heads], turned[:, num_heads:]
        v_THD = heads[:, 2 * num_heads :]
        outs = []
        start = 0
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        for length, alike in groupby(lengths):
            count = len(list(alike))
            stop = start + count * length
            q, k, v = (
                x[start:stop].view(count, length, num_heads, self._head_dim).transpose(1, 2)
                for x in (q_THD, k_THD, v_THD)
            )
            out = F.scaled_dot_product_attention(q, k, v, scale=self._scaling)
            outs.append(out.transpose(1, 2).reshape(stop - start, -1))
            start = stop
        attended: Tensor = self.proj(outs[0] if len(outs) == 1 else torch.cat(outs))
        return attended


class LeanMLP(nn.Module):
    """Two linear layers whose activation works in place."""

    def __init__(self, original: Any, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = _product(original.fc1), _product(original.fc2)
        self._act_ = _in_place(act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.fc2(self._act_(self.fc1(hidden_states)))
        return out


def make_encoder_lean(model: Any) -> int:
    """Replace what parts of a model's image encoder can be; in place.

    Args:
        model: a transformers model on a CPU.

    Returns:
        How many were.
    """
    decoder = {id(module) for module in model.get_decoder().modules()}
    rope = Rope()
    num_lean = 0
    for parent in list(model.modules()):
        if id(parent) in decoder:
            continue
        for name, module in list(parent.named_children()):
            lean = _lean_of(module, rope)
            if lean is not None:
                parent._modules[name] = lean
                num_lean += 1
    return num_lean


def _lean_of(module: Any, rope: Rope) -> nn.Module | None:
    children = dict(module.named_children())
    names = set(children)
    lean: nn.Module
    inputs: tuple[Tensor, ...]
    keywords: dict[str, Any] = {}
    try:
        if names == {"qkv", "proj"} and is_plain([module.qkv, module.proj]):
            lean = LeanImageAttention(module, rope)
            inputs, keywords = _attention_sample(module)
        elif {"fc1", "fc2"} < names and len(names) == 3 and is_plain([module.fc1, module.fc2]):
            (act,) = (child for name, child in children.items() if name not in ("fc1", "fc2"))
            if list(act.parameters()):
                return None
            lean = LeanMLP(module, act)
            inputs = (_random(module.fc1, (6, module.fc1.in_features)),)
        else:
            return None
        with torch.inference_mode():
            expected, got = module(*inputs, **keywords), lean(*inputs, **keywords)
    except Exception as error:
        log.debug("%s stays as it is: %s", type(module).__name__, error)
        return None
    return lean if is_close(expected, got) else None


def _attention_sample(module: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Patches of three windows, two of them of one size."""
    num_patches = 12
    angles = _random(module.qkv, (num_patches, int(module.head_dim) // 2)).float() * 3
    angles = torch.cat([angles, angles], dim=-1)
    return (_random(module.qkv, (num_patches, module.qkv.in_features)),), {
        "cu_seqlens": torch.tensor([0, 3, 6, num_patches], dtype=torch.int32),
        "position_embeddings": (angles.cos(), angles.sin()),
    }


def _random(linear: nn.Linear, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(linear.weight.dtype)


def _product(linear: nn.Linear) -> nn.Module:
    # In float32 a large product gains nothing by packing.
    is_half = linear.weight.dtype != torch.float32
    return PackedLinear(linear) if is_half and can_pack(linear.weight.dtype) else linear


def _in_place(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The activation, over its input where torch has that; the sample tells if it is the same."""
    kind = type(act).__name__
    if kind.startswith("QuickGELU"):
        return lambda x: F.silu(x.mul_(_QUICK_GELU), inplace=True).mul_(1 / _QUICK_GELU)
    if kind in ("GELU", "GELUActivation"):
        return torch.ops.aten.gelu_
    if kind in ("GELUTanh", "PytorchGELUTanh"):
        return lambda x: torch.ops.aten.gelu_(x, approximate="tanh")
    return act
