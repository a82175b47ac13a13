"""Runs an iterator ahead in a thread, bounded by items and by bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")

_LEAVE_S = 2.0
"""How long leaving waits for the item that the thread is at."""


class Prefetcher(Generic[T]):
    """Pulls items from `source` in a thread while the caller is busy with earlier ones.

    An error in the source reaches the caller at the place where it happened. A context manager:
    leaving it stops the thread.

    Args:
        source: iterated in the thread.
        max_items: items kept ready at most.
        max_bytes: bytes kept ready at most; one item is always let in.
        size_of: bytes of an item.
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
        """Seconds that the caller has waited for items so far."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._is_stopped = True
            self._ready.clear()
            self._changed.notify_all()
        # A thread that is still reading when the interpreter goes can crash it. One that waits for
        # a worker ends when the pool does.
        self._thread.join(timeout=_LEAVE_S)

    def is_ready(self) -> bool:
        """Whether the next item, or the end, is there without waiting."""
        return bool(self._ready) or self._is_done

    def wake(self) -> None:
        """Let a caller who waits look at its `until` again."""
        with self._changed:
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self.items()

    def items(self, until: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """The items, up to the end, or to where none is ready and `until` holds."""
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
