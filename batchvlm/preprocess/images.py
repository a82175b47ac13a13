"""ImageRef -> upright RGB image within all size limits. Images are untrusted input."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import math
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from batchvlm.config import ImageFormat
from batchvlm.errors import ErrorType, RowError
from batchvlm.records import Failure, ImageRef
from batchvlm.words import described

# `_check_size` checks the header instead, before decoding, and names the setting.
Image.MAX_IMAGE_PIXELS = None

# Pillow logs every fault of a TIFF; the row's error is enough.
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# Pillow opens other formats too; for EPS it runs Ghostscript.
Image.init()
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
_FAULTS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN),
    *(errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ENOTCONN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS),
}
_WHITE = (255, 255, 255)
_ZLIB_RLE = 3
_BITS_PER_SAMPLE = 258
_MAX_PATH_CHARS = 200
"""Longest path in an error message."""
_STRIP_PIXELS = 1 << 20
"""Pixels converted at a time, to bound memory."""
# EXIF orientation -> the operation that makes the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def at_hand(ref: ImageRef, fetched: Mapping[str, bytes | Failure]) -> ImageRef:
    """Replace a reference to a URL by the bytes fetched from it; return others unchanged.

    Raises:
        RowError: fetching failed or is not allowed (`forbidden`, `fetch`, `missing_image`, ...).
    """
    if ref.url is None:
        return ref
    found = fetched.get(ref.url)
    if found is None:
        raise RowError(
            ErrorType.FORBIDDEN,
            f"the row names a {ref.url.partition(':')[0].lower()[:20]}: address; images come from "
            "bytes, data: URIs, or paths below data.image_root, and from addresses with "
            "data.allow_remote=true",
        )
    if isinstance(found, Failure):
        raise RowError(found.error_type, found.message)
    if not found:
        raise RowError(ErrorType.MISSING_IMAGE, "the image's address gave no bytes")
    return ImageRef(data=found)


def load_image(
    ref: ImageRef,
    *,
    image_root: str | None,
    max_image_bytes: int,
    max_source_pixels: int,
    max_pixels: int,
) -> Image.Image:
    """Decode an image completely: upright, RGB, at most `max_pixels`, without metadata.

    Apart from the decoder's own buffers, memory is bounded by the decoded image, at 4 bytes per
    pixel, plus the result: a large image is converted and shrunk strip by strip.

    Args:
        ref: bytes, or a path below `image_root`; a URL is never fetched.
        image_root: the only folder that paths may point into; None allows no path.
        max_image_bytes: a larger file is refused; at most one byte more is read.
        max_source_pixels: an image with more pixels by its header is refused before decoding.
        max_pixels: a larger image is shrunk to this, keeping its aspect ratio.

    Raises:
        RowError: `missing_image`, `fetch`, `forbidden`, `too_large` or `decode`.
    """
    data = at_hand(ref, {}).data
    if data is None:
        data = _read_file(ref.path, image_root, max_image_bytes)
    _check_bytes(len(data), max_image_bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which does not matter
            return _decode(data, max_source_pixels=max_source_pixels, max_pixels=max_pixels)
    except RowError:
        raise
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, MemoryError, ...
    except Exception as error:
        raise RowError(
            ErrorType.DECODE, f"{len(data)} bytes are no readable image: {_reason(error)}"
        ) from error


_TIFF_SIZE = (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH)


def image_size(
    ref: ImageRef, *, image_root: str | None, max_image_bytes: int, max_source_pixels: int
) -> tuple[int, int]:
    """Return the upright (width, height) of an image, read from its header only.

    Args:
        ref, image_root, max_image_bytes, max_source_pixels: as in `load_image`.

    Raises:
        RowError: the errors of `load_image` that a header reveals.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if ref.data is not None:
            file: Any = io.BytesIO(ref.data)
            num_bytes = len(ref.data)
        else:
            file = stack.enter_context(_open_file(ref.path, image_root))
            num_bytes = os.fstat(file.fileno()).st_size
        _check_bytes(num_bytes, max_image_bytes)
        try:
            image = Image.open(file, formats=_FORMATS)
            _check_size(image.size, max_source_pixels)
            turn = None
            with contextlib.suppress(Exception):
                turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        except RowError:
            raise
        except Exception as error:
            raise RowError(
                ErrorType.DECODE, f"{num_bytes} bytes are no readable image: {_reason(error)}"
            ) from error
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Newer releases of Pillow report a TIFF's upright size; its tags hold the stored one.
        width, height = (int(image.tag_v2[tag]) for tag in _TIFF_SIZE)
    return (height, width) if turn in (5, 6, 7, 8) else (width, height)


def _check_bytes(num_bytes: int, max_image_bytes: int) -> None:
    if num_bytes > max_image_bytes:
        raise RowError(
            ErrorType.TOO_LARGE,
            f"the image has more bytes than data.max_image_bytes={max_image_bytes}",
        )


def _check_size(size: tuple[int, int], max_source_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise RowError(ErrorType.DECODE, f"the image is {width} x {height} pixels")
    if width * height > max_source_pixels:
        raise RowError(
            ErrorType.TOO_LARGE,
            f"the header claims {width} x {height} pixels, more than "
            f"data.max_source_pixels={max_source_pixels}",
        )


def image_file(image: Image.Image, kind: ImageFormat) -> bytes:
    """Encode an image as a file for a server, without the original's metadata."""
    file = io.BytesIO()
    match kind:
        case ImageFormat.png:
            # 0.28 s for a photo of 2.4 megapixels; the default takes 0.60 s for the same file size.
            image.save(file, "PNG", compress_level=1, compress_type=_ZLIB_RLE)
        case ImageFormat.jpeg:
            image.save(file, "JPEG", quality=95)
    return file.getvalue()


def _reason(error: Exception) -> str:
    return "unknown format" if isinstance(error, UnidentifiedImageError) else described(error)


def _read_file(path: str | None, image_root: str | None, max_bytes: int) -> bytes:
    """Read at most `max_bytes + 1` bytes, which shows if the file is too long."""
    with _open_file(path, image_root) as file:
        return file.read(max_bytes + 1)


@contextlib.contextmanager
def _open_file(path: str | None, image_root: str | None) -> Iterator[BinaryIO]:
    """Open a file below the root. Errors of reading it become row errors as well."""
    assert path is not None
    # repr escapes line ends and other control characters.
    named = repr(path if len(path) <= _MAX_PATH_CHARS else f"...{path[-_MAX_PATH_CHARS:]}")
    if image_root is None:
        raise RowError(ErrorType.FORBIDDEN, "the row names a path and data.image_root is not set")
    try:
        root = os.path.realpath(image_root)
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath((root, real)) != root:
            raise RowError(
                ErrorType.FORBIDDEN, f"{named} leads out of data.image_root={image_root}"
            )
        # Non-blocking, because opening a named pipe would hang until it has a writer.
        with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RowError(ErrorType.MISSING_IMAGE, f"{named} is no regular file")
            yield file
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid path"
        # A disk or network fault may be transient, so the row can be retried.
        is_fault = isinstance(error, OSError) and error.errno in _FAULTS
        raise RowError(
            ErrorType.FETCH if is_fault else ErrorType.MISSING_IMAGE,
            f"the image file {named} cannot be read: {reason}",
        ) from error


def _decode(data: bytes, *, max_source_pixels: int, max_pixels: int) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    _check_size(image.size, max_source_pixels)
    if image.format == "PNG":
        # Pillow decodes pixels with a wrong checksum unless verified; browsers do not.
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    if image.format == "JPEG" and width * height > max_pixels:
        # A JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the work. Pillow picks the smallest
        # scale that covers the requested size.
        image.draft(None, capped_size(image.size, max_pixels))
    image.load()  # open() accepts a truncated file
    turn = None
    with contextlib.suppress(Exception):  # with broken metadata the pixels are still usable
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    image = _shrunk_to_rgb(image, max_pixels)
    if turn is not None:
        image = image.transpose(turn)
    if not image.info:
        return image
    # Copied without metadata: a processor could apply the EXIF orientation again.
    picture = Image.new("RGB", image.size)
    picture.paste(image)
    return picture


def _shrunk_to_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    """Convert to RGB of at most `max_pixels`, without a second full-size copy."""
    size = capped_size(image.size, max_pixels)
    image = _to_8_bits(image)
    if size == image.size:
        return to_rgb(image)
    # As resize(reducing_gap=3) does: reduce by an integer factor first, then resize exactly.
    by_x, by_y = (
        max(1, int(whole / part / 3.0)) for whole, part in zip(image.size, size, strict=True)
    )
    box = (0.0, 0.0, image.width / by_x, image.height / by_y)
    reduced = Image.new("RGB", (math.ceil(box[2]), math.ceil(box[3])))
    for strip in _strips(image, by_y):
        piece = to_rgb(image.crop(strip)).reduce((by_x, by_y))
        reduced.paste(piece, (0, strip[1] // by_y))
    return reduced.resize(size, Image.Resampling.BICUBIC, box)


def _strips(image: Image.Image, step: int = 1) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes from top to bottom; the height of all but the last is a multiple of `step`."""
    num_rows = step * max(1, _STRIP_PIXELS // (image.width * step))
    for top in range(0, image.height, num_rows):
        yield (0, top, image.width, min(top + num_rows, image.height))


def capped_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Scale (width, height) down to at most `max_pixels`, with each side at least one pixel."""
    width, height = size
    if width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    # If the short side was rounded up to one pixel, the long side is cut to the limit.
    return (min(w, max_pixels), h) if h == 1 else (w, min(h, max_pixels // w))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency over white, grey of more than 8 bits scaled to 8."""
    image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*_WHITE, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 or more bits to L, where convert() would clip at 255; return other modes
    unchanged."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    white = _white_level(image)
    grey = Image.new("L", image.size)
    for strip in _strips(image):
        values = np.asarray(image.crop(strip), dtype=np.float32)
        values = np.nan_to_num(values, nan=0.0, posinf=white, neginf=0.0)
        scaled = np.clip(values * (255 / white) + 0.5, 0, 255).astype(np.uint8)
        grey.paste(Image.fromarray(scaled), strip[:2])
    return grey


def _white_level(image: Image.Image) -> float:
    """Return the format's value of white, or the least of 1, 255, 65535 and the maximum that no
    pixel exceeds."""
    if image.mode.startswith("I;16"):
        tags: Any = getattr(image, "tag_v2", {})  # a TIFF of 9 to 16 bits
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        return float((1 << bits) - 1) if 8 < bits <= 16 else 65535.0
    if image.format == "PPM":
        return 65535.0  # Pillow scales to this
    high = 0.0
    for strip in _strips(image):
        values = np.asarray(image.crop(strip))
        high = max(high, float(values.max(initial=0, where=np.isfinite(values))))
    for white in (1.0, 255.0, 65535.0):
        if high <= white and not (white == 1.0 and image.mode == "I"):
            return white
    return high
