import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from batchvlm.demo import world
from batchvlm.demo.world import Object, Scene


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def colored_share(picture: Image.Image, cell: int) -> dict[str, float]:
    """Share of a cell's pixels that look like each color."""
    pixels: NDArray[np.int64] = np.asarray(picture, np.int64)
    height, width = pixels.shape[:2]
    row, column = divmod(cell, 3)
    inside = pixels[
        height * row // 3 : height * (row + 1) // 3, width * column // 3 : width * (column + 1) // 3
    ]
    return {
        name: float((np.abs(inside - color).max(-1) <= 20).mean())
        for name, color in world.COLORS.items()
    }


def test_scenes_keep_the_rules_of_the_world() -> None:
    generator = rng(0)
    scenes = [world.draw_scene(generator) for _ in range(500)]
    for scene in scenes:
        cells = [obj.cell for obj in scene.objects]
        assert cells == sorted(set(cells))
        assert 1 <= len(cells) <= world.MAX_OBJECTS
    objects = [obj for scene in scenes for obj in scene.objects]
    assert {obj.shape for obj in objects} == set(world.SHAPES)
    assert {obj.color for obj in objects} == set(world.COLOR_NAMES)
    assert {obj.size for obj in objects} == set(world.SIZES)
    assert {obj.position for obj in objects} == set(world.POSITIONS)
    assert {scene.background for scene in scenes} == set(world.BACKGROUNDS)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}


def test_the_same_seed_draws_the_same_picture() -> None:
    scene = world.draw_scene(rng(1))
    first, again, other = (
        np.asarray(world.render(scene, rng(seed), 200, 150)) for seed in (5, 5, 6)
    )
    assert first.shape == (150, 200, 3)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("seed", range(30))
def test_a_picture_shows_its_scene(seed: int) -> None:
    generator = rng(seed)
    scene = world.draw_scene(generator)
    picture = world.render(scene, generator, *world.draw_size(generator))
    colors = {obj.cell: obj.color for obj in scene.objects}
    for cell in range(world.NUM_CELLS):
        for name, share in colored_share(picture, cell).items():
            # A small star covers about 4% of its cell; red and orange edges may meet a neighbor.
            assert (share > 0.02) == (colors.get(cell) == name), (cell, name, share)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_large_is_larger_than_small(shape: str) -> None:
    areas = []
    for size in world.SIZES:
        obj = Object(shape=shape, color="blue", size=size, cell=4)
        picture = world.render(Scene(objects=(obj,), background="light"), rng(3), 240, 240)
        areas.append(colored_share(picture, 4)["blue"])
    small, large = areas
    assert 1.8 < large / small < 5


def test_an_unknown_shape_is_refused() -> None:
    obj = Object(shape="blob", color="blue", size="small", cell=0)
    with pytest.raises(ValueError, match="blob"):
        world.render(Scene(objects=(obj,), background="light"), rng(0), 96, 96)


def test_sizes_are_in_range_and_often_not_square() -> None:
    generator = rng(0)
    sizes = [world.draw_size(generator) for _ in range(2000)]
    assert all(world.MIN_SIDE <= side <= world.MAX_SIDE for size in sizes for side in size)
    assert 0.36 < np.mean([width != height for width, height in sizes]) < 0.44
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_png_is_exact_and_jpeg_is_close() -> None:
    picture = world.render(world.draw_scene(rng(2)), rng(2), 160, 130)
    exact = np.asarray(picture, np.int64)
    assert (np.asarray(world.decode(world.encode_png(picture))) == exact).all()
    jpeg = world.encode_jpeg(picture, 90)
    assert jpeg.startswith(b"\xff\xd8")
    assert np.abs(np.asarray(world.decode(jpeg), np.int64) - exact).mean() < 3
