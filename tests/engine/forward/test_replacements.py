"""Modules in cheaper forms give what they gave."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

from batchvlm.engine.forward import replacements
from batchvlm.engine.forward.replacements import PackedLinear, tune
from batchvlm.engine.forward.rotations import Rotations

_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
in_bfloat16 = pytest.param(
    torch.bfloat16,
    id="bfloat16",
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        reason="oneDNN has no bfloat16 on a processor without AVX-512",
    ),
)
BOTH = pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), in_bfloat16])


class Model(nn.Module):
    """Whatever `tune` looks at: its parts and where it is."""

    device = torch.device("cpu")

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class GatedMLP(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(24, 40), nn.Linear(24, 40)
        self.down_proj, self.act_fn = nn.Linear(40, 24), ACT2FN[activation]

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(24, 40), ACT2FN[activation], nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed products whatever is faster here."""
    monkeypatch.setattr(replacements, "is_packing_good", lambda dtype: True)


def assert_close(mine: Tensor, its: Tensor) -> None:
    assert mine.dtype == its.dtype and mine.shape == its.shape
    if its.numel():
        tolerance = _ROUNDING[its.dtype] * max(1.0, float(its.abs().max()))
        assert float((mine - its).abs().max()) <= tolerance


@BOTH
@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_a_packed_product_takes_whatever_a_plain_one_does(
    dtype: torch.dtype, has_bias: bool
) -> None:
    plain = nn.Linear(48, 72, bias=has_bias, dtype=dtype)
    packed = PackedLinear(plain)
    for shape in ((1, 48), (7, 48), (3, 5, 48), (2, 1, 3, 48), (0, 48), (1, 0, 48), (48,)):
        x = torch.randn(shape).to(dtype)
        assert_close(packed(x), plain(x))
    for strided in (
        torch.randn(48, 9).to(dtype).t(),
        torch.randn(5, 96).to(dtype)[:, ::2],
        torch.randn(4, 6, 48).to(dtype)[:, 1],
    ):
        assert_close(packed(strided), plain(strided))
    assert torch.equal(packed.weight.to_dense(), plain.weight)


def test_the_plain_weights_go() -> None:
    model = Model(layers=nn.ModuleList(nn.Linear(64, 64) for _ in range(4)))
    plain = [weakref.ref(layer.weight) for layer in model.layers]
    tune(model)
    assert all(type(layer) is PackedLinear for layer in model.layers)
    gc.collect()
    assert [ref() for ref in plain] == [None] * 4


def test_products_that_something_hooks_into_stay() -> None:
    class Adapted(nn.Linear):
        pass

    hooked, offloaded = nn.Linear(8, 8), nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *args: None)
    offloaded._hf_hook = object()
    model = Model(plain=nn.Linear(8, 8), own=Adapted(8, 8), hooked=hooked, offloaded=offloaded)
    tune(model)
    packed = {name for name, part in model.named_children() if type(part) is PackedLinear}
    assert packed == {"plain"}


def test_an_embedding_keeps_the_weight_that_it_shares_with_a_product() -> None:
    embedding, head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
    head.weight = embedding.weight
    model = Model(embedding=embedding, head=head)
    x = torch.randn(3, 16)
    expected = head(x)
    tune(model)
    assert type(model.head) is PackedLinear
    assert_close(model.head(x), expected.detach())
    assert model.embedding.weight.shape == (32, 16)


@BOTH
@pytest.mark.parametrize("part", [MLP, GatedMLP])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@torch.inference_mode()
def test_the_activation_goes_into_the_product_before_it(
    part: type[nn.Module], activation: str, dtype: torch.dtype
) -> None:
    mlp = part(activation).to(dtype)
    x = torch.randn(5, 24).to(dtype)
    expected = mlp(x)
    tune(Model(mlp=mlp))
    identities = [m for m in mlp.modules() if type(m) is nn.Identity]
    assert len(identities) == 1
    assert_close(mlp(x), expected)


@BOTH
@torch.inference_mode()
def test_quick_gelu_goes_into_both_products_in_float32_alone(dtype: torch.dtype) -> None:
    mlp = MLP("quick_gelu").to(dtype)
    x = torch.randn(5, 24).to(dtype)
    expected = mlp(x)
    tune(Model(mlp=mlp))
    is_folded = type(mlp.act) is nn.Identity
    assert is_folded == (dtype is torch.float32)
    assert_close(mlp(x), expected)


@pytest.mark.parametrize("activation", ["gelu_new", "tanh"])
@torch.inference_mode()
def test_an_activation_without_a_fused_form_stays(activation: str) -> None:
    mlp = MLP(activation)
    x = torch.randn(5, 24)
    expected = mlp(x)
    tune(Model(mlp=mlp))
    assert type(mlp.act) is not nn.Identity
    assert_close(mlp(x), expected)


@torch.inference_mode()
def test_an_activation_used_twice_stays() -> None:
    class Twice(MLP):
        def forward(self, x: Tensor) -> Any:
            return self.act(self.fc2(self.act(self.fc1(x))))

    mlp = Twice("silu")
    x = torch.randn(5, 24)
    expected = mlp(x)
    tune(Model(mlp=mlp))
    assert_close(mlp(x), expected)


def test_rotations_are_replaced_while_the_model_runs_and_no_longer() -> None:
    # A module of that file stands for a model.
    model: Any = qwen2_vl.VisionMlp(4, 4, "gelu")
    model.device = torch.device("cpu")
    query, key = torch.randn(2, 3, 4, 6, 8)
    angle = torch.randn(3, 6, 4).repeat(1, 1, 2)
    originals = qwen2_vl.apply_rotary_pos_emb, qwen2_vl.apply_rotary_pos_emb_vision
    decoder = query, key, angle.cos(), angle.sin()
    encoder = query[0], key[0], angle[0, :4].cos(), angle[0, :4].sin()
    expected = originals[0](*decoder), originals[1](*encoder)
    with Rotations(model).replaced():
        file = sys.modules[qwen2_vl.__name__]
        mine: Any = file
        assert mine.apply_rotary_pos_emb is not originals[0]
        got = mine.apply_rotary_pos_emb(*decoder), mine.apply_rotary_pos_emb_vision(*encoder)
    for pair, its in zip(got, expected, strict=True):
        for x, y in zip(pair, its, strict=True):
            assert_close(x, y)
    assert (qwen2_vl.apply_rotary_pos_emb, qwen2_vl.apply_rotary_pos_emb_vision) == originals
