from typing import Any

import numpy as np
import pytest
import torch
from transformers import Idefics3Processor

from batchvlm.demo import pool, world


@pytest.mark.parametrize("size", [(128, 128), (288, 215), (151, 203), (97, 96)])
def test_pictures_are_shrunk_as_the_processor_does(
    processor: Idefics3Processor, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    picture = world.render(world.draw_scene(rng), rng, *size)
    image_processor: Any = processor.image_processor
    expected = image_processor([[picture]], return_tensors="pt")["pixel_values"][0, 0]
    actual = pool.to_pixels(np.asarray(pool.shrink(picture))[None])[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_seed_decides_the_pool_and_its_draws() -> None:
    first, again, other = (pool.build_pool(12, seed) for seed in (0, 0, 1))
    assert first.scenes == again.scenes
    assert (first.pixels_IHWC == again.pixels_IHWC).all()
    assert first.scenes != other.scenes
    draws = [pool.draw_images(first, 5, np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert draws[0][1] == draws[1][1]


def test_drawn_pictures_are_varied_but_stay_their_scenes() -> None:
    built = pool.build_pool(8, 0)
    pixels_ICHW, scenes = pool.draw_images(built, 8, np.random.default_rng(0))
    assert pixels_ICHW.shape == (8, 3, 96, 96)
    assert pixels_ICHW.abs().max() <= 1
    for pixels, scene in zip(pixels_ICHW, scenes, strict=True):
        original = pool.to_pixels(built.pixels_IHWC[[built.scenes.index(scene)]])[0]
        assert 0 < (pixels - original).abs().mean() < 0.25
