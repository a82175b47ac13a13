"""Training images: rendered once in worker processes, augmented each time they are used."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from batchvlm.demo import world
from batchvlm.demo.model import IMAGE_SIDE
from batchvlm.demo.questions import TRAINING_STREAM
from batchvlm.demo.world import Scene

# Shapes: I images, H and W pixels (96), C colors.

_CHUNK: Final = 500
_NUM_NOISES: Final = 128


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Scenes and their images at the model's resolution."""

    scenes: list[Scene]
    """The scene of each image."""

    pixels_IHWC: NDArray[np.uint8]
    """uint8 [I, 96, 96, 3]."""

    noises_NCHW: Tensor
    """float32 [N, 3, 96, 96], standard normal; sampled once because sampling is slow."""


def build_pool(num_images: int, seed: int, *, num_processes: int = 2) -> Pool:
    """Render images of random scenes; they do not depend on the number of processes."""
    starts = range(0, num_images, _CHUNK)
    sizes = [min(_CHUNK, num_images - start) for start in starts]
    work = partial(_render_chunk, seed)
    if len(sizes) == 1:  # not worth a process
        chunks = [work(0, sizes[0])]
    else:
        # Spawned, not forked: torch's thread pool does not survive a fork.
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(num_processes, len(sizes))) as processes:
            chunks = processes.starmap(work, enumerate(sizes), chunksize=1)
    noise_rng = np.random.default_rng([TRAINING_STREAM, seed, 1])
    noises = noise_rng.standard_normal((_NUM_NOISES, 3, IMAGE_SIDE, IMAGE_SIDE), np.float32)
    return Pool(
        scenes=[scene for scenes, _ in chunks for scene in scenes],
        pixels_IHWC=np.concatenate([pixels for _, pixels in chunks]),
        noises_NCHW=torch.from_numpy(noises),
    )


def draw_images(pool: Pool, num_images: int, rng: Generator) -> tuple[Tensor, list[Scene]]:
    """Sample distinct images and vary their contrast, brightness and noise.

    Returns:
        pixels_ICHW: float32 [num_images, 3, 96, 96] in [-1, 1], normalized as by the processor.
        Their scenes.
    """
    indices = rng.choice(len(pool.scenes), num_images, replace=False)
    pixels_ICHW = to_pixels(pool.pixels_IHWC[indices])
    shape = (num_images, 1, 1, 1)
    contrast = rng.uniform(0.88, 1.12, shape).astype(np.float32)
    brightness = rng.uniform(-0.08, 0.08, shape).astype(np.float32)
    strength = rng.uniform(0.0, 0.04, shape).astype(np.float32)
    chosen = torch.from_numpy(rng.integers(_NUM_NOISES, size=num_images))
    noise_ICHW = pool.noises_NCHW[chosen].roll(int(rng.integers(IMAGE_SIDE**2)), -1)
    pixels_ICHW = pixels_ICHW * torch.from_numpy(contrast) + torch.from_numpy(brightness)
    pixels_ICHW += noise_ICHW * torch.from_numpy(strength)
    return pixels_ICHW.clamp_(-1, 1), [pool.scenes[index] for index in indices]


def to_pixels(images_IHWC: NDArray[np.uint8]) -> Tensor:
    """Normalize as the processor does: uint8 [I, H, W, 3] -> float32 [I, 3, H, W] in [-1, 1]."""
    pixels_ICHW = torch.from_numpy(np.ascontiguousarray(images_IHWC.transpose(0, 3, 1, 2)))
    return pixels_ICHW.float().div_(127.5).sub_(1)


def shrink(image: Image.Image) -> Image.Image:
    """Resize as the processor does: the longest side to 96 px, then to a square."""
    width, height = image.size
    if width != height:
        scale = IMAGE_SIDE / max(width, height)
        size = (
            (IMAGE_SIDE, _to_even(height * scale))
            if width >= height
            else (_to_even(width * scale), IMAGE_SIDE)
        )
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)


def _to_even(length: float) -> int:
    return int(length) + int(length) % 2


def _render_chunk(
    seed: int, index: int, num_images: int
) -> tuple[Sequence[Scene], NDArray[np.uint8]]:
    rng = np.random.default_rng([TRAINING_STREAM, seed, 0, index])
    scenes = []
    pixels_IHWC = np.empty((num_images, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    for i in range(num_images):
        scene = world.draw_scene(rng)
        scenes.append(scene)
        pixels_IHWC[i] = np.asarray(_draw_picture(scene, rng))
    return scenes, pixels_IHWC


def _draw_picture(scene: Scene, rng: Generator) -> Image.Image:
    """Render a scene at the model's size, or at a larger size, perhaps as JPEG, and shrink it."""
    if rng.random() < 0.35:  # fast, and sharper than a shrunk image
        return world.render(scene, rng, IMAGE_SIDE, IMAGE_SIDE)
    width, height = world.draw_size(rng)
    oversample = 1 if rng.random() < 0.5 else 2
    picture = world.render(scene, rng, width, height, oversample=oversample)
    if rng.random() < 0.4:
        picture = world.decode(world.encode_jpeg(picture, int(rng.integers(70, 96))))
    return shrink(picture)
