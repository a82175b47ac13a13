"""Latent keys and values: the same answers whether they are expanded or attended to as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

from batchvlm.engine.forward.cache import Heads, cached_layers
from batchvlm.engine.forward.latent import Latents

from ..families import Family, needs_slots
from ..families.hybrid import LATENT
from ..families.llava import llava
from ..loaded import Loaded, load
from ..outcomes import run
from ..test_choices import COLORS, check, expected, made

pytestmark = needs_slots


def deepseek_llava() -> Any:
    """LLaVA over a small DeepSeek-V3."""
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return llava(model_type="deepseek_v3", **groups, **LATENT)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    family = Family(build=deepseek_llava, image_tokens=(16, 16, 32))
    return load(family, tmp_path_factory.mktemp("latent"))


def latents_of(engine: Any) -> list[Latents]:
    modules = engine._decoder._model.get_decoder().modules()
    return [module.expand_kv for module in modules if hasattr(module, "expand_kv")]


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("cfg", [{}, {"max_prefill_tokens": 20, "max_slots": 3}])
def test_rows_are_answered_as_transformers_answers_each_alone(
    latent: Loaded, is_quantized: bool, cfg: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = latent.slots(eos=[], **cfg)
    layers = latents_of(engine)
    assert len(layers) == 2 and all(layer.are_kept for layer in layers)
    if is_quantized:
        # Then there is no plain matrix of weights, and the model expands what the slots hold.
        for layer in layers:
            monkeypatch.setattr(layer, "_by_head_HXR", None)
    asks = [(question, seed) for question in latent.questions for seed in (0, 1)]
    samples = [latent.ask(i, *ask, max_new_tokens=8) for i, ask in enumerate(asks)]
    outcomes = run(engine, samples)
    assert [list(o.token_ids) for o in outcomes] == [latent.known(*ask)[:8] for ask in asks]


def test_choices_are_scored_behind_latents(latent: Loaded) -> None:
    samples = latent.samples()
    engine = latent.slots(choices=made(latent))
    for sample, outcome in zip(samples, run(engine, samples), strict=True):
        check(outcome, expected(latent, sample, COLORS), COLORS)


def test_only_latents_are_cached() -> None:
    config = DeepseekV3Config(**LATENT, num_attention_heads=4, num_hidden_layers=2)
    (heads, _) = cached_layers(config)
    assert heads == Heads(num_heads=4, num_keys=1, size=16 + 8, is_latent=True)
    assert heads.num_cached == 16 + 8
    assert Heads(num_heads=4, num_keys=2, size=8).num_cached == 2 * 2 * 8


def test_products_with_latents_are_those_with_keys_and_values(latent: Loaded) -> None:
    (module, *_) = [m for m in latent.model.get_decoder().modules() if hasattr(m, "expand_kv")]
    over_slots = False
    latents = Latents(module, lambda: over_slots)
    torch.manual_seed(0)
    pair = torch.randn(3, 1, 7, 16), torch.randn(3, 1, 7, 8)
    query, weight = torch.randn(3, 4, 1, 24), torch.randn(3, 4, 1, 7)
    with torch.inference_mode():
        key, value = latents(*pair)
        over_slots = True
        joined = torch.cat(pair, dim=-1)
        slots = joined, joined[..., :16]
        kept = latents(*slots)
        assert all(a is b for a, b in zip(kept, slots, strict=True))
        scores = latents.query(query) @ joined.transpose(-1, -2)
        torch.testing.assert_close(scores, query @ key.transpose(-1, -2), atol=1e-4, rtol=1e-4)
        out = latents.value((weight @ joined).transpose(1, 2))
        torch.testing.assert_close(out, (weight @ value).transpose(1, 2), atol=1e-4, rtol=1e-4)
