"""Pixel values as bytes on their way to a GPU, and back into what the processor would have made.

A processor's last step turns every byte of an image into a number by a table, one for each colour.
Done on the GPU rather than in the worker, it makes samples a quarter of the size. The table is read
off the processor's own output, so that the numbers are the same to the last bit; a processor whose
output no such table explains, because it pads on the way, keeps its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from batchvlm.records import Array, PixelTable

# Shape legend: C colours.

_NUM_COLOURS = 3
# Wide, tall, small and large: what pads or tiles by shape shows at one of them.
_SHAPES = ((256, 192), (96, 320), (40, 40), (700, 500))
_NUM_BANDS = 16
_STEPS = ("do_rescale", "do_normalize")


def to_numbers(table: PixelTable, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """What bytes stand for, computed where they are: uint8 of any shape -> the same shape."""
    values_C256 = torch.from_numpy(table.values_C256).to(dtype)
    if pixels.is_cuda:
        # From memory that is not pinned the copy would wait for the device.
        values_C256 = values_C256.pin_memory().to(pixels.device, non_blocking=True)
    if table.is_patched:
        parts = pixels.view(*pixels.shape[:-1], _NUM_COLOURS, -1).movedim(-2, 0)
    else:
        parts = pixels.movedim(-3, 0)
    # Colour by colour: indices take four bytes a pixel.
    colours = [values_C256[c][part.int()] for c, part in enumerate(parts)]
    return torch.stack(colours, dim=-2 if table.is_patched else -3).view(pixels.shape)


def find_table(image_processor: Any) -> PixelTable | None:
    """Read the table off an image processor; None where its output is not explained by one.

    Args:
        image_processor: a transformers image processor; it is left as it was.
    """
    if not all(getattr(image_processor, step, False) is True for step in _STEPS):
        return None
    pairs = []
    for images in _probes():
        try:
            numbers = np.asarray(image_processor(images, return_tensors="np")["pixel_values"])
            skipped = dict.fromkeys(_STEPS, False)
            made = image_processor(images, return_tensors="np", **skipped)["pixel_values"]
        except Exception:
            return None  # one that wants more than images
        pixels = bytes_of(np.asarray(made))
        if pixels is None or numbers.dtype != np.float32 or pixels.shape != numbers.shape:
            return None
        pairs.append((pixels, numbers))
    for is_patched in (False, True):
        values_C256 = _table(pairs, is_patched)
        if values_C256 is not None:
            return PixelTable(values_C256=values_C256, is_patched=is_patched)
    return None


def _probes() -> Iterator[list[Image.Image]]:
    """Pictures that show how shapes are treated, and together every byte."""
    random = np.random.default_rng(0)
    noise = [
        Image.fromarray(random.integers(0, 256, (height, width, _NUM_COLOURS), dtype=np.uint8))
        for width, height in _SHAPES
    ]
    yield from ([image] for image in noise)
    yield noise[:2]  # what is filled up to the larger of two shows here
    # Bands of one byte each, wide enough to outlast resizing.
    for start in range(0, 256, _NUM_BANDS):
        band = np.repeat(np.arange(start, start + _NUM_BANDS, dtype=np.uint8), 256 // _NUM_BANDS)
        columns = np.broadcast_to(band[None, :, None], (256, 256, _NUM_COLOURS))
        yield [Image.fromarray(np.ascontiguousarray(columns))]


def leave_as_bytes(image_processor: Any) -> None:
    """Leave the last step out of what an image processor does, from now on."""
    for step in _STEPS:
        setattr(image_processor, step, False)


def bytes_of(pixels: Array) -> Array | None:
    """Whole numbers from 0 to 255 as bytes; None where they are something else."""
    made = pixels.astype(np.uint8)
    return made if np.array_equal(made, pixels) else None


def _table(pairs: Sequence[tuple[Array, Array]], is_patched: bool) -> Array | None:
    """[3, 256], if each byte of each colour is the same number wherever it stands."""
    values_C256 = np.full((_NUM_COLOURS, 256), np.nan, dtype=np.float32)
    apart: list[tuple[int, Array, Array]] = []
    for colour, pair in product(range(_NUM_COLOURS), pairs):
        pixels, numbers = (_of_colour(array, colour, is_patched) for array in pair)
        if pixels is None or numbers is None:
            return None
        values_C256[colour][pixels] = numbers
        apart.append((colour, pixels, numbers))
    is_known = not np.isnan(values_C256).any()
    is_same = all(np.array_equal(values_C256[c][pixels], numbers) for c, pixels, numbers in apart)
    return values_C256 if is_known and is_same else None


def _of_colour(array: Array, colour: int, is_patched: bool) -> Array | None:
    if is_patched:
        if array.shape[-1] % _NUM_COLOURS:
            return None
        return array.reshape(*array.shape[:-1], _NUM_COLOURS, -1)[..., colour, :]
    if array.ndim < 3 or array.shape[-3] != _NUM_COLOURS:
        return None
    return array[..., colour, :, :]
