"""What is encoded together, what is shared, and for how long it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.engine.slots.vision import ImageFeatures, Unit, batches
from batchvlm.errors import ErrorType
from batchvlm.records import Array, EngineStats, Failure, Generation, Sample


class Encoder(torch.nn.Module):
    """Says of each image the sum of its pixels, in two vectors."""

    def __init__(self, model_type: str = "llava") -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.calls: list[dict[str, Any]] = []

    @property
    def base_model(self) -> Encoder:
        return self

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: Any = None,
        image_sizes: Any = None,
        batch_num_images: Any = None,
        pixel_attention_mask: Any = None,
        return_dict: bool = False,
    ) -> Any:
        self.calls.append({"pixel_values": pixel_values, "image_grid_thw": image_grid_thw})
        if image_grid_thw is None:
            sums = pixel_values.flatten(1).sum(1)
        else:
            ends = image_grid_thw.prod(-1).cumsum(0).tolist()
            starts = [0, *ends[:-1]]
            sums = torch.stack([pixel_values[a:b].sum() for a, b in zip(starts, ends, strict=True)])
        vectors = sums[:, None, None].expand(-1, 2, 3)
        return Output(None, vectors, deepstack_features=[vectors + 100, vectors + 200])


@dataclass
class Output:
    last_hidden_state: Any
    """Has no default, as in the form of timm's encoders."""
    pooler_output: Any
    deepstack_features: Any = None


def sample(row_index: int, keys: tuple[str, ...], **features: Array) -> Sample:
    return Sample(
        row_index=row_index,
        features={"input_ids": np.ones((1, 3), np.int64), **features},
        image_tokens=0,
        image_sizes=(),
        image_keys=keys,
        generation=Generation(max_new_tokens=1),
    )


def pixels(*values: float, size: int = 2) -> Array:
    return np.stack([np.full((3, size, size), value, np.float32) for value in values])


KEYS = ((0, "a"), (1, "b"), (2, "c"))


def features(**cfg: Any) -> tuple[ImageFeatures, Encoder]:
    encoder = Encoder(cfg.pop("model_type", "llava"))
    return ImageFeatures(encoder, EngineStats(), **cfg), encoder


def encode(images: ImageFeatures, units: Sequence[Unit]) -> None:
    images.keep(units, images.encode(units))


class TestUnits:
    def test_text_alone_has_none(self) -> None:
        assert features()[0].units(sample(0, ())) == ()

    def test_images_of_a_row_are_told_apart(self) -> None:
        images, _ = features()
        units = images.units(sample(0, ("a", "b", "a"), pixel_values=pixels(1, 2, 1)))
        assert [unit.key for unit in units] == ["a", "b", "a"]
        assert [unit.arrays["pixel_values"].max() for unit in units] == [1, 2, 1]
        assert [unit.num_entries for unit in units] == [1, 1, 1]

    def test_patches_of_images_are_told_apart_by_their_grid(self) -> None:
        images, _ = features()
        grid = np.array([[1, 2, 2], [1, 1, 3]])
        patches = np.arange(7, dtype=np.float32)[:, None]
        units = images.units(sample(0, ("a", "b"), pixel_values=patches, image_grid_thw=grid))
        assert [unit.arrays["pixel_values"][:, 0].tolist() for unit in units] == [
            [0, 1, 2, 3],
            [4, 5, 6],
        ]
        assert [unit.arrays["image_grid_thw"].tolist() for unit in units] == [
            [[1, 2, 2]],
            [[1, 1, 3]],
        ]

    def test_what_else_there_is_of_each_image_goes_with_it(self) -> None:
        images, _ = features()
        images._names |= {"image_merge_sizes"}
        grid = np.array([[1, 2, 2], [1, 1, 3]])
        patches = {"pixel_values": np.ones((7, 1), np.float32), "image_grid_thw": grid}
        row = sample(0, ("a", "b"), **patches, image_merge_sizes=np.array([1, 2]))
        units = images.units(row)
        assert [unit.arrays["image_merge_sizes"].tolist() for unit in units] == [[1], [2]]
        assert [len(unit.arrays["pixel_values"]) for unit in units] == [4, 3]

    @pytest.mark.parametrize("nums", [(2, 0), (0, 2), (1, 1), (3, 1)])
    def test_tiles_beside_the_images_are_told_apart_by_their_numbers(
        self, nums: tuple[int, int]
    ) -> None:
        images, _ = features()
        tiles = {
            "pixel_values_local": pixels(*range(10, 10 + sum(nums)), size=3),
            "num_local_patches": np.array(nums),
        }
        row = sample(0, ("a", "b"), pixel_values=pixels(1, 2), **tiles)
        images._names |= {*tiles}
        units = images.units(row)
        assert [unit.key for unit in units] == ["a", "b"]
        assert [unit.arrays["num_local_patches"].tolist() for unit in units] == [[n] for n in nums]
        assert [len(unit.arrays.get("pixel_values_local", ())) for unit in units] == [*nums]
        assert [unit.num_cells for unit in units] == [12 + 27 * n for n in nums]

    @pytest.mark.parametrize(
        "arrays",
        [
            # Five tiles of two images.
            {"pixel_values": pixels(1, 2, 3, 4, 5)},
            {"pixel_values": pixels(1, 2), "batch_num_images": np.array([2])},
            {"pixel_values": pixels(1), "image_grid_thw": np.array([[1, 2, 2], [1, 1, 3]])},
        ],
        ids=["tiles", "counted", "grid"],
    )
    def test_images_that_cannot_be_told_apart_are_one(self, arrays: Mapping[str, Array]) -> None:
        images, _ = features()
        (unit,) = images.units(sample(0, ("a", "b"), **arrays))
        assert unit.key == "a+b"
        for name, array in arrays.items():
            assert unit.arrays[name] is array

    def test_the_same_images_in_another_order_are_another_unit(self) -> None:
        images, _ = features()
        tiles = {"pixel_values": pixels(1, 2, 3)}
        (one,) = images.units(sample(0, ("a", "b"), **tiles))
        (other,) = images.units(sample(1, ("b", "a"), **tiles))
        assert one.key != other.key

    def test_rows_of_tiles_lose_the_dimension_of_the_row(self) -> None:
        images, _ = features(model_type="idefics3")
        (unit,) = images.units(sample(0, ("a",), pixel_values=pixels(1, 2, 3)[None]))
        assert unit.arrays["pixel_values"].shape == (3, 1, 3, 2, 2)
        assert unit.num_entries == 3

    def test_images_of_molmo_2_are_counted_by_their_grids(self) -> None:
        crops = {"pixel_values": pixels(1, 2, 3), "image_grids": np.ones((2, 4), np.int64)}
        assert Unit("a+b", crops).num_entries == 2

    @pytest.mark.parametrize("is_shared", [True, False])
    def test_rows_without_sharing_have_units_of_their_own(self, is_shared: bool) -> None:
        images, _ = features(is_shared=is_shared)
        keys = ("a",) if not is_shared else ()
        units = [images.units(sample(i, keys, pixel_values=pixels(1)))[0] for i in range(2)]
        assert units[0].key != units[1].key


class TestEncoding:
    def test_each_content_once_and_its_entries_in_the_order_of_each_row(self) -> None:
        images, encoder = features()
        rows = [("a", "b"), ("b",), ("b", "a", "c")]
        values = {"a": 1.0, "b": 2.0, "c": 3.0}
        units = [
            images.units(sample(i, keys, pixel_values=pixels(*(values[k] for k in keys))))
            for i, keys in enumerate(rows)
        ]
        for row in units:
            images.retain(row)
        missing = images.missing(unit for row in units for unit in row)
        assert [unit.key for unit in missing] == ["a", "b", "c"]
        encode(images, missing)
        assert images.missing(missing) == []
        assert images.stats.images_encoded == 3
        assert len(encoder.calls) == 1
        for row, keys in zip(units, rows, strict=True):
            entries = images.entries(row)
            assert [e.pooled_PD[0, 0].item() for e in entries] == [12 * values[k] for k in keys]
            joined = images.joined(entries)
            assert joined.pooler_output[:, 0, 0].tolist() == [12 * values[k] for k in keys]
            for i, layer in enumerate(joined.deepstack_features, 1):
                assert torch.equal(layer, joined.pooler_output + 100 * i)
        assert images.joined([]) is None

    def test_what_nobody_needs_is_kept_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images, _ = features()
        several = [images.units(sample(i, (key,), pixel_values=pixels(i))) for i, key in KEYS]
        for (unit,) in several:
            images.retain([unit])
            encode(images, [unit])
        size_bytes = sum(entry.size_bytes for entry in images.entries(several[0]))
        monkeypatch.setattr("batchvlm.engine.slots.vision._IDLE_BYTES", 2 * size_bytes)
        for units in several:
            images.release(units)
        assert [bool(images.missing(units)) for units in several] == [True, False, False]
        # However often it was needed again, one counts once.
        for _ in range(3):
            images.retain(several[1])
            images.release(several[1])
        assert [bool(images.missing(units)) for units in several] == [True, False, False]
        # One that is needed again is not the next to go.
        images.retain(several[1])
        encode(images, several[0])
        images.retain(several[0])
        images.release(several[0])
        assert not images.missing(several[1])

    def test_a_unit_is_forgotten_with_its_last_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("batchvlm.engine.slots.vision._IDLE_BYTES", 0)
        images, _ = features()
        (unit,) = images.units(sample(0, ("a",), pixel_values=pixels(1)))
        images.retain([unit])
        images.retain([unit])
        encode(images, [unit])
        images.release([unit])
        assert len(images.entries([unit])) == 1
        images.release([unit])
        assert images.missing([unit]) == [unit]
        with pytest.raises(KeyError):
            images.entries([unit])

    def test_what_is_kept_does_not_keep_the_rest_of_its_batch(self) -> None:
        images, _ = features()
        units = images.units(sample(0, ("a", "b"), pixel_values=pixels(1, 2)))
        images.retain(units)
        encode(images, units)
        for entry in images.entries(units):
            for tensor in (entry.pooled_PD, *entry.deep):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * 4

    def test_a_failure_is_kept_as_long_as_a_row_asks(self) -> None:
        images, _ = features()
        failure = Failure(error_type=ErrorType.ENGINE, message="no")
        units = images.units(sample(0, ("a", "b"), pixel_values=pixels(1, 2)))
        images.retain(units)
        images.fail(units[1], failure)
        assert images.failure(units) == failure
        assert images.failure(units[:1]) is None
        assert images.missing(units) == [units[0]]
        images.release(units)
        assert images.failure(units) is None

    def test_an_encoder_that_gives_another_number_of_images_is_an_error(self) -> None:
        images, _ = features()
        (unit,) = images.units(sample(0, ("a",), pixel_values=pixels(1)))
        images._encode = lambda **kwargs: Output(None, torch.zeros(2, 2, 3))
        with pytest.raises(ValueError, match="2 image features for 1 images"):
            encode(images, [unit])


@given(
    units=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3])), max_size=12),
    max_cells=st.integers(1, 60),
)
def test_batches_hold_units_of_one_shape_within_the_limit(
    units: list[tuple[int, int]], max_cells: int
) -> None:
    made = [
        Unit(str(i), {"pixel_values": np.zeros((num, size), np.float32)})
        for i, (num, size) in enumerate(units)
    ]
    groups = batches(made, max_cells)
    assert sorted(int(unit.key) for group in groups for unit in group) == list(range(len(made)))
    for group in groups:
        assert len({unit.shape for unit in group}) == 1
        assert len(group) == 1 or sum(unit.num_cells for unit in group) <= max_cells
    for one, other in pairwise(groups):
        is_same = one[0].shape == other[0].shape
        assert not is_same or sum(u.num_cells for u in (*one, other[0])) > max_cells
