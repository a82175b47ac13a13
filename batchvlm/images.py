"""ImageRef -> upright RGB picture, under every cap. Hostile images end here."""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from batchvlm.errors import ErrorType, RowError
from batchvlm.records import ImageRef

# Ours is checked against the header before a pixel is decoded, and names the limit.
Image.MAX_IMAGE_PIXELS = None

# Pillow opens more, EPS by running Ghostscript on it.
Image.init()
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
_WHITE = (255, 255, 255)


def load_image(
    ref: ImageRef, *, image_root: str | None, max_source_pixels: int, max_pixels: int
) -> Image.Image:
    """Decode one image wholly: upright, RGB, at most `max_pixels`.

    Args:
        ref: bytes, or a path below `image_root`.
        image_root: the only folder that paths may point into; None allows no path.
        max_source_pixels: a header that claims more is refused undecoded.
        max_pixels: a larger image is shrunk to this, keeping its shape.

    Raises:
        RowError: `missing_image`, `forbidden`, `too_large` or `decode`.
    """
    data = ref.data if ref.data is not None else _read_file(ref.path, image_root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; the pixels decide
            return _decode(data, max_source_pixels=max_source_pixels, max_pixels=max_pixels)
    except RowError:
        raise
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, MemoryError, ...
    except Exception as error:
        raise RowError(
            ErrorType.DECODE, f"{len(data)} bytes are no readable image: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _read_file(path: str | None, image_root: str | None) -> bytes:
    assert path is not None
    if image_root is None:
        raise RowError(ErrorType.FORBIDDEN, "the row names a path and data.image_root is not set")
    try:
        root = os.path.realpath(image_root)
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath((root, real)) != root:
            raise RowError(
                ErrorType.FORBIDDEN, f"the path leads out of data.image_root={image_root}"
            )
        # Not blocking: a named pipe would hang, a device would never end.
        with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RowError(ErrorType.MISSING_IMAGE, "the path is no regular file")
            return file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid path"
        raise RowError(
            ErrorType.MISSING_IMAGE, f"the image file cannot be read: {reason}"
        ) from error


def _decode(data: bytes, *, max_source_pixels: int, max_pixels: int) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width < 1 or height < 1:
        raise RowError(ErrorType.DECODE, f"the image is {width} x {height} pixels")
    if width * height > max_source_pixels:
        raise RowError(
            ErrorType.TOO_LARGE,
            f"the header claims {width} x {height} pixels, more than "
            f"data.max_source_pixels={max_source_pixels}",
        )
    if image.format == "JPEG" and width * height > max_pixels:
        # A JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the work; Pillow picks the smallest
        # scale that still covers the size asked for.
        image.draft(None, capped_size(image.size, max_pixels))
    image.load()  # open() alone accepts half a file
    with contextlib.suppress(Exception):  # broken metadata: the pixels are still good
        image = ImageOps.exif_transpose(image)
    image = to_rgb(image)
    size = capped_size(image.size, max_pixels)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image


def capped_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """(width, height) scaled down to at most `max_pixels`, each side at least one pixel."""
    width, height = size
    if width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    # A thin strip keeps its one pixel; the long side then gives way.
    return (min(w, max_pixels), h) if h == 1 else (w, min(h, max_pixels // w))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency over white, 16-bit and float grey scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*_WHITE, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    # convert() clips these to 255, which turns a 16-bit scan white.
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    high = float(values.max(initial=0))
    if image.mode == "F" and high <= 1:
        scale = 255.0
    else:
        scale = 255 / 65535 if image.mode.startswith("I;16") or high > 255 else 1.0
    grey = np.clip(values * scale + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
