"""Prefetching from an iterator in a thread, bounded by items and by bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")

_JOIN_TIMEOUT_S = 2.0
"""How long `__exit__` waits for the thread to finish its current item."""


class Prefetcher(Generic[T]):
    """Pulls items from `source` in a thread while the caller processes earlier ones.

    An error of the source is raised to the caller after the items before it. A context manager:
    exiting it stops the thread.

    Args:
        source: iterated in the thread.
        max_items: maximum number of buffered items.
        max_bytes: maximum total size of buffered items; an empty buffer accepts any item.
        size_of: returns the bytes of an item.
    """

    def __init__(
        self,
        source: Iterable[T],
        *,
        max_items: int,
        max_bytes: int,
        size_of: Callable[[T], int],
    ) -> None:
        self._source = source
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._ready: deque[tuple[T, int]] = deque()
        self._ready_bytes = 0
        self._error: BaseException | None = None
        self._is_done = False
        self._is_stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self.wait_s = 0.0
        """Seconds for which the caller has waited for items so far."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_stopped = True
            self._ready.clear()
            self._changed.notify_all()
        # A thread that still reads when the interpreter exits can crash it. One that waits for a
        # worker ends with the pool.
        self._thread.join(timeout=_JOIN_TIMEOUT_S)

    def is_ready(self) -> bool:
        """Whether the caller can get the next item, or the end, without waiting."""
        return bool(self._ready) or self._is_done

    def wake(self) -> None:
        """Make a waiting caller evaluate its `until` again."""
        with self._changed:
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self.items()

    def items(self, until: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """Yield items until the source ends, or until none is ready and `until()` is true."""
        while True:
            start = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._is_done or until())
                self.wait_s += time.perf_counter() - start
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                item, size_bytes = self._ready.popleft()
                self._ready_bytes -= size_bytes
                self._changed.notify_all()
            yield item

    def _has_room(self, size_bytes: int) -> bool:
        fits = self._ready_bytes + size_bytes <= self._max_bytes
        return not self._ready or (fits and len(self._ready) < self._max_items)

    def _fill(self) -> None:
        try:
            for item in self._source:
                size_bytes = self._size_of(item)
                with self._changed:
                    self._changed.wait_for(lambda: self._is_stopped or self._has_room(size_bytes))  # noqa: B023
                    if self._is_stopped:
                        return
                    self._ready.append((item, size_bytes))
                    self._ready_bytes += size_bytes
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._is_done = True
                self._changed.notify_all()
