"""Rotary embedding of queries and keys in fewer passes over memory, on a CPU.

transformers' modelling files rotate by module-level functions. These are replaced while this engine
runs the model, and only if a trial shows that the replacement returns the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Shape legend: T tokens, H heads, D head size.

_Rotation = Callable[..., tuple[Tensor, Tensor]]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin.

    Args:
        x: [..., D].
        cos: broadcastable to `x`; `sin` likewise.

    Returns:
        [..., D].
    """
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _of_decoder(original: _Rotation) -> _Rotation:
    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotated(q, cos, sin), rotated(k, cos, sin)

    return rotate


def _of_encoder(original: _Rotation) -> _Rotation:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if not q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]:
            return original(q, k, cos, sin)
        cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
        return rotated(q.float(), cos, sin).to(q.dtype), rotated(k.float(), cos, sin).to(k.dtype)

    return rotate


_KINDS: dict[str, tuple[Callable[[_Rotation], _Rotation], tuple[int, ...], tuple[int, ...]]] = {
    "apply_rotary_pos_emb": (_of_decoder, (1, 2, 3, 8), (1, 3, 8)),
    "apply_rotary_pos_emb_vision": (_of_encoder, (3, 2, 8), (3, 8)),
}
"""Function name -> its replacement, and the shapes of queries and cosines to compare both on."""


class Rotations:
    """Replaces the rotary functions in a model's modelling files.

    Args:
        model: a transformers model; on a device other than a CPU nothing is replaced.
    """

    def __init__(self, model: Any) -> None:
        self._replaced: list[tuple[Any, str, _Rotation, _Rotation]] = []
        if model.device.type != "cpu":
            return
        for file in {type(module).__module__ for module in model.modules()}:
            for name, (make, shape, angles) in _KINDS.items():
                original = getattr(sys.modules[file], name, None)
                if original is not None and _are_same(original, make(original), shape, angles):
                    self._replaced.append((sys.modules[file], name, original, make(original)))

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace the functions within this context only: other models may share the files."""
        for file, name, _, new in self._replaced:
            setattr(file, name, new)
        try:
            yield
        finally:
            for file, name, original, _ in self._replaced:
                setattr(file, name, original)


@torch.inference_mode()
def _are_same(
    original: _Rotation, new: _Rotation, shape: tuple[int, ...], angles: tuple[int, ...]
) -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, *shape, generator=generator)
    # All these functions take angles whose two halves are equal.
    angle = torch.randn(*angles[:-1], angles[-1] // 2, generator=generator).repeat(
        *(1 for _ in angles[:-1]), 2
    )
    cos, sin = angle.cos(), angle.sin()
    try:
        expected, got = original(query, key, cos, sin), new(query, key, cos, sin)
    except Exception:
        return False
    return all(
        a.shape == b.shape and bool((a - b).abs().max() < 1e-5)
        for a, b in zip(expected, got, strict=True)
    )
