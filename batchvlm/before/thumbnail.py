"""Show an image in the terminal: as pixels if supported, else as coloured half blocks."""

from __future__ import annotations

import sys
from typing import Any

from PIL import Image

_COLUMNS = 40
_ROWS = 15
"""Rows of half blocks, each two pixels high."""


def print_thumbnail(image: Image.Image) -> None:
    """Print an image to stdout, which must be a terminal."""
    if not _print_pixels(image):
        print(half_blocks(image))


def _print_pixels(image: Image.Image) -> bool:
    """Print an image by kitty's protocol or sixel; return False if neither is supported."""
    if not sys.stdin.isatty():
        return False  # the terminal's answer to a query could not be read
    try:
        from rich.console import Console
        from textual_image.renderable import Image as Renderable
        from textual_image.renderable import SixelImage, TGPImage

        if not issubclass(Renderable, SixelImage | TGPImage):
            return False
        Console().print(Renderable(image, width=_COLUMNS))
    except Exception:  # not installed, or the terminal's answer is invalid
        return False
    return True


def half_blocks(image: Image.Image, *, columns: int = _COLUMNS, rows: int = _ROWS) -> str:
    """Return an image as text; each character shows two pixels, one above the other, in colour."""
    small = image.convert("RGB")
    small.thumbnail((columns, 2 * rows))
    width, height = small.size
    pixels = small.load()
    assert pixels is not None
    lines = []
    for y in range(0, height, 2):
        line = ""
        for x in range(width):
            line += _colour(38, pixels[x, y])
            if y + 1 < height:
                line += _colour(48, pixels[x, y + 1])
            line += "▀"
        lines.append(f"{line}\x1b[0m")
    return "\n".join(lines)


def _colour(plane: int, pixel: Any) -> str:
    red, green, blue = pixel
    return f"\x1b[{plane};2;{red};{green};{blue}m"
