"""Caches of recent values, which the next rows may need again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from PIL import Image

V = TypeVar("V")

KEY = "batchvlm_key"
"""Key in an image's `info` with a digest of its content; copies of the image have it, too."""


class Recent(Generic[V]):
    """An LRU cache.

    Args:
        max_bytes: limit for all values together; a larger value is not cached.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V], size_of: Callable[[V], int]) -> V:
        """Return the cached value of a key, or make and cache it; errors of `make` propagate."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        value = make()
        size_bytes = size_of(value)
        if size_bytes > self._max_bytes:
            return value
        self._kept[key] = value, size_bytes
        self._size_bytes += size_bytes
        while self._size_bytes > self._max_bytes:
            _, (_, gone_bytes) = self._kept.popitem(last=False)
            self._size_bytes -= gone_bytes
        return value


class RecentImageProcessor:
    """A transformers image processor that caches its results for recent images.

    In most datasets, rows with the same image are adjacent. Resizing and splitting the image for
    each of them would cost more than everything else that is done for a row.

    Args:
        inner: the image processor.
        max_bytes: limit for all arrays in the cache.
    """

    def __init__(self, inner: Any, max_bytes: int) -> None:
        self._inner = inner
        self._recent: Recent[Any] = Recent(max_bytes)

    def __getattr__(self, name: str) -> Any:
        # Otherwise unpickling would look up `_inner` before it is set, without end.
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        keys = _keys_of(images)
        if keys is None or args:
            return self._inner(images, *args, **kwargs)
        made = self._recent.get(
            (keys, repr(sorted(kwargs.items()))),
            lambda: self._inner(images, **kwargs),
            lambda out: sum(getattr(value, "nbytes", 1024) for value in out.values()),
        )
        # A copy, because the caller removes entries from the result.
        return type(made)(dict(made))


def _keys_of(images: Any) -> Hashable | None:
    """Return the keys of images in the same nested lists; None if an image has no key."""
    if isinstance(images, Image.Image):
        key: Hashable | None = images.info.get(KEY)
        return key
    if isinstance(images, Sequence) and not isinstance(images, str) and images:
        parts = tuple(_keys_of(image) for image in images)
        return None if None in parts else parts
    return None
