"""Attention by products gives what torch's own attention gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchvlm.engine.forward import cpu_attention
from batchvlm.engine.forward.attention import attending, attention
from batchvlm.engine.forward.layout import Packed

_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BOTH = pytest.mark.parametrize("dtype", list(_ROUNDING), ids=["float32", "bfloat16"])
HEADS = pytest.mark.parametrize(("num_heads", "num_keys"), [(3, 3), (4, 2), (6, 1)])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def heads(num: int, length: int, *, rows: int = 1, size: int = 16) -> Tensor:
    """As a model has them: tokens before heads in memory."""
    return torch.randn(rows, length, num, size).transpose(1, 2)


def assert_close(mine: Tensor, its: Tensor) -> None:
    """`its` in float32."""
    most = _ROUNDING[mine.dtype] * float(its.abs().max())
    assert mine.shape == its.shape
    assert float((mine.float() - its).abs().max()) <= most


@BOTH
@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 130, 700, 1500])
@torch.inference_mode()
def test_images(num_tokens: int, num_images: int, dtype: torch.dtype) -> None:
    query, key, value = (heads(3, num_tokens, rows=num_images).to(dtype) for _ in range(3))
    mine = cpu_attention.attend_images(query, key, value, 0.1)
    its = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=0.1)
    assert_close(mine, its)


@BOTH
@HEADS
@pytest.mark.parametrize("num_before", [0, 1, 250])
@pytest.mark.parametrize("num_tokens", [1, 5, 192, 193, 500])
@torch.inference_mode()
def test_prompts(
    num_tokens: int, num_before: int, num_heads: int, num_keys: int, dtype: torch.dtype
) -> None:
    query = heads(num_heads, num_tokens).to(dtype)
    key, value = (heads(num_keys, num_before + num_tokens).to(dtype) for _ in range(2))
    mine = cpu_attention.attend_prompt(query[0], key[0], value[0], 0.1)
    mask = torch.ones(num_tokens, num_before + num_tokens).tril(num_before).bool()
    its = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), mask, scale=0.1, enable_gqa=True
    )
    assert_close(mine, its[0])


@torch.inference_mode()
def test_values_of_another_size() -> None:
    query, key, value = heads(4, 120), heads(2, 150), heads(2, 150, size=24)
    mine = cpu_attention.attend_prompt(query[0], key[0], value[0], 0.1)
    mask = torch.ones(120, 150).tril(30).bool()
    its = F.scaled_dot_product_attention(query, key, value, mask, scale=0.1, enable_gqa=True)
    assert_close(mine, its[0])


LAYER = SimpleNamespace(layer_idx=0)


@torch.inference_mode()
def test_packed_prompts_take_them_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    past = heads(2, 30)[0], heads(2, 30)[0]
    layout = Packed(bounds=(0, 110, 220, 225), past=(None, [past], None))
    query, key, value = heads(4, 225), heads(2, 225), heads(2, 225)

    def attended(*, is_faster: bool) -> Tensor:
        monkeypatch.setattr(cpu_attention, "are_faster_for_prompts", lambda *shape: is_faster)
        with attending(layout):
            return attention(LAYER, query, key, value, None)[0]

    its = attended(is_faster=False)
    calls = counted(monkeypatch, "attend_prompt")
    assert_close(attended(is_faster=True), its)
    # Not for the prompt of five tokens.
    assert calls == [110, 110]


def test_long_prompts_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "are_faster_for_prompts", lambda *shape: True)
    query, key = (torch.empty(num, 200, 16, device="meta") for num in (32, 8))
    assert cpu_attention.are_good_for_prompt(query, key)
    # 32 heads of 192 queries at a time.
    longest = (16 << 20) // (32 * 192)
    for length, is_good in ((longest, True), (longest + 1, False)):
        key = torch.empty(8, length, 16, device="meta")
        assert cpu_attention.are_good_for_prompt(query, key) is is_good


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Lengths of the queries that a function is called for from now on."""
    calls: list[int] = []
    original: Any = getattr(cpu_attention, name)

    def spy(query: Tensor, *args: Any) -> Any:
        calls.append(query.shape[-2])
        return original(query, *args)

    monkeypatch.setattr(cpu_attention, name, spy)
    return calls


@BOTH
def test_trials_end(dtype: torch.dtype) -> None:
    assert cpu_attention.are_faster_for_prompts(4, 2, 16, dtype) in (True, False)
    assert cpu_attention.are_faster_for_images(3, 16, dtype) in (True, False)
