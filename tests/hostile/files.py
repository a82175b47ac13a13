"""Readable image files of every format, depth and colour model: made by the tests, none stored.

What a readable one shows is known from the array that it was made of, never from a decoder.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, features

from tests.conftest import encode

Pixels = npt.NDArray[np.uint8]
"""[height, width, 3]"""

WIDTH, HEIGHT = 64, 48
AVIF = ("AVIF",) if features.check("avif") else ()
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", *AVIF)
BEST: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 98, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 98, "subsampling": "4:4:4"},
}
TOLERANCE = {"JPEG": 10, "GIF": 24, "AVIF": 12, "JPEG2000": 4}
"""How far off a lossy format is at most, in 255ths."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file and what must come of it."""

    name: str
    data: bytes
    shows: Pixels | None = None
    """The picture that it must show; None: nobody can say."""
    tolerance: int = 0
    """How far a lossy format may be off, in 255ths, at the pixel that is off most."""
    errors: Sequence[str] = ()
    """The errors that it may be instead; empty: it must be read."""


def scene(seed: int = 0) -> Pixels:
    """Four corners of four colours with soft edges: any turn, swap or shift of it shows."""
    rng = np.random.default_rng(seed)
    corners = rng.permutation(
        np.array([[230, 30, 40], [20, 60, 220], [240, 220, 40], [20, 140, 60]])
    )
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    right = np.clip((x - WIDTH / 2) / 16 + 0.5, 0, 1)[..., None]
    low = np.clip((y - HEIGHT / 2) / 16 + 0.5, 0, 1)[..., None]
    top = corners[0] * (1 - right) + corners[1] * right
    bottom = corners[2] * (1 - right) + corners[3] * right
    return np.round(top * (1 - low) + bottom * low).astype(np.uint8)


def plain(kind: str, pixels: Pixels, **options: Any) -> bytes:
    """A file of a format, as close to the pixels as the format goes."""
    image = Image.fromarray(pixels)
    if kind == "GIF":
        image = image.quantize(256)
    return encode(image, kind, **(BEST.get(kind, {}) | options))


def readable() -> Iterator[Case]:
    pixels = scene()
    for kind in (*KINDS, "PPM", "JPEG2000"):
        yield Case(
            name=f"plain {kind}",
            data=plain(kind, pixels),
            shows=pixels,
            tolerance=TOLERANCE.get(kind, 0),
        )
    yield from _colour_models(pixels)
    yield from _depths(pixels)
    yield from _transparent(pixels)
    yield from _palettes()
    frames = [Image.fromarray(scene(seed)) for seed in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", *AVIF):
        options: dict[str, Any] = BEST.get(kind, {})
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        # Pillow makes a palette of an animation's frames that is coarser than one made for each.
        tolerance = 70 if kind == "GIF" else TOLERANCE.get(kind, 0)
        yield Case(name=f"animated {kind}", data=data, shows=pixels, tolerance=tolerance)


def _colour_models(pixels: Pixels) -> Iterator[Case]:
    # Inks as a printer would mix them: black as dark as the lightest of the three colours.
    floats = pixels / 255
    black = 1 - floats.max(axis=2, keepdims=True)
    colors = 1 - floats / np.maximum(1 - black, 1e-9)
    inks = np.round(255 * np.concatenate([colors, black], axis=2)).astype(np.uint8)
    cmyk = Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes())
    for kind, tolerance in (("JPEG", 14), ("TIFF", 3)):
        options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
        data = encode(cmyk, kind, **options)
        yield Case(name=f"CMYK {kind}", data=data, shows=pixels, tolerance=tolerance)
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    for kind in KINDS:
        image = Image.fromarray(pixels[..., 0])
        options = {"quality": 98} if kind == "JPEG" else BEST.get(kind, {})
        yield Case(
            name=f"grey {kind}",
            data=encode(image.convert("RGB") if kind == "AVIF" else image, kind, **options),
            shows=grey,
            tolerance=TOLERANCE.get(kind, 0) if kind != "GIF" else 0,
        )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", *AVIF):
        for name, icc in (("sRGB", profile), ("broken", profile[:100] + b"\xff" * 400)):
            yield Case(
                name=f"{name} ICC {kind}",
                data=plain(kind, pixels, icc_profile=icc),
                shows=pixels,
                tolerance=TOLERANCE.get(kind, 0),
            )
    for name, options in {
        "progressive": {"progressive": True},
        "subsampled": {"subsampling": 2},
        "restarting": {"restart_marker_blocks": 2},
    }.items():
        data = plain("JPEG", pixels, **options)
        yield Case(name=f"{name} JPEG", data=data, shows=pixels, tolerance=30)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        data = plain("TIFF", pixels, compression=compression)
        yield Case(name=f"{compression} TIFF", data=data, shows=pixels)


def _depths(pixels: Pixels) -> Iterator[Case]:
    """16 bits: the upper byte is what 8 bits would have held."""
    wide = pixels[..., 0].astype(np.uint16) * 257
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    yield Case(name="16-bit grey PNG", data=png(wide[..., None], depth=16), shows=grey, tolerance=1)
    yield Case(
        name="16-bit RGB PNG",
        data=png(pixels.astype(np.uint16) * 257, depth=16),
        shows=pixels,
        tolerance=1,
    )
    for order in "<>":
        data = tiff(wide, order=order)
        yield Case(name=f"16-bit {order} TIFF", data=data, shows=grey, tolerance=1)
    yield Case(
        name="12-bit TIFF",
        data=tiff_12_bit(wide >> 4),
        shows=grey,
        tolerance=1,
    )
    shades = pixels[..., 0].astype(np.float32)
    yield Case(
        name="float 0-1 TIFF",
        data=encode(Image.fromarray(shades / 255), "TIFF"),
        shows=grey,
        tolerance=1,
    )
    yield Case(
        name="float 0-255 TIFF",
        data=encode(Image.fromarray(shades), "TIFF"),
        shows=grey,
        tolerance=1,
    )
    odd = shades.copy()
    odd[0, :4] = [np.nan, np.inf, -np.inf, -1e30]
    cleaned = grey.copy()
    cleaned[0, :4] = np.array([0, 255, 0, 0])[:, None]
    yield Case(
        name="float with infinities TIFF",
        data=encode(Image.fromarray(odd), "TIFF"),
        shows=cleaned,
        tolerance=1,
    )
    for depth in (1, 2, 4):
        top = (1 << depth) - 1
        levels = np.round(pixels[..., :1] / 255 * top).astype(np.uint8)
        shown = np.repeat(np.round(levels / top * 255).astype(np.uint8), 3, axis=2)
        data = png(levels, depth=depth)
        yield Case(name=f"{depth}-bit grey PNG", data=data, shows=shown, tolerance=1)
    pgm = b"P5 %d %d 65535\n" % (WIDTH, HEIGHT)
    dark = wide // 257  # a night scene: every value in the lowest 256th of the range
    yield Case(
        name="dark 16-bit PGM",
        data=pgm + dark.astype(">u2").tobytes(),
        shows=np.repeat((dark[..., None] / 257).round().astype(np.uint8), 3, axis=2),
        tolerance=1,
    )


def _transparent(pixels: Pixels) -> Iterator[Case]:
    """Over white, by the formula."""
    alpha = np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, WIDTH))
    share = alpha[..., None] / 255
    over_white = np.round(pixels * share + 255 * (1 - share)).astype(np.uint8)
    rgba = np.dstack([pixels, alpha])
    image = Image.fromarray(rgba)
    for kind in ("PNG", "WEBP", "TIFF", *AVIF):
        options = BEST.get(kind, {}) | ({"exact": True} if kind == "WEBP" else {})
        data = encode(image, kind, **options)
        tolerance = TOLERANCE.get(kind, 0) + 1
        yield Case(name=f"alpha {kind}", data=data, shows=over_white, tolerance=tolerance)
    data = png(rgba.astype(np.uint16) * 257, depth=16)
    yield Case(name="16-bit alpha PNG", data=data, shows=over_white, tolerance=2)
    grey = np.dstack([pixels[..., 0], alpha])
    shown = np.repeat(over_white[..., :1], 3, axis=2)
    yield Case(name="grey alpha PNG", data=png(grey, depth=8), shows=shown, tolerance=1)


def _palettes() -> Iterator[Case]:
    colors = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200], [250, 250, 10]], np.uint8)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    places = (2 * (y >= HEIGHT // 2) + (x >= WIDTH // 2)).astype(np.uint8)
    image = Image.fromarray(places)
    image.putpalette(colors.tobytes())
    clear = colors[places].copy()
    clear[places == 2] = 255
    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        yield Case(name=f"palette {kind}", data=encode(image, kind), shows=colors[places])
    for bits in (2, 4):
        data = encode(image, "PNG", bits=bits)
        yield Case(name=f"{bits}-bit palette PNG", data=data, shows=colors[places])
    for kind in ("PNG", "GIF"):
        data = encode(image, kind, transparency=2)
        yield Case(name=f"clear palette {kind}", data=data, shows=clear)


def oriented() -> Iterator[Case]:
    """EXIF says how the picture was held; numpy says how it then stands upright."""
    pixels = scene(1)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", *AVIF):
        for orientation, shown in upright.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            yield Case(
                name=f"orientation {orientation} {kind}",
                data=plain(kind, pixels, exif=exif),
                shows=shown,
                tolerance=TOLERANCE.get(kind, 0),
            )
    for orientation in (0, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = plain("JPEG", pixels, exif=exif)
        yield Case(name=f"orientation {orientation}", data=data, shows=pixels, tolerance=10)


def large(num_pixels: int) -> Iterator[Case]:
    """Honest files of about `num_pixels`, each of the kind that takes most memory to decode."""
    side = math.isqrt(num_pixels)
    color = Image.new("RGB", (side, side), (200, 60, 20))
    clear = Image.new("RGBA", (side, side), (200, 60, 20, 99))
    files: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "CMYK JPEG": (color.convert("CMYK"), "JPEG", {"progressive": True}),
        "RGBA PNG": (clear, "PNG", {"compress_level": 1}),
        "grey alpha PNG": (clear.convert("LA"), "PNG", {"compress_level": 1}),
        "clear palette PNG": (color.quantize(4), "PNG", {"transparency": 0}),
        "16-bit PNG": (Image.new("I;16", (side, side), 40_000), "PNG", {"compress_level": 1}),
        "float TIFF": (Image.new("F", (side, side), 0.5), "TIFF", {}),
        "32-bit TIFF": (Image.new("I", (side, side), 1 << 20), "TIFF", {}),
        "deflated TIFF": (clear, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "WebP": (clear, "WEBP", {"method": 0, "quality": 0}),
        "GIF": (color.quantize(4), "GIF", {}),
        "BMP": (color, "BMP", {}),
        "JPEG2000": (clear, "JPEG2000", {"num_resolutions": 1}),
        **({"AVIF": (clear, "AVIF", {"speed": 10})} if AVIF else {}),
    }
    for name, (image, kind, options) in files.items():
        yield Case(name=f"large {name}", data=encode(image, kind, **options))


# How files are put together by hand, where Pillow does not write them.

PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: npt.NDArray[Any], *, depth: int) -> bytes:
    """A PNG of [height, width, channels] values of `depth` bits; 1 to 4 channels."""
    height, width, channels = values.shape
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    if depth < 8:
        bits = np.unpackbits(values[..., :1].astype(np.uint8), axis=2)[..., -depth:]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    else:
        kind = ">u2" if depth == 16 else "u1"
        rows = np.frombuffer(values.astype(kind).tobytes(), np.uint8).reshape(height, -1)
    body = np.hstack([np.zeros((height, 1), np.uint8), rows]).tobytes()
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def tiff(values: npt.NDArray[np.uint16], *, order: str = "<", bits: int = 16) -> bytes:
    """A grey TIFF of one uncompressed strip, in either byte order."""
    return _tiff(values.astype(f"{order}u2").tobytes(), values.shape, order=order, bits=bits)


def tiff_12_bit(values: npt.NDArray[np.uint16]) -> bytes:
    """Two values of 12 bits in three bytes."""
    even, odd = values[:, ::2], values[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=2)
    return _tiff(packed.astype(np.uint8).tobytes(), values.shape, order="<", bits=12)


def _tiff(body: bytes, shape: tuple[int, ...], *, order: str, bits: int) -> bytes:
    height, width = shape
    numbers = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    numbers[279] = len(body)
    # Four-byte values: their place in the field does not depend on the byte order.
    tags = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, n) for tag, n in numbers.items())
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}I", 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(numbers)) + tags + bytes(4)
