"""Hostile and odd images: each is right, or the error of its row."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchvlm.errors import ErrorType, RowError
from batchvlm.preprocess.images import capped_size, image_size, load_image, to_rgb
from batchvlm.records import ImageRef
from tests.conftest import encode


def load(data: bytes | None = None, path: str | None = None, **options: Any) -> Image.Image:
    defaults = {
        "image_root": None,
        "max_image_bytes": 1 << 20,
        "max_source_pixels": 10**8,
        "max_pixels": 10**6,
    }
    return load_image(ImageRef(data=data, path=path), **(defaults | options))


def refused(data: bytes | None = None, path: str | None = None, **options: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        load(data, path, **options)
    assert "\n" not in caught.value.message
    return caught.value


def halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    return image


def color_at(image: Image.Image, x: float, y: float) -> str:
    pixel = image.getpixel((int(x * image.width), int(y * image.height)))
    assert isinstance(pixel, tuple)
    return {0: "red", 1: "green", 2: "blue"}[int(np.argmax(pixel[:3]))]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(kind: str) -> None:
    image = load(encode(halves(), kind))
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert (color_at(image, 0.2, 0.5), color_at(image, 0.8, 0.5)) == ("red", "blue")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("cut", [0.05, 0.3, 0.6, 0.9])
def test_half_a_file_is_no_image(kind: str, cut: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encode(noise, kind)
    assert refused(data[: int(len(data) * cut)]).error_type is ErrorType.DECODE


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"\0" * 100,
        b"<svg></svg>",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    ],
)
def test_what_is_no_image(data: bytes) -> None:
    assert refused(data).error_type is ErrorType.DECODE


def test_a_bomb_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    error = refused(bomb)
    assert error.error_type is ErrorType.TOO_LARGE
    assert "60000 x 60000" in error.message and "data.max_source_pixels=100000000" in error.message


# EXIF orientation: where the stored picture's (red, blue) halves end up, as (first, second) along
# the axis that they lie on after transposing.
@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (40, 20), (0.2, 0.5)),
        (2, (40, 20), (0.8, 0.5)),
        (3, (40, 20), (0.8, 0.5)),
        (4, (40, 20), (0.2, 0.5)),
        (5, (20, 40), (0.5, 0.2)),
        (6, (20, 40), (0.5, 0.2)),
        (7, (20, 40), (0.5, 0.8)),
        (8, (20, 40), (0.5, 0.8)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation(kind: str, orientation: int, size: tuple[int, int], red_at: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load(encode(halves(), kind, exif=exif))
    assert image.size == size
    x, y = red_at
    assert color_at(image, x, y) == "red"
    assert color_at(image, 1 - x if x != 0.5 else x, 1 - y if y != 0.5 else y) == "blue"


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(9))
def test_a_header_tells_the_upright_size(kind: str, orientation: int) -> None:
    """Also of a TIFF, which Pillow turns as it opens it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(halves(), kind, exif=exif)
    size = image_size(
        ImageRef(data=data), image_root=None, max_image_bytes=1 << 20, max_source_pixels=10**8
    )
    assert size == load(data).size == ((20, 40) if orientation >= 5 else (40, 20))


def test_broken_exif_costs_nothing() -> None:
    image = load(encode(halves(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert image.size == (40, 20)


def test_a_large_image_is_shrunk_to_the_cap() -> None:
    image = load(encode(halves((400, 200)), "JPEG"), max_pixels=1000)
    assert image.width * image.height <= 1000
    assert image.width / image.height == pytest.approx(2, rel=0.1)
    assert color_at(image, 0.2, 0.5) == "red"


def test_a_large_jpeg_is_decoded_in_draft_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = Image.Image.draft
    from PIL import JpegImagePlugin

    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(self: Any, mode: Any, size: Any) -> Any:
        asked.append(size)
        return draft(self, mode, size)

    assert original is not draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    data = encode(halves((800, 400)), "JPEG")
    load(data, max_pixels=320_000)
    assert asked == []
    load(data, max_pixels=20_000)
    assert asked == [(200, 100)]


@given(st.integers(1, 70_000), st.integers(1, 70_000), st.integers(1, 5_000_000))
def test_capped_size(width: int, height: int, max_pixels: int) -> None:
    w, h = capped_size((width, height), max_pixels)
    assert 1 <= w <= width and 1 <= h <= height
    assert w * h <= max_pixels
    if width * height <= max_pixels:
        assert (w, h) == (width, height)


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load(encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0] * 256)
    assert load(encode(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert load(encode(Image.new("LA", (4, 4), (0, 128)))).getpixel((0, 0)) == (127,) * 3


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "I", "F"]
)
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_16_bit_grey_keeps_its_tones() -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    image = load(encode(Image.fromarray(values), "PNG"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]


def test_paths_stay_below_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    (root / "sub").mkdir(parents=True)
    outside.write_bytes(encode(halves()))
    (root / "sub" / "in.png").write_bytes(encode(halves()))
    (root / "link.png").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "sub" / "in.png")
    options = {"image_root": str(root)}
    assert load(path="sub/in.png", **options).size == (40, 20)
    assert load(path="sub/../sub/in.png", **options).size == (40, 20)
    assert load(path=str(root / "sub" / "in.png"), **options).size == (40, 20)
    assert load(path="inner.png", **options).size == (40, 20)
    for path in ("../outside.png", str(outside), "link.png", "sub/../../outside.png"):
        assert refused(path=path, **options).error_type is ErrorType.FORBIDDEN, path
    assert refused(path="sub/in.png").error_type is ErrorType.FORBIDDEN


def test_a_root_whose_name_begins_another(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "a.png").write_bytes(encode(halves()))
    error = refused(path="../root2/a.png", image_root=str(tmp_path / "root"))
    assert error.error_type is ErrorType.FORBIDDEN


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    options = {"image_root": str(tmp_path)}
    for path in ("no.png", "folder", "pipe", "a\0b", "x" * 5000):
        assert refused(path=path, **options).error_type is ErrorType.MISSING_IMAGE, path[:20]


def test_a_file_is_read_no_further_than_its_limit(tmp_path: Path) -> None:
    data = encode(halves())
    (tmp_path / "a.png").write_bytes(data)
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(1 << 40)
    options = {"image_root": str(tmp_path), "max_image_bytes": len(data)}
    assert load(path="a.png", **options).size == (40, 20)
    assert load(data, max_image_bytes=len(data)).size == (40, 20)
    for error in (
        refused(path="long.png", **options),
        refused(path="a.png", **options | {"max_image_bytes": len(data) - 1}),
        refused(data, max_image_bytes=len(data) - 1),
    ):
        assert error.error_type is ErrorType.TOO_LARGE
        assert "more bytes than data.max_image_bytes=" in error.message


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert color_at(load(file.getvalue()), 0.5, 0.5) == "red"
