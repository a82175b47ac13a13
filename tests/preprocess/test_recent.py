"""What was made lately is not made again, and no more is kept than allowed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchvlm.preprocess.recent import KEY, Recent, RecentImageProcessor


class Maker:
    """Makes values of given sizes and notes what it made."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def of(self, recent: Recent[str], key: str, size: int = 1) -> str:
        def make() -> str:
            self.made.append(key)
            return key.upper()

        return recent.get(key, make, lambda value: size)


def test_the_least_recently_used_goes_first() -> None:
    recent, maker = Recent[str](3), Maker()
    for key in ("a", "b", "c", "a", "d", "a", "c", "b"):
        assert maker.of(recent, key) == key.upper()
    assert maker.made == ["a", "b", "c", "d", "b"]


def test_a_value_that_is_too_large_is_not_kept() -> None:
    recent, maker = Recent[str](3), Maker()
    for key, size in (("a", 1), ("big", 4), ("big", 4), ("a", 1)):
        maker.of(recent, key, size)
    assert maker.made == ["a", "big", "big"]


def test_an_error_is_raised_each_time() -> None:
    recent = Recent[str](3)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            recent.get("a", lambda: str(1 / 0), len)


class Processor:
    """Counts its calls; what it gives back is changed by whoever gets it."""

    size = 7

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.calls += 1
        return {"pixel_values": np.asarray(images[0][0]), "num_crops": self.calls}


def shown(key: str | None) -> Image.Image:
    picture = Image.new("RGB", (4, 4))
    if key is not None:
        picture.info[KEY] = key
    return picture


def test_pictures_that_show_the_same_are_processed_once() -> None:
    inner = Processor()
    processor = RecentImageProcessor(inner, 1 << 20)
    for key in ("a", "b", "a", "b"):
        out = processor([[shown(key).copy().convert("RGB")]], return_tensors="np")
        assert out.pop("num_crops") in (1, 2)
    assert inner.calls == 2
    processor([[shown("a")]], return_tensors="np", do_resize=False)
    assert inner.calls == 3
    processor([[shown("a"), shown("b")]], return_tensors="np")
    assert inner.calls == 4
    # Its arguments by position are not part of the key.
    for _ in range(2):
        processor([[shown("a")]], "np")
    assert inner.calls == 6
    assert processor.size == copy.deepcopy(processor).size == 7


def test_no_more_arrays_are_kept_than_allowed() -> None:
    inner = Processor()
    # An array of 48 bytes and a number, which counts as 1,024.
    processor = RecentImageProcessor(inner, 2 * (48 + 1024) - 1)
    for key in ("a", "a", "b", "b", "a"):
        processor([[shown(key)]])
    assert inner.calls == 3


def test_a_picture_that_does_not_say_what_it_shows_is_processed_each_time() -> None:
    inner = Processor()
    processor = RecentImageProcessor(inner, 1 << 20)
    for _ in range(2):
        processor([[shown(None)]])
    assert inner.calls == 2
