"""Rows of a dialog on their way round: each answer brings its row back for the next turn.

    records -> pool -> engine -> collector
        ^------------------------------'

The reading thread draws from the input and from the rows that come back; it ends when all are done.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from batchvlm.records import Record


class Turns:
    """A context manager that lets go of the reading thread when left.

    Args:
        records: the input's rows; None where there is none yet.
    """

    def __init__(self, records: Iterable[Record | None]) -> None:
        self.is_idle = False
        """Whether nothing will be ready before the engine answers a row that it has."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called once that is so."""
        self._records = records
        self._again: deque[Record] = deque()
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
        """Whether every row has had its last turn."""
        return self._is_read and self._num_open == 0

    def again(self, record: Record) -> None:
        """Bring a row back for its next turn."""
        with self._changed:
            self._again.append(record)
            self.is_idle = False
            self._changed.notify_all()

    def end(self) -> None:
        """A row has had its last turn, or has failed."""
        with self._changed:
            self._num_open -= 1
            self._changed.notify_all()

    def leave_pool(self) -> None:
        """A row has come out of the worker pool."""
        self._num_with_pool -= 1

    def to_pool(self) -> Iterator[Record | None]:
        """Every row of every turn, as `WorkerPool.prepare` takes them; in the reading thread."""
        for record in self._records:
            # Rows that are under way first: what is begun is held in memory.
            while self._again:
                yield self._out(self._again.popleft())
            if record is None:
                yield None
                continue
            with self._changed:
                self._num_open += 1
            yield self._out(record)
        self._is_read = True
        while not self.is_over and not self._is_left:
            if self._again:
                yield self._out(self._again.popleft())
            elif self._num_with_pool:
                yield None
            else:
                self._wait()

    def _out(self, record: Record) -> Record:
        self._num_with_pool += 1
        return record

    def _wait(self) -> None:
        def is_needed() -> bool:
            return bool(self._again or self.is_over or self._is_left)

        with self._changed:
            self.is_idle = not is_needed()
        self.on_idle()
        with self._changed:
            self._changed.wait_for(is_needed)
            self.is_idle = False
