"""Random scenes of one to four shapes, rendered with PIL.

A scene has many renderings: size, jitter, tilt and color are sampled by `render`. All randomness
comes from the generators passed in.
"""

import io
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
COLORS: Final = {
    "red": (218, 40, 40),
    "green": (35, 160, 60),
    "blue": (40, 85, 225),
    "yellow": (245, 210, 30),
    "purple": (145, 50, 180),
    "orange": (245, 130, 25),
}
COLOR_NAMES: Final = tuple(COLORS)
SIZES: Final = ("small", "large")
BACKGROUNDS: Final = ("light", "dark")
POSITIONS: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
NUM_CELLS: Final = len(POSITIONS)
MAX_OBJECTS: Final = 4
MIN_SIDE: Final = 128
MAX_SIDE: Final = 288

# Diameter as a fraction of the picture's short side.
_DIAMETERS: Final = {"small": (0.145, 0.175), "large": (0.245, 0.295)}
_MAX_TILT_DEG: Final = 12.0
_CROSS_ARM: Final = 0.34


@dataclass(frozen=True, kw_only=True)
class Object:
    """One shape of a scene."""

    shape: str
    """One of `SHAPES`."""

    color: str
    """One of `COLOR_NAMES`."""

    size: str
    """One of `SIZES`."""

    cell: int
    """Cell of a 3x3 grid in row-major order, 0 at the top left."""

    @property
    def position(self) -> str:
        """The name of the cell, one of `POSITIONS`."""
        return POSITIONS[self.cell]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of an image, without its variations."""

    objects: tuple[Object, ...]
    """One to four objects in row-major order, at most one in each cell."""

    background: str
    """One of `BACKGROUNDS`."""


def draw_scene(rng: Generator) -> Scene:
    """Sample a scene, uniform in number of objects, cells, shapes, colors and sizes."""
    num_objects = int(rng.integers(1, MAX_OBJECTS + 1))
    cells = sorted(rng.choice(NUM_CELLS, num_objects, replace=False).tolist())
    objects = tuple(
        Object(
            shape=SHAPES[rng.integers(len(SHAPES))],
            color=COLOR_NAMES[rng.integers(len(COLOR_NAMES))],
            size=SIZES[rng.integers(len(SIZES))],
            cell=cell,
        )
        for cell in cells
    )
    return Scene(objects=objects, background="light" if rng.random() < 0.6 else "dark")


def draw_size(rng: Generator) -> tuple[int, int]:
    """Sample (width, height) in pixels: each side is 128 to 288, and 40% are not square."""
    if rng.random() >= 0.4:
        side = int(rng.integers(MIN_SIDE, MAX_SIDE + 1))
        return side, side
    long = int(rng.integers(MIN_SIDE + 16, MAX_SIDE + 1))
    short = int(rng.integers(max(MIN_SIDE, math.ceil(long / 1.34)), long - 7))
    return (long, short) if rng.random() < 0.5 else (short, long)


def render(
    scene: Scene, rng: Generator, width: int, height: int, *, oversample: int = 2
) -> Image.Image:
    """Render one image of a scene.

    Objects are jittered inside their cells, tilted by up to 12 degrees and varied in color. Half of
    the backgrounds have a slight gradient.

    Args:
        width: width in pixels.
        height: height in pixels.
        oversample: factor of the size at which the scene is drawn, for smooth edges.

    Returns:
        An RGB image of the given size.
    """
    big_width, big_height = width * oversample, height * oversample
    image = _draw_background(scene.background, rng, big_width, big_height)
    draw = ImageDraw.Draw(image)
    cell_width, cell_height = big_width / 3, big_height / 3
    for obj in scene.objects:
        radius = min(big_width, big_height) * rng.uniform(*_DIAMETERS[obj.size]) / 2
        # The margin keeps a tilted outline inside its cell, so that its position is unambiguous.
        slack_x = max(0.0, cell_width / 2 - radius * 1.08) * 0.9
        slack_y = max(0.0, cell_height / 2 - radius * 1.08) * 0.9
        center_x = (obj.cell % 3 + 0.5) * cell_width + rng.uniform(-slack_x, slack_x)
        center_y = (obj.cell // 3 + 0.5) * cell_height + rng.uniform(-slack_y, slack_y)
        red, green, blue = (
            int(np.clip(level + rng.integers(-16, 17), 0, 255)) for level in COLORS[obj.color]
        )
        fill = (red, green, blue)
        if obj.shape == "circle":
            box = (center_x - radius, center_y - radius, center_x + radius, center_y + radius)
            draw.ellipse(box, fill=fill)
        else:
            tilt = math.radians(rng.uniform(-_MAX_TILT_DEG, _MAX_TILT_DEG))
            draw.polygon(_outline(obj.shape, center_x, center_y, radius, tilt), fill=fill)
    return image.reduce(oversample) if oversample > 1 else image


def encode_jpeg(image: Image.Image, quality: int, *, exif: Image.Exif | None = None) -> bytes:
    """Encode as JPEG with PIL's `quality` (1-95)."""
    buffer = io.BytesIO()
    extra = {} if exif is None else {"exif": exif}
    image.save(buffer, "JPEG", quality=quality, **extra)
    return buffer.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """Encode as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(encoded: bytes) -> Image.Image:
    """Decode an image file to RGB, ignoring EXIF orientation."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def _draw_background(background: str, rng: Generator, width: int, height: int) -> Image.Image:
    low, high = (205, 256) if background == "light" else (8, 60)
    level = rng.integers(low, high, 3)
    level = 0.6 * level.mean() + 0.4 * level  # mostly grey, so that every object is visible
    if rng.random() < 0.5:
        return Image.new("RGB", (width, height), tuple(int(x) for x in level))
    slope = rng.uniform(-22, 22) * np.linspace(-1, 1, 16)
    ramp = slope[:, None] if rng.random() < 0.5 else slope[None, :]
    pixels = np.clip(level + np.broadcast_to(ramp, (16, 16))[..., None], 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def _outline(
    shape: str, center_x: float, center_y: float, radius: float, tilt: float
) -> list[tuple[float, float]]:
    """Return the corners of a shape around a center; `tilt` is in radians, clockwise on screen."""
    if shape == "cross":
        arm = _CROSS_ARM
        quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
        # A quarter turn maps (x, y) to (-y, x).
        corners = list(quarter)
        for _ in range(3):
            quarter = [(-y, x) for x, y in quarter]
            corners += quarter
        cos, sin = math.cos(tilt), math.sin(tilt)
        return [
            (center_x + radius * (x * cos - y * sin), center_y + radius * (x * sin + y * cos))
            for x, y in corners
        ]
    radii: tuple[float, ...]
    # The factors give all shapes about the same visual weight.
    match shape:
        case "square":
            num_corners, radii, start, scale = 4, (1.0,), math.pi / 4, 1.12
        case "triangle":
            num_corners, radii, start, scale = 3, (1.0,), -math.pi / 2, 1.12
            center_y += radius * 0.18  # the middle of a triangle is above its centroid
        case "star":
            num_corners, radii, start, scale = 10, (1.0, 0.42), -math.pi / 2, 1.1
        case _:
            raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")
    corners = []
    for i in range(num_corners):
        angle = start + tilt + 2 * math.pi * i / num_corners
        length = radius * scale * radii[i % len(radii)]
        corners.append((center_x + length * math.cos(angle), center_y + length * math.sin(angle)))
    return corners
