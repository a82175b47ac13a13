"""What an enemy makes of an image file: all seeded, none stored."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.conftest import encode
from tests.hostile.files import (
    HEIGHT,
    KINDS,
    PNG,
    WIDTH,
    Case,
    chunk,
    oriented,
    plain,
    readable,
    scene,
)

BIG = 65_535


def every_case() -> list[Case]:
    """All of them, in an order that is always the same."""
    cases = [
        *readable(),
        *oriented(),
        *truncated(),
        *flipped(),
        *wrong_headers(),
        *wrong_sizes(),
        *bombs(),
    ]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def truncated() -> Iterator[Case]:
    """Cut at every 5%: an error, or the whole picture where nothing of it was lost."""
    pixels = scene(2)
    noise = np.random.default_rng(0).integers(0, 40, pixels.shape, np.uint8)
    pixels = np.clip(pixels, 0, 215) + noise
    for kind in KINDS:
        data = plain(kind, pixels)
        for percent in range(5, 100, 5):
            yield Case(
                name=f"{kind} cut at {percent}%",
                data=data[: len(data) * percent // 100],
                shows=pixels,
                tolerance={"GIF": 120, "JPEG": 40, "AVIF": 60}.get(kind, 0),
                errors=("decode",),
            )


def flipped() -> Iterator[Case]:
    for kind in KINDS:
        data = plain(kind, scene(3))
        for seed in range(12):
            rng = np.random.default_rng(seed)
            broken = bytearray(data)
            # Half of them near the start, where a format says what is to come.
            reach = len(data) if seed % 2 else min(200, len(data))
            for place in rng.integers(0, reach, 1 + seed):
                broken[place] ^= 1 << rng.integers(0, 8)
            yield Case(
                name=f"{kind} flipped {seed}",
                data=bytes(broken),
                # The one format with checksums: a wrong picture would be our fault.
                shows=scene(3) if kind == "PNG" else None,
                errors=("decode", "too_large"),
            )


def wrong_headers() -> Iterator[Case]:
    """Each format's body behind another's beginning, and beginnings with nothing behind."""
    files = {kind: plain(kind, scene(4)) for kind in KINDS}
    for kind, data in files.items():
        for other, body in files.items():
            if other != kind:
                yield Case(
                    name=f"{other} behind the head of {kind}",
                    data=data[:32] + body[32:],
                    errors=("decode", "too_large"),
                )
        yield Case(name=f"the head of {kind}", data=data[:16], errors=("decode",))
    for name, data in {
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "zeros": bytes(1000),
        "one byte": b"\xff",
    }.items():
        yield Case(name=name, data=data, errors=("decode",))


def wrong_sizes() -> Iterator[Case]:
    """Sides of 0, and of 65,535 where the format can say so."""
    places = {
        "PNG": (16, ">II"),
        "GIF": (6, "<HH"),
        "BMP": (18, "<ii"),
    }
    for kind in ("JPEG", *places, "TIFF"):
        data = plain(kind, scene(5))
        for name, size in {
            "0 x 0": (0, 0),
            "0 wide": (0, HEIGHT),
            "0 high": (WIDTH, 0),
            "65535 x 65535": (BIG, BIG),
            "65535 wide": (BIG, HEIGHT),
            "65535 high": (WIDTH, BIG),
        }.items():
            broken = bytearray(data)
            if kind == "JPEG":
                place = data.index(b"\xff\xc0") + 5
                broken[place : place + 4] = struct.pack(">HH", size[1], size[0])
            elif kind == "TIFF":
                _set_tag(broken, 256, size[0])
                _set_tag(broken, 257, size[1])
            else:
                place, layout = places[kind]
                broken[place : place + struct.calcsize(layout)] = struct.pack(layout, *size)
            if kind == "PNG":
                broken[29:33] = struct.pack(">I", zlib.crc32(broken[12:29]))
            yield Case(name=f"{kind} {name}", data=bytes(broken), errors=("decode", "too_large"))
    for kind in ("PNG", "JPEG", "TIFF"):
        # Strips that are what they say.
        for size in ((BIG, 1), (1, BIG)):
            if kind == "JPEG":
                size = tuple(min(side, 65_500) for side in size)
            data = encode(Image.new("RGB", size, (10, 200, 10)), kind)
            yield Case(name=f"true {kind} {size[0]} x {size[1]}", data=data)


def bombs() -> Iterator[Case]:
    def gif(canvas: tuple[int, int], frame: tuple[int, int]) -> bytes:
        head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
        return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0;"

    def webp(width: int, height: int) -> bytes:
        body = (
            b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        )
        chunk = b"VP8X" + struct.pack("<I", len(body)) + body
        return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk

    zeros = zlib.compress(bytes(64 << 20), 9)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
    end = chunk(b"IEND", b"")
    small = chunk(b"IDAT", zlib.compress(bytes(HEIGHT * (WIDTH * 3 + 1))))
    refused = ("decode", "too_large")
    files = {
        "PNG with 64 MiB behind its pixels": (header, [chunk(b"IDAT", zeros)]),
        "PNG with a text of 64 MiB": (header, [chunk(b"zTXt", b"a\0\0" + zeros), small]),
        "PNG with twenty texts of 64 MiB": (
            header,
            [*(chunk(b"zTXt", b"a\0\0" + zeros) for _ in range(20)), small],
        ),
        "PNG with a profile of 64 MiB": (header, [chunk(b"iCCP", b"a\0\0" + zeros), small]),
        "PNG of 100,000 chunks": (header, [chunk(b"tEXt", b"a\0b")] * 100_000 + [small]),
    }
    for name, (first, chunks) in files.items():
        data = PNG + chunk(b"IHDR", first) + b"".join(chunks) + end
        yield Case(name=name, data=data, errors=refused)
    claims = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0)
    data = PNG + chunk(b"IHDR", claims) + chunk(b"IDAT", zeros) + end
    yield Case(name="PNG bomb", data=data, errors=("too_large",))
    yield Case(name="GIF of a huge canvas", data=gif((BIG, BIG), (1, 1)), errors=refused)
    yield Case(name="GIF frame beyond its canvas", data=gif((1, 1), (BIG, BIG)), errors=refused)
    yield Case(name="WebP of a huge canvas", data=webp(1 << 24, 256), errors=refused)
    for name, size in {
        "wide": b"999999999 1",
        "large": b"99999 99999",
        "long": b"9" * 5000,
    }.items():
        yield Case(name=f"PPM {name}", data=b"P6 " + size + b" 255\n" + bytes(99), errors=refused)
    bmp = bytearray(plain("BMP", scene(5)))
    for name, height in {"upside down": -(2**31), "tall": 2**31 - 1}.items():
        bmp[22:26] = struct.pack("<i", height)
        yield Case(name=f"BMP {name}", data=bytes(bmp), errors=refused)
    yield from _hostile_tiffs()


def _hostile_tiffs() -> Iterator[Case]:
    whole = plain("TIFF", scene(6))
    packed = plain("TIFF", scene(6), compression="tiff_lzw")
    for name, data, tag, value in (
        ("bits per sample", whole, 258, BIG),
        ("compression", whole, 259, 40_000),
        ("photometric", whole, 262, BIG),
        ("strip offset beyond the end", whole, 273, 2**32 - 1),
        ("strip offset of its own header", whole, 273, 0),
        ("samples per pixel", whole, 277, BIG),
        ("rows per strip 0", whole, 278, 0),
        ("rows per strip", packed, 278, 2**32 - 1),
        ("strip bytes", packed, 279, 2**32 - 1),
        ("no strip bytes", packed, 279, 0),
        ("planar", whole, 284, BIG),
        ("predictor", packed, 317, BIG),
        ("wide in one strip", packed, 256, 2**31 - 1),
        ("wide and high in one strip", packed, 257, 2**24),
    ):
        broken = bytearray(data)
        _set_tag(broken, tag, value)
        yield Case(
            name=f"TIFF of hostile {name}", data=bytes(broken), errors=("decode", "too_large")
        )
    broken = bytearray(whole)
    (ifd,) = struct.unpack_from("<I", broken, 4)
    (count,) = struct.unpack_from("<H", broken, ifd)
    struct.pack_into("<I", broken, ifd + 2 + 12 * count, ifd)
    yield Case(name="TIFF whose pages go in a circle", data=bytes(broken), errors=("decode",))
    struct.pack_into("<H", broken, ifd, BIG)
    yield Case(name="TIFF of 65535 tags", data=bytes(broken), errors=("decode",))
    for side in (BIG - 15, 2**31 - 16):
        size = struct.pack("<I", side)
        tags = [(256, 4, 1, 64), (257, 4, 1, 48), (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1)]
        tags += [
            (277, 3, 1, 1),
            (322, 4, 1, side),
            (323, 4, 1, side),
            (324, 4, 1, 8),
            (325, 4, 1, 9),
        ]
        body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + size
        yield Case(name=f"TIFF of tiles {side} wide", data=data, errors=("decode", "too_large"))


def _set_tag(data: bytearray, tag: int, value: int) -> None:
    """Overwrite a number in the first directory of a little-endian TIFF; add none."""
    (ifd,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, ifd)
    for place in range(ifd + 2, ifd + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, place)[0] == tag:
            struct.pack_into("<HII", data, place + 2, 4, 1, value)
