"""What was made lately, kept in case the next row needs it again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from PIL import Image

V = TypeVar("V")

KEY = "batchvlm_key"
"""Under this name a picture's `info` says what it shows; copies of the picture say so too."""


class Recent(Generic[V]):
    """Values by key, the least recently used given up first.

    Args:
        max_bytes: of all values together; one larger than that is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V], size_of: Callable[[V], int]) -> V:
        """The value of a key, made where it is not kept; an error in making it is not kept."""
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
    """A transformers image processor that remembers what it made of the latest pictures.

    Rows that ask about one image come behind one another in most datasets; resizing and cutting
    it up for each of them would cost more than all else that is done for a row.

    Args:
        inner: the image processor.
        max_bytes: of all arrays that are kept.
    """

    def __init__(self, inner: Any, max_bytes: int) -> None:
        self._inner = inner
        self._recent: Recent[Any] = Recent(max_bytes)

    def __getattr__(self, name: str) -> Any:
        # Without these two, unpickling would look for `_inner` before it is there.
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        shown = _shown(images)
        if shown is None or args:
            return self._inner(images, *args, **kwargs)
        made = self._recent.get(
            (shown, repr(sorted(kwargs.items()))),
            lambda: self._inner(images, **kwargs),
            lambda out: sum(getattr(value, "nbytes", 1024) for value in out.values()),
        )
        # The processor takes entries out of what it gets.
        return type(made)(dict(made))


def _shown(images: Any) -> Hashable | None:
    """What pictures show, in the lists that they come in; None where one of them does not say."""
    if isinstance(images, Image.Image):
        key: Hashable | None = images.info.get(KEY)
        return key
    if isinstance(images, Sequence) and not isinstance(images, str) and images:
        parts = tuple(_shown(image) for image in images)
        return None if None in parts else parts
    return None
