"""A picture in the terminal: as pixels where it can, else as coloured half blocks."""

from __future__ import annotations

import sys
from typing import Any

from PIL import Image

_COLUMNS = 40
_ROWS = 15
"""Of half blocks, each two pixels high."""


def print_thumbnail(image: Image.Image) -> None:
    """Print a picture to stdout, which is a terminal."""
    if not _print_pixels(image):
        print(half_blocks(image))


def _print_pixels(image: Image.Image) -> bool:
    """Print a picture to a terminal that draws pixels (kitty's protocol, sixel), if it does."""
    if not sys.stdin.isatty():
        return False  # nobody answers what the terminal can do
    try:
        from rich.console import Console
        from textual_image.renderable import Image as Renderable
        from textual_image.renderable import SixelImage, TGPImage

        if not issubclass(Renderable, SixelImage | TGPImage):
            return False
        Console().print(Renderable(image, width=_COLUMNS))
    except Exception:  # not installed, or a terminal that answers nonsense
        return False
    return True


def half_blocks(image: Image.Image, *, columns: int = _COLUMNS, rows: int = _ROWS) -> str:
    """A picture as text: each character shows two pixels, one above the other, in 24-bit colour."""
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
