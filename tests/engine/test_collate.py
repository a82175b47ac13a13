from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from batchvlm.engine.collate import collate, left_pad
from batchvlm.records import Generation, Sample


def sample(*ids: int, row_index: int = 0, **features: Any) -> Sample:
    return Sample(
        row_index=row_index,
        features={
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
            **{name: np.asarray(value) for name, value in features.items()},
        },
        image_tokens=0,
        image_sizes=(),
        generation=Generation(max_new_tokens=4),
    )


def pixels(*shape: int, start: float = 1.0) -> np.ndarray[Any, Any]:
    """Different values everywhere, none of them zero."""
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def test_rows_are_padded_on_the_left() -> None:
    ids_BT, mask_BT = left_pad([np.array([7]), np.array([1, 2, 3]), np.array([4, 5])], pad_id=9)
    assert ids_BT.tolist() == [[9, 9, 7], [1, 2, 3], [9, 4, 5]]
    assert mask_BT.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert ids_BT.dtype == mask_BT.dtype == torch.int64


def test_a_real_token_that_equals_the_padding_stays_visible() -> None:
    _, mask_BT = left_pad([np.array([9, 9]), np.array([9])], pad_id=9)
    assert mask_BT.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("rows", [[], [np.array([])], [np.array([1, 2]), np.array([])]])
def test_no_row_and_an_empty_row_are_refused(rows: list[Any]) -> None:
    with pytest.raises(ValueError, match="at least one row and no empty row"):
        left_pad(rows, pad_id=0)


def test_a_text_batch_has_ids_and_mask_alone() -> None:
    batch = collate([sample(1, 2), sample(3)], pad_id=0)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[1, 2], [0, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"])
def test_marks_of_tokens_are_padded_as_the_tokens_are(name: str) -> None:
    batch = collate([sample(5, 6, 7, **{name: [[1, 1, 2]]}), sample(8, **{name: [[2]]})], pad_id=9)
    assert batch[name].tolist() == [[1, 1, 2], [0, 0, 2]]


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"])
def test_a_row_without_marks_of_tokens_is_all_text(name: str) -> None:
    batch = collate([sample(1, 2), sample(3, 4, 5, **{name: [[1, 1, 1]]})], pad_id=9)
    assert batch[name].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_images_are_concatenated_in_the_order_of_the_rows() -> None:
    first, second = pixels(2, 3, 4, 4), pixels(1, 3, 4, 4, start=500)
    batch = collate([sample(1, pixel_values=first), sample(2, pixel_values=second)], pad_id=0)
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert np.array_equal(batch["pixel_values"][:2].numpy(), first)
    assert np.array_equal(batch["pixel_values"][2:].numpy(), second)


def test_patches_and_their_grids_are_concatenated() -> None:
    batch = collate(
        [
            sample(1, pixel_values=pixels(4, 6), image_grid_thw=[[1, 2, 2]]),
            sample(2, pixel_values=pixels(12, 6), image_grid_thw=[[1, 2, 2], [1, 4, 2]]),
        ],
        pad_id=0,
    )
    assert batch["pixel_values"].shape == (16, 6)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 2], [1, 4, 2]]
    assert batch["image_grid_thw"].dtype == torch.int64


def test_trailing_dimensions_are_padded_with_zeros_behind() -> None:
    few_tiles, many_tiles = pixels(1, 2, 3, 5, 4), pixels(1, 4, 3, 2, 6, start=900)
    batch = collate(
        [
            sample(1, pixel_values=few_tiles, pixel_attention_mask=np.ones((1, 2, 5, 4), bool)),
            sample(2, pixel_values=many_tiles, pixel_attention_mask=np.ones((1, 4, 2, 6), bool)),
        ],
        pad_id=0,
    )
    values, mask = batch["pixel_values"].numpy(), batch["pixel_attention_mask"].numpy()
    assert values.shape == (2, 4, 3, 5, 6)
    assert np.array_equal(values[0, :2, :, :5, :4], few_tiles[0])
    assert np.array_equal(values[1, :4, :, :2, :6], many_tiles[0])
    assert np.count_nonzero(values) == few_tiles.size + many_tiles.size
    assert mask.dtype == np.bool_
    assert mask[0, :2, :5, :4].all() and mask[1, :4, :2, :6].all()
    assert np.count_nonzero(mask) == 2 * 5 * 4 + 4 * 2 * 6


@pytest.mark.parametrize("place", [0, 1, 2])
def test_rows_without_images_leave_no_gap(place: int) -> None:
    with_image = [sample(1, pixel_values=pixels(1, 3)), sample(2, pixel_values=pixels(2, 3))]
    batch = collate([*with_image[:place], sample(3, 4), *with_image[place:]], pad_id=0)
    assert batch["pixel_values"].tolist() == [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
    assert batch["input_ids"].shape == (3, 2)


def test_one_dimensional_features_are_concatenated() -> None:
    batch = collate([sample(1, num_images=[1]), sample(2, num_images=[3])], pad_id=0)
    assert batch["num_images"].tolist() == [1, 3]


def test_samples_are_left_as_they_were() -> None:
    first = sample(1, pixel_values=pixels(1, 3, 2, 2))
    batch = collate([first, sample(2, 3)], pad_id=0)
    batch["pixel_values"].zero_()
    batch["input_ids"].zero_()
    assert first.features["pixel_values"].all()
    assert first.features["input_ids"].tolist() == [[1]]


def test_what_only_training_needs_is_left_out() -> None:
    # PaliGemma's processor returns them for every prompt; a model given labels computes a loss.
    batch = collate([sample(1, 2, labels=[[-100, -100]]), sample(3, labels=[[-100]])], pad_id=0)
    assert "labels" not in batch


def test_patches_on_the_last_dimension_are_joined_there() -> None:
    # MiniCPM-V: all images' patches behind one another, and how many rows and columns of them.
    first, second = pixels(1, 3, 2, 8), pixels(1, 3, 2, 12, start=500)
    batch = collate(
        [
            sample(1, pixel_values=first, target_sizes=[[2, 2]]),
            sample(3),
            sample(2, pixel_values=second, target_sizes=[[1, 2], [2, 2]]),
        ],
        pad_id=0,
    )
    values = batch["pixel_values"].numpy()
    assert values.shape == (1, 3, 2, 20)
    assert np.array_equal(values[..., :8], first) and np.array_equal(values[..., 8:], second)
    assert batch["target_sizes"].tolist() == [[2, 2], [1, 2], [2, 2]]


def test_places_of_patches_are_those_in_the_batch() -> None:
    # Molmo 2: 2 crops of 4 patches, then 1 crop of 4; -1 is no patch.
    batch = collate(
        [
            sample(1, pixel_values=pixels(2, 4, 6), image_token_pooling=[[0, 1], [7, -1]]),
            sample(3),
            sample(2, pixel_values=pixels(1, 4, 6), image_token_pooling=[[0, 3], [-1, -1]]),
            sample(4, pixel_values=pixels(1, 4, 6), image_token_pooling=[[2, -1]]),
        ],
        pad_id=0,
    )
    assert batch["pixel_values"].shape == (4, 4, 6)
    assert batch["image_token_pooling"].tolist() == [[0, 1], [7, -1], [8, 11], [-1, -1], [14, -1]]
    assert batch["image_token_pooling"].dtype == torch.int64


def test_tiles_that_nothing_marks_as_padding_are_not_padded() -> None:
    """PerceptionLM counts every tile that it is given."""
    one, other = pixels(1, 3, 3, 2, 2), pixels(2, 5, 3, 2, 2, start=100)
    batch = collate([sample(1, pixel_values=one), sample(2, pixel_values=other)], pad_id=0)
    tiles = np.concatenate([one.reshape(-1, 1, 3, 2, 2), other.reshape(-1, 1, 3, 2, 2)])
    assert np.array_equal(batch["pixel_values"].numpy(), tiles)
    # Here each image has a size, by which the model tells its tiles from padding.
    sizes = {"image_sizes": [[9, 9]]}
    marked = [sample(1, pixel_values=one, **sizes), sample(2, pixel_values=other[:1], **sizes)]
    assert collate(marked, pad_id=0)["pixel_values"].shape == (2, 5, 3, 2, 2)


def test_patches_of_two_frames_are_no_tiles() -> None:
    """Inkling's processor returns each patch twice, with the colours last."""
    one, other = pixels(6, 2, 4, 4, 3), pixels(2, 2, 4, 4, 3, start=900)
    batch = collate([sample(1, pixel_values=one), sample(2, pixel_values=other)], pad_id=0)
    assert np.array_equal(batch["pixel_values"].numpy(), np.concatenate([one, other]))
