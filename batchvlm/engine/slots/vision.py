"""Image features: an image is encoded once for all rows of the window that contain it.

A *unit* is the smallest input that can be encoded separately: one image if the family's processor
keeps images apart, else all images of a row. The encoder runs over batches of units of one shape,
and its output is kept until the last row that needs it is prefilled, and then in an LRU cache.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchvlm.engine.collate import join_features
from batchvlm.engine.forward import image_attention
from batchvlm.engine.forward.fusing import falling_back
from batchvlm.engine.forward.grids import find_encoder, grid_inputs
from batchvlm.engine.forward.replacements import is_same
from batchvlm.engine.forward.rotations import Rotations
from batchvlm.engine.forward.streams import SharedContext
from batchvlm.preprocess.pixels import to_numbers
from batchvlm.records import Array, EngineStats, Failure, PixelTable, Sample

log = logging.getLogger(__name__)

_IDLE_BYTES = 128 << 20
"""Size of the cache of features that no row needs at the moment."""
_ASYNC_DEVICES = frozenset({"cuda"})
"""Devices that run asynchronously to the host."""
_GRIDS = "image_grid_thw"
_TILES, _NUM_TILES = "pixel_values_local", "num_local_patches"
"""The tiles of all images of a row, and how many are of each image (DeepSeek-OCR 2, which encodes
each image whole as well)."""
_OLD_NAMES = {"pixel_values_images": "pixel_values"}
"""Names in a processor's output -> names in `get_image_features` (Video-LLaVA)."""
# Families whose processors have the row or image as first dimension and its tiles as second.
_ROWS_OF_TILES = frozenset({"granite_docling", "idefics2", "idefics3", "perception_lm", "smolvlm"})
# Families whose encoder sees how far an image is padded to the largest one of its row.
_SEES_PADDING = frozenset({"emu3"})


@dataclass(frozen=True, slots=True)
class Entry:
    """The encoder's output for one image, or for one tile."""

    pooled_PD: Tensor
    """[P, D]: one vector for each of its P image tokens."""
    deep: tuple[Tensor, ...] = ()
    """The same for deeper layers of the decoder, [P, D] each (Qwen3-VL, Granite Vision 4)."""

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.pooled_PD, *self.deep))


@dataclass(frozen=True, slots=True)
class OutputForm:
    """The form in which one model's encoder returns its output."""

    type_: Any
    is_stacked: bool
    """Whether the features of all images are one tensor rather than one for each image."""
    marks: Tensor | None
    """Embeddings of the tokens around an image, the same for all (Ovis2)."""
    layers: tuple[int, ...] = ()
    """Indices of the decoder's layers that take features, from the first on, if the output names
    them (Granite Vision 4)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoder's output for the units of one forward."""

    entries: list[Entry]
    """The entries of all units, concatenated."""
    form: OutputForm


@dataclass(frozen=True, slots=True)
class Unit:
    """Images of one row that are encoded together."""

    key: str
    """Identifies the content: equal for units with equal images."""
    arrays: Mapping[str, Array]
    """The processor's arrays for the images, as `get_image_features` takes them."""

    @property
    def num_entries(self) -> int:
        """Number of entries that the encoder returns: one an image, or one a tile."""
        for name in (_GRIDS, "image_grids"):
            if name in self.arrays:
                return len(self.arrays[name])
        return len(self.arrays["pixel_values"])

    @property
    def num_cells(self) -> int:
        """Elements of the pixel arrays, a rough measure of what encoding costs."""
        return sum(int(self.arrays[n].size) for n in ("pixel_values", _TILES) if n in self.arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """The pixel array's shape less its first dimension; units of one shape need no padding."""
        return self.arrays["pixel_values"].shape[1:]


class ImageFeatures:
    """Encodes units and keeps the features that waiting rows need.

    Args:
        model: a transformers model with `get_image_features`.
        stats: counts what is encoded.
        is_shared: whether rows with the same image share its features; off only for measurements.
        around: returns a context in which the encoder runs.
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
        takes_grid_inputs = self._device.type in _ASYNC_DEVICES and _GRIDS in self._names
        self._grid_encoder = find_encoder(model.base_model) if takes_grid_inputs else None
        """The encoder, if its tensors derived from patch grids are computed on the host."""
        self._is_checked = False
        self._attention = name, configs = image_attention.encoder_configs(model)
        if name == image_attention.NAME_ON_CPU:
            image_attention.run_trials(configs, model.dtype)
        self.stats = stats
        self._is_shared = is_shared
        self._users: dict[str, int] = {}
        self._idle: OrderedDict[str, int] = OrderedDict()
        """Bytes of the features of each unit that no row needs now, least recently used first."""
        self._idle_bytes = 0
        """Their sum, kept because there may be thousands."""
        self._entries: dict[str, Sequence[Entry]] = {}
        self._failures: dict[str, Failure] = {}
        self._form: OutputForm | None = None
        self._pixel_table: PixelTable | None = None
        """Maps the bytes of pixels to values, for all rows of a job; None if they are values."""
        self._changed = SharedContext()

    def units(self, sample: Sample) -> tuple[Unit, ...]:
        """The units of a row, in the order of its images; empty for text alone."""
        named = {_OLD_NAMES.get(n, n): a for n, a in sample.features.items()}
        arrays = {n: a for n, a in named.items() if n in self._names}
        if "pixel_values" not in arrays:
            return ()
        self._pixel_table = sample.pixel_table
        if self._model_type in _ROWS_OF_TILES:
            arrays = {n: a.reshape(-1, 1, *a.shape[2:]) for n, a in arrays.items()}
        keys = sample.image_keys
        if not self._is_shared or not keys:
            return (Unit(f"{sample.row_index}", arrays),)
        is_split = len(keys) > 1 and self._model_type not in _SEES_PADDING
        parts = _by_image(arrays, len(keys)) if is_split else None
        if parts is None:
            return (Unit("+".join(keys), arrays),)
        return tuple(Unit(key, part) for key, part in zip(keys, parts, strict=True))

    def retain(self, units: Iterable[Unit]) -> None:
        """Count one more row that needs these units."""
        for unit in units:
            self._users[unit.key] = self._users.get(unit.key, 0) + 1
            self._idle_bytes -= self._idle.pop(unit.key, 0)

    def release(self, units: Iterable[Unit]) -> None:
        """Count one row less that needs these units; cache features that no row needs (LRU)."""
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
        """The units that were neither encoded nor failed, one for each key."""
        found = {u.key: u for u in units}
        return [u for k, u in found.items() if k not in self._entries and k not in self._failures]

    def fail(self, unit: Unit, failure: Failure) -> None:
        """Record that a unit cannot be encoded."""
        self._failures[unit.key] = failure

    def failure(self, units: Iterable[Unit]) -> Failure | None:
        """The failure of the first unit that could not be encoded; None if there is none."""
        return next((self._failures[u.key] for u in units if u.key in self._failures), None)

    @torch.inference_mode()
    def encode(self, units: Sequence[Unit]) -> Encoded:
        """Encode units of one shape in one forward, without keeping the output; thread-safe."""
        is_gpu = self._device.type == "cuda"
        joined = join_features([unit.arrays for unit in units], is_pinned=is_gpu)
        pixels = self._to_device(joined.pop("pixel_values"))
        if self._pixel_table is not None:
            pixels = to_numbers(self._pixel_table, pixels, self._dtype)
        with self._changed.within(self._encoder_context):
            output = self._output(pixels, joined)
        pooled = output.pooler_output
        layers = getattr(output, "deepstack_features", None) or ()
        indices: tuple[int, ...] = ()
        if pooled is None:
            indices, (pooled, *layers) = zip(*layers, strict=True)
        num_entries = sum(unit.num_entries for unit in units)
        if len(pooled) != num_entries:
            raise ValueError(f"{len(pooled)} image features for {num_entries} images")
        # Copies: a view would keep the features of the whole batch alive.
        entries = [
            Entry(vectors_PD.clone(), tuple(layer[i].clone() for layer in layers))
            for i, vectors_PD in enumerate(pooled)
        ]
        marks = getattr(output, "visual_indicator_features", None)
        form = OutputForm(type(output), isinstance(pooled, Tensor), marks, indices)
        return Encoded(entries, form)

    def _output(self, pixels: Tensor, rest: Mapping[str, Tensor]) -> Any:
        """Run the encoder on pixels, which are on the device, and its other inputs, on the host."""

        def encode() -> Any:
            inputs = {name: self._to_device(tensor) for name, tensor in rest.items()}
            return self._encode(pixel_values=pixels, **inputs, return_dict=True)

        def encode_with_grid_inputs(encoder: nn.Module) -> Any:
            inputs = grid_inputs(encoder, rest[_GRIDS])
            for name, value in inputs.items():
                if isinstance(value, Tensor):
                    # Their dtype stays: these are indices and interpolation weights.
                    inputs[name] = self._copied(value)
            inputs[_GRIDS] = rest[_GRIDS]
            return self._encode(pixel_values=pixels, **inputs, return_dict=True)

        encoder = self._grid_encoder
        if encoder is None or set(rest) != {_GRIDS}:
            return encode()
        if self._is_checked:
            return encode_with_grid_inputs(encoder)
        # The first images show whether the family derives anything else from the grids.
        self._is_checked = True
        expected = encode()
        if not is_same(
            lambda _: _flattened(expected),
            lambda _: _flattened(encode_with_grid_inputs(encoder)),
            pixels,
        ):
            self._grid_encoder = None
            log.debug("the encoder reads patch grids back from the device")
        return expected

    def keep(self, units: Sequence[Unit], encoded: Encoded) -> None:
        """Store the encoder's output for units."""
        self._form = encoded.form
        entries = encoded.entries
        for unit in units:
            count = unit.num_entries
            self._entries[unit.key], entries = entries[:count], entries[count:]
        self.stats.images_encoded += len(units)

    @contextmanager
    def _encoder_context(self) -> Iterator[None]:
        attention = image_attention.attending(*self._attention)
        with attention, self._around(), self._rotations.replaced(), falling_back():
            yield

    def entries(self, units: Iterable[Unit]) -> list[Entry]:
        """The stored entries of these units, in order."""
        return [entry for unit in units for entry in self._entries[unit.key]]

    def joined(self, entries: Sequence[Entry]) -> Any:
        """Build the encoder output that the model takes from entries; None if there are none."""
        if not entries:
            return None
        form = self._form
        assert form is not None

        def join(tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
            return torch.stack(list(tensors)) if form.is_stacked else tuple(tensors)

        # Some forms have fields without a default, of which the model reads none here.
        others = {f.name: None for f in fields(form.type_) if f.default is MISSING}
        first = join([entry.pooled_PD for entry in entries])
        by_layer = zip(*(entry.deep for entry in entries), strict=True)
        deeper = [join(layer) for layer in by_layer]
        if form.layers:
            features = list(zip(form.layers, [first, *deeper], strict=True))
            return form.type_(**{**others, "deepstack_features": features})
        output = form.type_(**{**others, "pooler_output": first})
        if deeper:
            output.deepstack_features = deeper
        if form.marks is not None:
            output.visual_indicator_features = form.marks
        return output

    def _to_device(self, tensor: Tensor) -> Tensor:
        return self._copied(tensor).to(self._dtype if tensor.is_floating_point() else tensor.dtype)

    def _copied(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self._device, non_blocking=True)


def _flattened(output: Any) -> Tensor:
    """Everything in an encoder's output that is used later, as one flat tensor."""
    deep = getattr(output, "deepstack_features", None) or ()
    parts = [*output.pooler_output, *(vectors for layer in deep for vectors in layer)]
    return torch.cat([part.reshape(-1) for part in parts])


def batches(units: Sequence[Unit], max_cells: int) -> list[list[Unit]]:
    """Batches of units of one shape, at most `max_cells` each, largest first; larger ones alone."""
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
    """Split a row's arrays by image; None if they cannot be split."""
    grid = arrays.get(_GRIDS)
    if grid is not None and len(grid) == num_images:
        ends = np.cumsum(grid.prod(-1))
        rest = {n: a for n, a in arrays.items() if n != "pixel_values"}
        if ends[-1] != len(arrays["pixel_values"]) or {*map(len, rest.values())} != {num_images}:
            return None
        pixels = np.split(arrays["pixel_values"], ends[:-1])
        return [
            {"pixel_values": own, **{n: a[i : i + 1] for n, a in rest.items()}}
            for i, own in enumerate(pixels)
        ]
    if _TILES in arrays:
        nums = arrays[_NUM_TILES]
        tiles = np.split(arrays[_TILES], np.cumsum(nums)[:-1])
        rest = {n: a for n, a in arrays.items() if n != _TILES}
        parts = _by_image(rest, num_images)
        if parts is None:
            return None
        # An image without tiles has no array of them.
        return [
            {**part, _TILES: own} if len(own) else part
            for part, own in zip(parts, tiles, strict=True)
        ]
    # Encoders that take the number of images encode one image differently from one of several.
    is_counted = "batch_num_images" in arrays
    if not is_counted and all(len(array) == num_images for array in arrays.values()):
        return [{n: a[i : i + 1] for n, a in arrays.items()} for i in range(num_images)]
    return None
