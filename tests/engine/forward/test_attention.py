"""Attention over packed rows and over slots equals attention over each row by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from batchvlm.engine.forward.attention import attending, attention, row_masks
from batchvlm.engine.forward.layout import KeysValues, Packed, Slots, Span

LAYER = SimpleNamespace(layer_idx=1)
SIZE = 8
HEADS = st.sampled_from([(4, 4), (4, 2), (6, 1)])
WINDOWS = st.none() | st.integers(1, 12)
CAPS = st.none() | st.just(1.5)
SCALES = st.none() | st.just(0.7)


def plain(
    q_HTD: Tensor,
    k_KLD: Tensor,
    v_KLD: Tensor,
    mask_TL: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """One row by the textbook, [H, T, D]."""
    groups = len(q_HTD) // len(k_KLD)
    k_HLD, v_HLD = (x.repeat_interleave(groups, 0) for x in (k_KLD, v_KLD))
    scores = q_HTD @ k_HLD.mT * (SIZE**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask_TL, -torch.inf).softmax(-1) @ v_HLD


def sees(num_new: int, num_before: int, window: int | None) -> Tensor:
    newest = torch.arange(num_before, num_before + num_new)[:, None]
    places = torch.arange(num_before + num_new)
    return (places <= newest) & (places > newest - (window or 1 << 30))


@settings(max_examples=60)
@given(
    heads=HEADS,
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4),
    window=WINDOWS,
    softcap=CAPS,
    scaling=SCALES,
    seed=st.integers(0, 99),
)
def test_packed_rows(
    heads: tuple[int, int],
    lengths: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_heads, num_keys = heads
    total = sum(new for new, _ in lengths)
    query = torch.randn(1, num_heads, total, SIZE)
    key, value = torch.randn(2, 1, num_keys, total, SIZE)
    past: list[list[KeysValues] | None] = []
    for _, before in lengths:
        layers = [tuple(torch.randn(2, num_keys, before, SIZE)) for _ in range(2)]
        past.append(layers if before else None)
    bounds = [0]
    for new, _ in lengths:
        bounds.append(bounds[-1] + new)
    with attending(Packed(bounds=tuple(bounds), past=tuple(past))):
        out, _ = attention(
            LAYER,
            query,
            key,
            value,
            None,
            scaling=scaling,
            sliding_window=window,
            softcap=softcap,
        )
    assert out.shape == (1, total, num_heads, SIZE)
    for i, (new, before) in enumerate(lengths):
        here = slice(bounds[i], bounds[i + 1])
        k, v = key[0, :, here], value[0, :, here]
        layers_i = past[i]
        if layers_i is not None:
            k, v = (torch.cat(x, 1) for x in zip(layers_i[1], (k, v), strict=True))
        expected = plain(query[0, :, here], k, v, sees(new, before, window), scaling, softcap)
        torch.testing.assert_close(out[0, here].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(
    heads=HEADS,
    positions=st.lists(st.integers(0, 15), min_size=1, max_size=6),
    width=st.integers(1, 6),
    window=WINDOWS,
    softcap=CAPS,
    scaling=SCALES,
    seed=st.integers(0, 99),
)
def test_slots(
    heads: tuple[int, int],
    positions: list[int],
    width: int,
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_heads, num_keys = heads
    num_rows = len(positions)
    # As the models give it: heads behind the one token, turned round.
    query = torch.randn(num_rows, 1, num_heads, SIZE).transpose(1, 2)
    key, value = torch.randn(2, num_rows, num_keys, 20, SIZE)
    spans = tuple(
        Span(start, min(start + width, num_rows), 1 + max(positions[start : start + width]))
        for start in range(0, num_rows, width)
    )
    with attending(Slots(torch.tensor(positions), spans)):
        out, _ = attention(
            LAYER,
            query,
            key,
            value,
            None,
            scaling=scaling,
            sliding_window=window,
            softcap=softcap,
        )
    assert out.shape == (num_rows, 1, num_heads, SIZE)
    for i, place in enumerate(positions):
        k, v = key[i, :, : place + 1], value[i, :, : place + 1]
        expected = plain(query[i], k, v, sees(1, place, window), scaling, softcap)
        torch.testing.assert_close(out[i].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


class TestMasks:
    @pytest.fixture
    def layout(self) -> Packed:
        return Packed(bounds=(0, 5, 9), past=(None, None))

    def masks(self, layout: Packed | Slots, function: Any, **kwargs: Any) -> Tensor | None:
        with attending(layout):
            return row_masks(mask_function=function, device=torch.device("cpu"), **kwargs)

    def test_plainly_causal_rows_need_none(self, layout: Packed) -> None:
        assert self.masks(layout, causal_mask_function) is None
        assert not layout.sees_ahead

    @pytest.mark.parametrize("use_vmap", [False, True])
    def test_a_window_is_counted_from_each_rows_own_start(
        self, layout: Packed, use_vmap: bool
    ) -> None:
        def sees_three(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (key <= query) & (key > query - 3)

        masks = self.masks(layout, sees_three, use_vmap=use_vmap)
        assert masks is not None
        expected = torch.zeros(9, 9, dtype=torch.bool)
        expected[:5, :5], expected[5:, 5:] = sees(5, 0, 3), sees(4, 0, 3)
        torch.testing.assert_close(masks[0, 0] & expected, masks[0, 0])
        for start, stop in layout.spans:
            here = masks[0, 0, start:stop, start:stop]
            places = torch.arange(start, stop)
            behind = places[:, None] - places
            torch.testing.assert_close(here, (behind >= 0) & (behind < 3))
        assert not layout.sees_ahead

    @pytest.mark.parametrize("use_vmap", [False, True])
    def test_a_row_that_sees_ahead_says_so_and_is_attended_so(
        self, layout: Packed, use_vmap: bool
    ) -> None:
        # The first tokens of each prompt of this pack see each other, as those of an image do.
        image_T = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 0]).bool()

        def sees_images(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (key <= query) | (image_T[query] & image_T[key])

        masks = self.masks(layout, sees_images, use_vmap=use_vmap)
        assert masks is not None and layout.sees_ahead
        assert not masks[0, 0, :5, 5:].any() and not masks[0, 0, 5:, :5].any()
        query, key, value = torch.randn(3, 1, 2, 9, SIZE)
        with attending(layout):
            out, _ = attention(LAYER, query, key, value, masks)
        for (start, stop), num_image in zip(layout.spans, (3, 2), strict=True):
            here = slice(start, stop)
            seen = sees(stop - start, 0, None)
            seen[:num_image, :num_image] = True
            expected = plain(
                query[0, :, here], key[0, :, here], value[0, :, here], seen, None, None
            )
            torch.testing.assert_close(out[0, here].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)

    def test_a_sliding_window_needs_none_and_is_attended_so(self, layout: Packed) -> None:
        assert self.masks(layout, sliding_window_causal_mask_function(3)) is None
        query, key, value = torch.randn(3, 1, 2, 9, SIZE)
        with attending(layout):
            out, _ = attention(LAYER, query, key, value, None, sliding_window=3)
        for start, stop in layout.spans:
            here = slice(start, stop)
            q, k, v = query[0, :, here], key[0, :, here], value[0, :, here]
            expected = plain(q, k, v, sees(stop - start, 0, 3), None, None)
            torch.testing.assert_close(out[0, here].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        "function",
        [
            or_masks(sliding_window_causal_mask_function(3), lambda b, h, q, k: k == 0),
            and_masks(sliding_window_causal_mask_function(3), lambda b, h, q, k: k != 1),
            sliding_window_bidirectional_mask_function(3),
            chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long)),
        ],
        ids=["or", "and", "both_sides", "chunks"],
    )
    def test_what_only_resembles_a_window_is_no_window(self, layout: Packed, function: Any) -> None:
        masks = self.masks(layout, function)
        assert masks is not None and bool(masks.any())

    def test_slots_need_none(self) -> None:
        layout = Slots(torch.tensor([3]), (Span(0, 1, 4),))
        assert self.masks(layout, sliding_window_causal_mask_function(3)) is None


def test_it_is_refused_where_no_form_is_announced() -> None:
    query = torch.randn(1, 2, 3, SIZE)
    with pytest.raises(RuntimeError, match="outside of `attending`"):
        attention(LAYER, query, query, query, None)


def test_sinks_are_refused() -> None:
    query = torch.randn(1, 2, 3, SIZE)
    with pytest.raises(NotImplementedError, match="sinks"):
        attention(LAYER, query, query, query, None, s_aux=torch.zeros(2))
