"""Mixtures of experts: the tiny models choose among their experts, and these differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from .families import FAMILIES, Family
from .loaded import Loaded

MIXTURES = [f for f in FAMILIES if f.name.endswith("_moe")]


@pytest.fixture(params=MIXTURES, ids=lambda family: family.name)
def loaded(request: pytest.FixtureRequest, load_once: Callable[[Family], Loaded]) -> Loaded:
    return load_once(request.param)


def test_tokens_are_given_to_most_experts_and_it_matters_to_which(loaded: Loaded) -> None:
    model = loaded.own()
    mixtures = {n: m for n, m in model.named_modules() if n.endswith(".experts")}
    assert mixtures
    chosen: dict[str, set[int]] = defaultdict(set)

    def note(name: str) -> Callable[..., None]:
        def noted(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            chosen[name] |= set(args[1].flatten().tolist())

        return noted

    for name, module in mixtures.items():
        module.register_forward_hook(note(name))
    other = Loaded(**{**vars(loaded), "model": model})
    samples = loaded.samples()
    logits_BV = other.first_logits(samples)
    for name, module in mixtures.items():
        assert len(chosen[name]) > module.num_experts // 2, name
    with torch.no_grad():
        for module in mixtures.values():
            for weights in module.parameters():
                weights.copy_(weights.roll(1, 0))
    assert ((other.first_logits(samples) - logits_BV).abs().amax(-1) > 1e-2).all()
