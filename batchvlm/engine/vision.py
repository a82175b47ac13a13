"""Image features, each image encoded once for all rows of the window that show it.

A *unit* is what can be encoded by itself: one image where the family's processor keeps images
apart, else all images of a row. The encoder runs over batches of units of like size, and its output
for each is kept until the last row that needs it is prefilled, and a while longer.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchvlm.engine import image_attention
from batchvlm.engine.collate import join_features
from batchvlm.engine.fusing import falling_back
from batchvlm.engine.grids import find_encoder, made_of_grids
from batchvlm.engine.kernels import is_same
from batchvlm.engine.rotations import Rotations
from batchvlm.engine.streams import Together
from batchvlm.pixels import to_numbers
from batchvlm.records import Array, EngineStats, Failure, PixelTable, Sample

log = logging.getLogger(__name__)

_IDLE_BYTES = 128 << 20
_WORKING_BY_ITSELF = frozenset({"cuda"})
"""Devices that work behind what is launched."""
_GRIDS = "image_grid_thw"
# Families whose processors put a row's tiles on the second dimension, behind one for the row.
_ROWS_OF_TILES = frozenset({"idefics2", "idefics3", "smolvlm"})


@dataclass(frozen=True, slots=True)
class Entry:
    """The encoder's output for one image, or for one tile."""

    pooled_PD: Tensor
    """[P, D]: a vector for each of its P image tokens."""
    deep: tuple[Tensor, ...] = ()
    """Likewise for deeper layers of the decoder, [P, D] each (Qwen3-VL)."""

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.pooled_PD, *self.deep))


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What the outputs of one model's encoder have in common."""

    type_: Any
    is_stacked: bool
    """Whether the family gives one tensor for all images rather than one for each."""
    marks: Tensor | None
    """Embeddings of the tokens around an image, the same for all (Ovis2)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoder's output for the units of one forward."""

    entries: list[Entry]
    """Those of all units, behind one another."""
    form: OutputForm


@dataclass(frozen=True, slots=True)
class Unit:
    """Images that are encoded together, from one row."""

    key: str
    """The same for the same content."""
    arrays: Mapping[str, Array]
    """The processor's arrays for it, as `get_image_features` takes them."""

    @property
    def num_entries(self) -> int:
        """Entries that the encoder makes of it: one an image, or one a tile."""
        for name in (_GRIDS, "image_grids"):
            if name in self.arrays:
                return len(self.arrays[name])
        return len(self.arrays["pixel_values"])

    @property
    def num_cells(self) -> int:
        """Numbers of its pixel array: what encoding it costs, roughly."""
        return int(self.arrays["pixel_values"].size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Units of one shape are joined without padding."""
        return self.arrays["pixel_values"].shape[1:]


class ImageFeatures:
    """Encodes units and keeps what rows still need.

    Args:
        model: a transformers model with `get_image_features`.
        stats: counts what was encoded.
        is_shared: whether rows that show the same image share it; off only to measure.
        around: makes what the encoder runs within.
    """

    def __init__(
        self,
        model: Any,
        stats: EngineStats,
        *,
        is_shared: bool = True,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._encode = model.base_model.get_image_features
        self._names = frozenset(inspect.signature(self._encode).parameters)
        self._model_type = model.config.model_type
        self._device, self._dtype = model.device, model.dtype
        self._rotations = Rotations(model)
        self._around = around
        is_ahead = self._device.type in _WORKING_BY_ITSELF and _GRIDS in self._names
        self._of_grids = find_encoder(model.base_model) if is_ahead else None
        """The encoder, where what it makes of patch grids is worked out on the host."""
        self._is_tried = False
        self._attention = name, configs = image_attention.encoder_configs(model)
        if name == image_attention.NAME_IN_HALF:
            image_attention.choose_way(configs, model.dtype)
        self.stats = stats
        self._is_shared = is_shared
        self._users: dict[str, int] = {}
        self._idle: OrderedDict[str, int] = OrderedDict()
        """Bytes of what no row needs at the moment, the least recently used first."""
        self._idle_bytes = 0
        """Of all of it: rows come and go, and there may be thousands of images."""
        self._entries: dict[str, Sequence[Entry]] = {}
        self._failures: dict[str, Failure] = {}
        self._form: OutputForm | None = None
        self._pixel_table: PixelTable | None = None
        """What the bytes of pixels stand for, the same for all rows of a job; None: numbers."""
        self._encoding = Together(self._replacing)

    def units(self, sample: Sample) -> tuple[Unit, ...]:
        """What a row needs encoded, in the order of its images; empty for text alone."""
        arrays = {n: a for n, a in sample.features.items() if n in self._names}
        if "pixel_values" not in arrays:
            return ()
        self._pixel_table = sample.pixel_table
        if self._model_type in _ROWS_OF_TILES:
            arrays = {n: a.reshape(-1, 1, *a.shape[2:]) for n, a in arrays.items()}
        keys = sample.image_keys
        if not self._is_shared or not keys:
            return (Unit(f"{sample.row_index}", arrays),)
        parts = _by_image(arrays, len(keys)) if len(keys) > 1 else None
        if parts is None:
            return (Unit("+".join(keys), arrays),)
        return tuple(Unit(key, part) for key, part in zip(keys, parts, strict=True))

    def retain(self, units: Iterable[Unit]) -> None:
        """Count one more row that needs these units."""
        for unit in units:
            self._users[unit.key] = self._users.get(unit.key, 0) + 1
            self._idle_bytes -= self._idle.pop(unit.key, 0)

    def release(self, units: Iterable[Unit]) -> None:
        """Count one row less; of what nobody needs, the latest is kept: a row may come yet."""
        for unit in units:
            self._users[unit.key] -= 1
            if self._users[unit.key]:
                continue
            del self._users[unit.key]
            self._failures.pop(unit.key, None)
            if unit.key in self._entries:
                size_bytes = sum(entry.size_bytes for entry in self._entries[unit.key])
                self._idle[unit.key] = size_bytes
                self._idle_bytes += size_bytes
        while self._idle_bytes > (_IDLE_BYTES if self._is_shared else 0):
            key, size_bytes = self._idle.popitem(last=False)
            self._idle_bytes -= size_bytes
            del self._entries[key]

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        """Those that were not tried yet, each content once."""
        found = {u.key: u for u in units}
        return [u for k, u in found.items() if k not in self._entries and k not in self._failures]

    def fail(self, unit: Unit, failure: Failure) -> None:
        """Note that a unit cannot be encoded."""
        self._failures[unit.key] = failure

    def failure(self, units: Iterable[Unit]) -> Failure | None:
        """Why one of these could not be encoded, if so."""
        return next((self._failures[u.key] for u in units if u.key in self._failures), None)

    @torch.inference_mode()
    def encode(self, units: Sequence[Unit]) -> Encoded:
        """Encode units of one shape in one forward; changes nothing, several threads may."""
        is_gpu = self._device.type == "cuda"
        joined = join_features([unit.arrays for unit in units], is_pinned=is_gpu)
        pixels = self._to_device(joined.pop("pixel_values"))
        if self._pixel_table is not None:
            pixels = to_numbers(self._pixel_table, pixels, self._dtype)
        with self._encoding.within():
            output = self._output(pixels, joined)
        pooled = output.pooler_output
        layers = getattr(output, "deepstack_features", None) or ()
        num_entries = sum(unit.num_entries for unit in units)
        if len(pooled) != num_entries:
            raise ValueError(f"{len(pooled)} image features for {num_entries} images")
        # Copies: a view would keep the whole batch's features alive for the last row of it.
        entries = [
            Entry(vectors_PD.clone(), tuple(layer[i].clone() for layer in layers))
            for i, vectors_PD in enumerate(pooled)
        ]
        marks = getattr(output, "visual_indicator_features", None)
        return Encoded(entries, OutputForm(type(output), isinstance(pooled, Tensor), marks))

    def _output(self, pixels: Tensor, rest: Mapping[str, Tensor]) -> Any:
        """The encoder's output for pixels on the device and what else it takes."""

        def plainly() -> Any:
            inputs = {name: self._to_device(tensor) for name, tensor in rest.items()}
            return self._encode(pixel_values=pixels, **inputs, return_dict=True)

        def ahead(encoder: nn.Module) -> Any:
            inputs = made_of_grids(encoder, rest[_GRIDS])
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    # Of their own type: these are places, and weights of places.
                    inputs[name] = self._sent(value)
            inputs[_GRIDS] = rest[_GRIDS]
            return self._encode(pixel_values=pixels, **inputs, return_dict=True)

        encoder = self._of_grids
        if encoder is None or set(rest) != {_GRIDS}:
            return plainly()
        if self._is_tried:
            return ahead(encoder)
        # What a family has beside the names that all have shows at its first images.
        self._is_tried = True
        expected = plainly()
        if not is_same(
            lambda _: _numbers_of(expected), lambda _: _numbers_of(ahead(encoder)), pixels
        ):
            self._of_grids = None
            log.debug("the encoder reads patch grids back from the device")
        return expected

    def keep(self, units: Sequence[Unit], encoded: Encoded) -> None:
        """Keep the encoder's output for units, for the rows that need it."""
        self._form = encoded.form
        entries = encoded.entries
        for unit in units:
            count = unit.num_entries
            self._entries[unit.key], entries = entries[:count], entries[count:]
        self.stats.images_encoded += len(units)

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        own_attention = image_attention.attending(*self._attention)
        with own_attention, self._around(), self._rotations.replaced(), falling_back():
            yield

    def entries(self, units: Iterable[Unit]) -> list[Entry]:
        """The encoder's output for these units, in order."""
        return [entry for unit in units for entry in self._entries[unit.key]]

    def joined(self, entries: Sequence[Entry]) -> Any:
        """The encoder's output for these entries, as the model takes it; None for none."""
        if not entries:
            return None
        form = self._form
        assert form is not None

        def join(tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
            return torch.stack(list(tensors)) if form.is_stacked else tuple(tensors)

        output = form.type_(pooler_output=join([entry.pooled_PD for entry in entries]))
        if entries[0].deep:
            by_layer = zip(*(entry.deep for entry in entries), strict=True)
            output.deepstack_features = [join(layer) for layer in by_layer]
        if form.marks is not None:
            output.visual_indicator_features = form.marks
        return output

    def _to_device(self, tensor: Tensor) -> Tensor:
        return self._sent(tensor).to(self._dtype if tensor.is_floating_point() else tensor.dtype)

    def _sent(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self._device, non_blocking=True)


def _numbers_of(output: Any) -> Tensor:
    """Everything in an encoder's output that is used later, as one row of numbers."""
    deep = getattr(output, "deepstack_features", None) or ()
    parts = [*output.pooler_output, *(vectors for layer in deep for vectors in layer)]
    return torch.cat([part.reshape(-1) for part in parts])


def batches(units: Sequence[Unit], max_cells: int) -> list[list[Unit]]:
    """Units in groups of one shape and at most `max_cells`, largest first; a larger one alone."""
    groups: list[list[Unit]] = []
    cells = 0
    for unit in sorted(units, key=lambda u: (u.shape, u.num_cells), reverse=True):
        is_full = not groups or cells + unit.num_cells > max_cells
        if is_full or groups[-1][0].shape != unit.shape:
            groups.append([])
            cells = 0
        groups[-1].append(unit)
        cells += unit.num_cells
    return groups


def _by_image(arrays: Mapping[str, Array], num_images: int) -> list[dict[str, Array]] | None:
    """The arrays of each image, or None where they cannot be told apart."""
    grid = arrays.get(_GRIDS)
    if grid is not None and len(grid) == num_images:
        ends = np.cumsum(grid.prod(-1))
        if ends[-1] != len(arrays["pixel_values"]) or set(arrays) != {"pixel_values", _GRIDS}:
            return None
        pixels = np.split(arrays["pixel_values"], ends[:-1])
        return [{"pixel_values": p, _GRIDS: grid[i : i + 1]} for i, p in enumerate(pixels)]
    # Where the number of images counts, an image alone is not encoded as one of several.
    is_counted = "batch_num_images" in arrays
    if not is_counted and all(len(array) == num_images for array in arrays.values()):
        return [{n: a[i : i + 1] for n, a in arrays.items()} for i in range(num_images)]
    return None
