"""The kernel for slots, run by triton's interpreter: each row sees its slot, and no further.

That has to be on before triton is imported, so that all of this runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from batchvlm.engine.forward import flash, slot_kernel, trial
from batchvlm.engine.forward.attention import attending, attention
from batchvlm.engine.forward.layout import Slots, Span

from .test_attention import LAYER, plain, sees

pytest.importorskip("triton", reason="needs triton")

PLACES = [0, 3, 77, 199]
LENGTH = 200


is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not is_interpreted, reason="runs in a process of its own")


@pytest.mark.skipif(is_interpreted, reason="this is that process")
def test_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "1 skipped" in done.stdout


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    forget = slot_kernel.is_faster.cache_clear
    forget()
    yield
    forget()


def draw(heads: int, keys: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and slots, laid out as on a GPU; what lies behind a row is no number."""
    torch.manual_seed(0)
    query = torch.randn(len(PLACES), 1, heads, size).to(dtype).transpose(1, 2)
    key, value = (
        torch.randn(len(PLACES), LENGTH, keys, size).to(dtype).transpose(1, 2) for _ in range(2)
    )
    for slot, place in enumerate(PLACES):
        key[slot, :, place + 1 :] = torch.nan
        value[slot, :, place + 1 :] = torch.nan
    return query, key, value


def check(out: Tensor, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> None:
    for slot, place in enumerate(PLACES):
        q, k, v = (
            x[slot].float() for x in (query, key[:, :, : place + 1], value[:, :, : place + 1])
        )
        expected = plain(q, k, v, sees(1, place, window), q.shape[-1] ** -0.5, None)
        mine = out[slot].transpose(0, 1).float()
        torch.testing.assert_close(mine, expected, atol=3e-3, rtol=3e-3)


@interpreted
@pytest.mark.parametrize(
    ("heads", "keys", "size", "window", "dtype"),
    [
        (4, 4, 32, None, torch.float16),
        (4, 4, 32, 5, torch.float32),
        (8, 2, 64, 64, torch.float16),
        (14, 2, 80, None, torch.float32),
        (14, 2, 80, 5, torch.float16),
        (20, 1, 16, 300, torch.float32),
        (4, 2, 256, None, torch.float16),
        (4, 2, 256, 40, torch.float32),
    ],
)
def test_each_row_sees_its_slot(
    heads: int, keys: int, size: int, window: int | None, dtype: torch.dtype
) -> None:
    query, key, value = draw(heads, keys, size, dtype)
    positions = torch.tensor(PLACES)
    out = slot_kernel.attend(query, key, value, positions, scaling=None, window=window)
    assert out.shape == (len(PLACES), 1, heads, size)
    check(out, query, key, value, window)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flash attention is there, by another name; what attended."""
    used: list[str] = []

    def attend_slots(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        used.append("flash")
        return torch.zeros_like(query.transpose(1, 2))

    own = slot_kernel.attend

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        used.append("kernel")
        return own(*args, **kwargs)

    monkeypatch.setattr(flash, "is_able", lambda query: True)
    monkeypatch.setattr(flash, "attend_slots", attend_slots)
    monkeypatch.setattr(slot_kernel, "attend", attend)
    return used


@interpreted
@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_step_attends_by_the_one_it_is_told(has_kernel: bool, as_on_a_gpu: list[str]) -> None:
    query, key, value = draw(8, 2, 32, torch.float16)
    layout = Slots(torch.tensor(PLACES), (Span(0, len(PLACES), LENGTH),), has_kernel=has_kernel)
    with attending(layout):
        out, _ = attention(LAYER, query, key, value, None, sliding_window=5)
    if has_kernel:
        assert as_on_a_gpu == ["kernel"]
        check(out, query, key, value, 5)
    else:
        assert as_on_a_gpu == ["flash"]


@interpreted
class TestTrial:
    SHAPE = (4, 2, 16, torch.float16, torch.device("cpu"))

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(slot_kernel, "_TRIED_LENGTH", 40)
        monkeypatch.setattr(slot_kernel, "_TRIED_BYTES", 0)

        def by_products(
            query: Tensor, key: Tensor, value: Tensor, bounds: flash.Bounds, **kwargs: Any
        ) -> Tensor:
            assert bounds.used_B is not None
            rows = []
            for slot, used in enumerate(bounds.used_B.tolist()):
                k, v = (x[slot, :, :used].float().repeat_interleave(2, 0) for x in (key, value))
                scores = query[slot].float() @ k.mT * query.shape[-1] ** -0.5
                rows.append((scores.softmax(-1) @ v).transpose(0, 1))
            return torch.stack(rows).to(query.dtype)

        monkeypatch.setattr(flash, "attend_slots", by_products)

    @pytest.fixture
    def won_by(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        def let_win(way: int) -> None:
            monkeypatch.setattr(trial, "fastest", lambda ways, device: way)

        return let_win

    def test_the_faster_one_is_used(self, won_by: Callable[[int], None]) -> None:
        won_by(1)
        assert slot_kernel.is_faster(*self.SHAPE)
        slot_kernel.is_faster.cache_clear()
        won_by(0)
        assert not slot_kernel.is_faster(*self.SHAPE)

    def test_one_that_is_wrong_is_not_used(
        self,
        won_by: Callable[[int], None],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        won_by(1)
        monkeypatch.setattr(slot_kernel, "_LOG2_E", 1.0)
        assert not slot_kernel.is_faster(*self.SHAPE)
        assert "is off by" in caplog.text

    def test_without_triton_there_is_none(
        self, won_by: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        won_by(1)

        def missing() -> Any:
            raise ModuleNotFoundError("No module named 'triton'")

        monkeypatch.setattr(slot_kernel, "_kernel", missing)
        assert not slot_kernel.is_faster(*self.SHAPE)

    def test_a_device_that_fails_is_not_passed_over(
        self, won_by: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing() -> Any:
            raise torch.AcceleratorError("illegal memory access")

        won_by(1)
        monkeypatch.setattr(slot_kernel, "_kernel", failing)
        with pytest.raises(torch.AcceleratorError):
            slot_kernel.is_faster(*self.SHAPE)
