"""Products with weights in the layout that a CPU's matrix kernels read.

torch reorders a weight anew at every product; oneDNN takes one that was reordered once. The ops are
those that `torch.compile` puts into its graphs. A packed weight takes the place of the plain one:
nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_TYPICAL_ROWS = 64
"""Rows of input that the layout is chosen for. It serves packs of a thousand as well."""


class PackedLinear(nn.Module):
    """Linear layers over the same input as one product.

    `weight` is the packed tensor: of the plain one's shape and dtype, and readable by oneDNN alone.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, *parts: nn.Linear) -> None:
        super().__init__()
        whole = torch.cat([part.weight.detach() for part in parts])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole, _TYPICAL_ROWS)
        biases = [part.bias for part in parts]
        if all(bias is None for bias in biases):
            self.bias = None
        else:
            zeros = [part.weight.new_zeros(part.out_features) for part in parts]
            given = zip(biases, zeros, strict=True)
            self.bias = torch.cat([zero if bias is None else bias.detach() for bias, zero in given])

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """The product, with `added` (of the output's shape) on top of it."""
        op = torch.ops.mkldnn._linear_pointwise
        out: Tensor
        if added is None:
            out = op(x, self.weight, self.bias, "none", [], "")
        else:
            out = op.binary(x, added, self.weight, self.bias, "add")
        return out


class Part(nn.Module):
    """One of the layers that a `PackedLinear` has swallowed, for whoever asks for it alone."""

    def __init__(self, whole: PackedLinear, start: int, stop: int) -> None:
        super().__init__()
        self.whole = whole
        self._columns = slice(start, stop)

    @property
    def weight(self) -> Tensor:
        """Read for its dtype and device; its numbers are packed."""
        return self.whole.weight

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own columns; the others are computed in vain."""
        out: Tensor = self.whole(x)[..., self._columns]
        return out


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's torch has the kernels."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ops: Any = torch.ops.mkldnn
    try:
        match dtype:
            case torch.float32:
                is_known = True
            case torch.bfloat16:
                is_known = bool(ops._is_mkldnn_bf16_supported())
            case torch.float16:
                is_known = bool(ops._is_mkldnn_fp16_supported())
            case _:
                is_known = False
        weight = nn.Linear(8, 8, dtype=dtype)
        return is_known and PackedLinear(weight)(weight.weight).shape == (8, 8)
    except Exception:
        return False  # private ops: another release may lack them


def is_plain(modules: Sequence[Any]) -> bool:
    """Whether these are linear layers and no more: no adapter, no quantized weight, no hook."""
    return all(
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in vars(module)
        for module in modules
    )
