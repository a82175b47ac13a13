"""Fused and widened layers compute what the plain ones compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from batchvlm.config import EngineConfig
from batchvlm.engine.forward import image_attention
from batchvlm.engine.forward.fusing import FusedRMSNorm, GatedMLP, align, seconds_to_fusing
from batchvlm.engine.slots import canary

from ..families import FAMILIES, Family
from ..loaded import Loaded
from ..outcomes import run
from ..slots.test_slots import asked, mixed_rows, tokens


class MLP(nn.Module):
    def __init__(self, size: int, width: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, width, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(width, size, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("bias", [True, False])
def test_an_odd_feed_forward_part_is_widened_by_zeros(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([MLP(16, 60, bias), MLP(16, 64, bias)])
    odd, even = model
    x = torch.randn(5, 16)
    expected, kept = odd(x), even.gate_proj
    align(model)
    assert odd.gate_proj.weight.shape == odd.up_proj.weight.shape == (64, 16)
    assert odd.down_proj.weight.shape == (16, 64)
    assert odd.gate_proj.out_features == odd.down_proj.in_features == 64
    assert not odd.down_proj.weight[:, 60:].any()
    torch.testing.assert_close(odd(x), expected)
    assert even.gate_proj is kept


def test_a_part_that_would_not_stay_the_same_is_left() -> None:
    class Odd(MLP):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) + self.gate_proj.out_features

    part = Odd(16, 60, bias=False)
    align(nn.ModuleList([part]))
    assert part.gate_proj.weight.shape == (60, 16)


def test_a_quantized_or_adapted_part_is_left() -> None:
    class Adapted(nn.Linear):
        pass

    part = MLP(16, 60, bias=False)
    part.up_proj = Adapted(16, 60, bias=False)
    align(nn.ModuleList([part]))
    assert part.gate_proj.weight.shape == (60, 16)


def test_a_gated_part_computes_the_same() -> None:
    part = MLP(16, 24, bias=True)
    gated = GatedMLP(part, lambda x, y: part.act_fn(x) * y)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(gated(x), part(x))


def test_a_fused_norm_computes_the_same() -> None:
    weight = nn.Parameter(torch.randn(16))
    norm = FusedRMSNorm(SimpleNamespace(weight=weight, variance_epsilon=1e-6))
    x = torch.randn(2, 3, 16)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    torch.testing.assert_close(norm(x), expected)


def test_layers_of_an_encoder_are_compiled_for_our_attention_alone(
    load_once: Callable[[Family], Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within `generate()`, which the canary asks, they would be compiled in pieces."""
    loaded = load_once(next(family for family in FAMILIES if family.name == "qwen2_5_vl"))
    # On a CPU products lie as oneDNN wants them, and nothing is compiled.
    loaded = replace(loaded, _tuned=[loaded.own()])
    where: list[str] = []
    calls: list[str] = []

    def compiling(function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            calls.append(f"{function.__qualname__} {where[-1:]}")
            return function(*args, **kwargs)

        return compiled

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            where.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                where.pop()

        return noted

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(canary, "_generated", noting("generate", canary._generated))
    engine = loaded.slots(eos=[], compile=True, canary=True)
    rows = mixed_rows(loaded, 8)
    expected = [loaded.known(question, seed)[:limit] for question, seed, limit in rows]
    assert tokens(run(engine, asked(loaded, rows))) == expected
    (layers,) = (
        module for name, module in engine._model.named_modules() if name.endswith("visual.blocks")
    )
    of_layers = [call for call in calls if "VisionBlock" in call]
    num_encoded = engine.stats.images_encoded
    assert len(layers) < len(of_layers) <= len(layers) * num_encoded
    assert all(call.endswith("[]") for call in of_layers)
    assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "expected"),
    [
        (True, "cpu", torch.float32, 0.0),
        (False, "cuda", torch.bfloat16, None),
        (None, "cuda", torch.bfloat16, 60.0),
        (None, "cuda", torch.float32, None),
        (None, "cpu", torch.bfloat16, None),
    ],
)
def test_layers_are_fused_where_it_pays(
    asked: bool | None, device: str, dtype: torch.dtype, expected: float | None
) -> None:
    model = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert seconds_to_fusing(EngineConfig(compile=asked), model) == expected


def test_patches_of_each_image_see_one_another_and_no_others() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 11, 8)
    starts = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    config = SimpleNamespace(_attn_implementation="sdpa")
    with image_attention.attending(image_attention.NAME, [config]):
        assert "flash" in config._attn_implementation
        out, _ = image_attention.attention(
            None, query, key, value, None, scaling=0.3, cu_seq_lens_q=starts, max_length_q=7
        )
    assert config._attn_implementation == "sdpa"
    image_T = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2])
    scores = query @ key.mT * 0.3
    scores = scores.masked_fill(image_T[:, None] != image_T, -torch.inf)
    expected = copy.copy(scores).softmax(-1) @ value
    torch.testing.assert_close(out, expected.transpose(1, 2))
