"""Pixel values sent to the GPU as uint8, and rescaled and normalized there.

The last step of an image processor (rescale and normalize) maps each byte to a float by a lookup
table per colour channel. Running it on the GPU instead of in the worker makes samples a quarter of
the size. The table is measured from the processor's own output, so the values are bit-identical. A
processor whose output is not a table lookup, for example because it pads, keeps its floats.
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

# Shape legend: C colour channels.

_NUM_COLOURS = 3
# Wide, tall, small and large: a processor that pads or tiles by shape does so for one of them.
# DeepSeek-OCR 2 tiles what is larger than 768.
_SHAPES = ((256, 192), (96, 320), (40, 40), (800, 600))
_NUM_BANDS = 16
_STEPS = ("do_rescale", "do_normalize")


def to_numbers(table: PixelTable, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up pixel values on the device of `pixels`: uint8 of any shape -> `dtype`, same shape."""
    values_C256 = torch.from_numpy(table.values_C256).to(dtype)
    if pixels.is_cuda:
        # A copy from pageable memory would synchronize with the device.
        values_C256 = values_C256.pin_memory().to(pixels.device, non_blocking=True)
    if table.is_patched:
        parts = pixels.view(*pixels.shape[:-1], _NUM_COLOURS, -1).movedim(-2, 0)
    else:
        parts = pixels.movedim(-3, 0)
    # One channel at a time: the int32 indices take four bytes per pixel.
    colours = [values_C256[c][part.int()] for c, part in enumerate(parts)]
    return torch.stack(colours, dim=-2 if table.is_patched else -3).view(pixels.shape)


def find_table(image_processor: Any) -> PixelTable | None:
    """Measure the lookup table of an image processor; None if its output is not a table lookup.

    Args:
        image_processor: a transformers image processor; not modified.
    """
    if not all(getattr(image_processor, step, False) is True for step in _STEPS):
        return None
    pairs = []
    for images in _probes():
        try:
            processed = image_processor(images, return_tensors="np")
            if any(name != "pixel_values" and "pixel_values" in name for name in processed):
                return None  # only one array travels as bytes
            numbers = np.asarray(processed["pixel_values"])
            skipped = dict.fromkeys(_STEPS, False)
            made = image_processor(images, return_tensors="np", **skipped)["pixel_values"]
        except Exception:
            return None  # such as a processor that needs more than images
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
    """Yield lists of test images: several shapes, then images that cover every byte value."""
    random = np.random.default_rng(0)
    noise = [
        Image.fromarray(random.integers(0, 256, (height, width, _NUM_COLOURS), dtype=np.uint8))
        for width, height in _SHAPES
    ]
    yield from ([image] for image in noise)
    yield noise[:2]  # detects padding to the larger of two images
    # Bands of one byte value each, wide enough to survive resizing.
    for start in range(0, 256, _NUM_BANDS):
        band = np.repeat(np.arange(start, start + _NUM_BANDS, dtype=np.uint8), 256 // _NUM_BANDS)
        columns = np.broadcast_to(band[None, :, None], (256, 256, _NUM_COLOURS))
        yield [Image.fromarray(np.ascontiguousarray(columns))]


def leave_as_bytes(image_processor: Any) -> None:
    """Disable rescaling and normalization of an image processor, in place."""
    for step in _STEPS:
        setattr(image_processor, step, False)


def bytes_of(pixels: Array) -> Array | None:
    """Convert whole numbers from 0 to 255 to uint8; None if any value is not one."""
    made = pixels.astype(np.uint8)
    return made if np.array_equal(made, pixels) else None


def _table(pairs: Sequence[tuple[Array, Array]], is_patched: bool) -> Array | None:
    """Return the table [3, 256]; None if a byte of a channel is missing or has several values."""
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
