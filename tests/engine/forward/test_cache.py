"""Keys and values find their slot, whatever was there before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig, LlamaConfig

from batchvlm.engine.forward.cache import Heads, PackedCache, RowCache, SlotCache, cached_layers
from batchvlm.engine.forward.layout import Packed

LAYERS, KEYS, SIZE = 2, 3, 4


def row(length: int, seed: int = 0) -> RowCache:
    torch.manual_seed(seed)
    return RowCache([tuple(torch.randn(2, KEYS, length, SIZE)) for _ in range(LAYERS)])


def assert_equal(one: RowCache, other: RowCache) -> None:
    for layer, its in zip(one.layers, other.layers, strict=True):
        for x, y in zip(layer, its, strict=True):
            assert torch.equal(x, y)


def test_a_row_says_what_it_takes() -> None:
    assert row(5).length == 5
    assert row(5).bytes_per_token == LAYERS * 2 * KEYS * SIZE * 4


def test_layers_that_are_alike() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3)
    assert cached_layers(config) == [Heads(num_heads=4, num_keys=4, size=16)] * 3
    config.num_key_value_heads, config.head_dim = 2, 8
    assert cached_layers(config) == [Heads(num_heads=4, num_keys=2, size=8)] * 3


def test_layers_that_differ_and_layers_that_take_the_keys_of_others() -> None:
    config = Gemma4TextConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        head_dim=16,
        global_head_dim=32,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    local, whole = Heads(4, 2, 16), Heads(4, 1, 32)
    assert cached_layers(config) == [local, whole, local, whole]
    config.num_kv_shared_layers = 2
    assert cached_layers(config) == [local, whole]


def test_a_layer_is_known_by_its_keys() -> None:
    packed = Packed(bounds=(0, 3), past=(None,))
    first, second = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    assert [packed.layer_of(0, first), packed.layer_of(1, second)] == [0, 1]
    assert [packed.layer_of(2, second), packed.layer_of(3, first)] == [1, 0]


def test_packed_rows_are_told_apart() -> None:
    cache = PackedCache(LAYERS)
    given = [torch.randn(2, 1, KEYS, 7, SIZE) for _ in range(LAYERS)]
    for i, (key, value) in enumerate(given):
        seen_key, seen_value = cache.update(key, value, i)
        assert seen_key is key and seen_value is value
    assert cache.get_seq_length() == 0
    whole = cache.row(0, 7)
    assert_equal(cache.row(0, 3).joined(cache.row(3, 7)), whole)
    for (key, value), (k, v) in zip(given, whole.layers, strict=True):
        assert torch.equal(key[0], k) and torch.equal(value[0], v)


def test_pieces_are_put_behind_one_another_and_read_back() -> None:
    cache = SlotCache(row(1), num_slots=3, length=8)
    first, second, other = row(2, 1), row(4, 2), row(5, 3)
    cache.put(1, [first, second])
    cache.put(2, [other])
    assert_equal(cache.row(1, 6), first.joined(second))
    assert_equal(cache.row(2, 5), other)
    before = cache.row(1, 6)
    cache.put(1, [other])
    assert_equal(before, first.joined(second))


@pytest.mark.parametrize("is_short", [False, True])
def test_a_row_is_put_whole_where_there_is_memory_for_that(
    is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SlotCache(row(1), num_slots=2, length=8)
    cache._is_put_whole = True  # as on a GPU
    pieces = [row(2, 1), row(4, 2)]
    expected = pieces[0].joined(pieces[1])

    def stack(tensors: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    if is_short:
        monkeypatch.setattr(torch, "stack", stack)
    cache.put(1, pieces)
    assert_equal(cache.row(1, 6), expected)


def latent_row(length: int, seed: int = 0) -> RowCache:
    """Two layers of latents with an ordinary layer between them."""
    torch.manual_seed(seed)
    latents = [(torch.randn(1, length, 5), torch.randn(1, length, 2)) for _ in range(2)]
    (ordinary,) = row(length, seed).layers[:1]
    return RowCache([latents[0], ordinary, latents[1]], latent_layers={0, 2})


def test_latents_lie_beside_their_rotary_parts() -> None:
    first, second, other = latent_row(2, 1), latent_row(4, 2), latent_row(3, 3)
    cache = SlotCache(latent_row(1), num_slots=3, length=8)
    assert cache.bytes_per_token == (2 * (5 + 2) + 2 * KEYS * SIZE) * 4
    cache.put(0, [first, second])
    cache.put(2, [other])
    cache.move(2, 1, 3)
    for slot, its in ((0, first.joined(second)), (1, other), (2, other)):
        assert_equal(cache.row(slot, its.length), its)
    # Slots of another number or length are made like a row of the old ones.
    again = SlotCache(cache.row(0, 0), num_slots=1, length=6)
    again.put(0, [cache.row(0, 6)])
    assert_equal(again.row(0, 6), first.joined(second))


def test_a_step_is_given_latents_and_rotary_parts_as_one_tensor() -> None:
    cache = SlotCache(latent_row(1), num_slots=3, length=8)
    held = latent_row(4, 1)
    cache.put(1, [held])
    cache.use(1, 3, torch.tensor([4, 0]))
    latent, rotary = torch.randn(2, 1, 1, 5), torch.randn(2, 1, 1, 2)
    keys, values = cache.update(latent, rotary, 2)
    assert keys.shape == (2, 1, 8, 7) and values.shape == (2, 1, 8, 5)
    assert keys.data_ptr() == values.data_ptr()
    expected = torch.cat(held.layers[2], dim=-1)
    assert torch.equal(keys[0, :, :4], expected) and torch.equal(values, keys[..., :5])
    assert torch.equal(keys[0, :, 4], torch.cat([latent, rotary], dim=-1)[0, :, 0])
    ordinary = torch.randn(2, 2, KEYS, 1, SIZE)
    assert cache.update(ordinary[0], ordinary[1], 1)[0].shape == (2, KEYS, 8, SIZE)


def test_a_slot_is_moved_and_nothing_else() -> None:
    cache = SlotCache(row(1), num_slots=3, length=8)
    rows = [row(8, 1), row(4, 2), row(6, 3)]
    for slot, its in enumerate(rows):
        cache.put(slot, [its])
    cache.move(2, 0, 6)
    assert_equal(cache.row(0, 6), rows[2])
    assert_equal(cache.row(1, 4), rows[1])
    assert_equal(cache.row(2, 6), rows[2])


def test_nothing_of_the_row_before_is_left_in_a_slot() -> None:
    cache = SlotCache(row(1), num_slots=2, length=8)
    broken = RowCache([(k * torch.nan, v * torch.inf) for k, v in row(8).layers])
    for slot in (0, 1):
        cache.put(slot, [broken])
    cache.put(1, [row(3, 1)])
    cache.move(1, 0, 3)
    for slot in (0, 1):
        for layer in cache.row(slot, 8).layers:
            assert all(bool(x.isfinite().all()) for x in layer)


def test_a_step_writes_each_row_at_its_place_and_sees_the_slots_in_use() -> None:
    cache = SlotCache(row(1), num_slots=4, length=8)
    rows = [row(3, 1), row(5, 2), row(2, 3), row(7, 4)]
    for slot, its in enumerate(rows):
        cache.put(slot, [its])
    new = [torch.randn(2, 2, KEYS, 1, SIZE) for _ in range(LAYERS)]
    cache.use(1, 3, torch.tensor([5, 2]))
    for i, (key, value) in enumerate(new):
        keys, values = cache.update(key, value, i)
        assert keys.shape == values.shape == (2, KEYS, 8, SIZE)
        assert torch.equal(keys[0, :, 5], key[0, :, 0])
        assert torch.equal(values[1, :, 2], value[1, :, 0])
    assert_equal(cache.row(1, 5), rows[1])
    assert_equal(cache.row(2, 2), rows[2])
    assert_equal(cache.row(0, 3), rows[0])
    assert_equal(cache.row(3, 7), rows[3])
    assert torch.equal(cache.row(2, 3).layers[1][0][:, 2], new[1][0][1, :, 0])
    assert cache.get_mask_sizes(1, 0) == (8, 0)
