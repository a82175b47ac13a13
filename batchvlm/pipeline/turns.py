"""The loop of a dialog's rows: after each answer the row returns for its next turn.

    records -> pool -> engine -> collector
        ^------------------------------'

The reading thread takes rows from the input and rows that return, until every dialog has ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from batchvlm.records import Record


class Turns:
    """Merges the input's rows with rows that return for their next turn.

    A context manager: leaving it ends the wait of the reading thread.
    """

    def __init__(self) -> None:
        self.is_idle = False
        """Whether no row can become ready before the engine answers one that it holds."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called when `is_idle` becomes true."""
        self._requeued: deque[Record] = deque()
        self._num_open = 0
        self._num_with_pool = 0
        self._is_read = False
        self._is_left = False
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_left = True
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Whether the input is read and every row has ended."""
        return self._is_read and self._num_open == 0

    def requeue(self, record: Record) -> None:
        """Return a row for its next turn."""
        with self._changed:
            self._requeued.append(record)
            self.is_idle = False
            self._changed.notify_all()

    def end(self) -> None:
        """Count a row that has had its last turn or has failed."""
        with self._changed:
            self._num_open -= 1
            self._changed.notify_all()

    def leave_pool(self) -> None:
        """Count a row that has left the worker pool."""
        self._num_with_pool -= 1

    def to_pool(self, records: Iterable[Record | None]) -> Iterator[Record | None]:
        """Yield rows to `WorkerPool.prepare`, once for each turn; None while no row is ready.

        Args:
            records: the input's rows; None where the next one is not available yet.
        """
        for record in records:
            # Returned rows come first, because dialogs that have begun are held in memory.
            while self._requeued:
                yield self._out(self._requeued.popleft())
            if record is None:
                yield None
                continue
            with self._changed:
                self._num_open += 1
            yield self._out(record)
        self._is_read = True
        while not self.is_over and not self._is_left:
            if self._requeued:
                yield self._out(self._requeued.popleft())
            elif self._num_with_pool:
                yield None
            else:
                self._wait()

    def _out(self, record: Record) -> Record:
        self._num_with_pool += 1
        return record

    def _wait(self) -> None:
        def is_needed() -> bool:
            return bool(self._requeued or self.is_over or self._is_left)

        with self._changed:
            self.is_idle = not is_needed()
        self.on_idle()
        with self._changed:
            self._changed.wait_for(is_needed)
            self.is_idle = False
