"""Layers in fewer steps: equal to those that they stand for, and only where they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from batchvlm.engine.kernels import tune
from batchvlm.engine.lean import LeanLayer, make_decoder_lean
from batchvlm.engine.lean_encoder import LeanImageAttention, LeanMLP
from batchvlm.engine.packed import PackedLinear, can_pack

from .families import FAMILIES, Family
from .loaded import Loaded

pytestmark = pytest.mark.skipif(
    not can_pack(torch.float32), reason="this torch has no products with packed weights"
)
QWEN = [family for family in FAMILIES if family.name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")]


def family(name: str) -> Family:
    (found,) = (family for family in FAMILIES if family.name == name)
    return found


@pytest.fixture
def model(load_once: Callable[[Family], Loaded]) -> Any:
    """A model of its own for each test."""
    return copy.deepcopy(load_once(family("qwen2_vl")).model)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("family", QWEN, ids=lambda family: family.name)
def test_layers_of_the_common_kind_are_replaced(
    family: Family, load_once: Callable[[Family], Loaded]
) -> None:
    tuned = load_once(family).tuned()
    assert count(tuned, LeanLayer) == len(tuned.get_decoder().layers)
    assert count(tuned, LeanImageAttention) > 0


def test_feed_forward_parts_of_encoders_are_replaced(
    load_once: Callable[[Family], Loaded],
) -> None:
    assert count(load_once(family("qwen2_vl")).tuned(), LeanMLP) > 0


def test_layers_of_another_kind_stay(load_once: Callable[[Family], Loaded]) -> None:
    assert count(load_once(family("gemma3")).tuned(), LeanLayer) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_runs_over_the_packed_weights(model: Any, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    ids_BT = torch.arange(20)[None]
    expected = model(input_ids=ids_BT).logits
    tune(model)
    assert count(model, PackedLinear) > 0
    got = model(input_ids=ids_BT).logits
    allowed = 1e-4 if dtype == torch.float32 else 0.1
    assert (got - expected).abs().max() <= allowed * expected.abs().max()


def test_no_weight_is_held_twice(model: Any) -> None:
    before = sum(weight.numel() for weight in model.parameters())
    tune(model)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    biases = sum(module.bias.numel() for module in packed if module.bias is not None)
    held = sum(weight.numel() for weight in model.parameters())
    held += sum(module.weight.numel() for module in packed) + biases
    assert held == before


def test_an_output_layer_that_is_the_embedding_stays(model: Any) -> None:
    plain = copy.deepcopy(model)
    plain.lm_head.weight = plain.get_input_embeddings().weight
    for its, is_packed in ((model, True), (plain, False)):
        tune(its)
        assert isinstance(its.get_output_embeddings(), PackedLinear) is is_packed


def test_a_layer_that_answers_otherwise_is_not_replaced(model: Any) -> None:
    layers = model.get_decoder().layers
    turned = layers[0].self_attn.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out, weights = turned(*args, **kwargs)
        return 1.01 * out, weights

    layers[0].self_attn.forward = scaled
    assert make_decoder_lean(model) == len(layers) - 1
    assert not isinstance(layers[0], LeanLayer)


def test_linear_layers_that_are_more_than_that_stay(model: Any) -> None:
    class Adapted(nn.Linear):
        pass

    layers = model.get_decoder().layers
    plain = layers[0].mlp.down_proj
    layers[0].mlp.down_proj = Adapted(plain.in_features, plain.out_features, bias=False)
    layers[1].self_attn.q_proj.register_forward_hook(lambda *args: None)
    assert make_decoder_lean(model) == len(layers) - 2


def test_a_machine_without_the_kernels_runs_the_model_as_it_is(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchvlm.engine.packed.PackedLinear.__init__", lambda *args: 1 / 0)
    tune(model)
    assert count(model, LeanLayer) == count(model, PackedLinear) == 0
