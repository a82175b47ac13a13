"""Read formats that can only be read forwards without starting over for each shard.

In a row group, a compressed file or a streamed dataset, reaching a row costs reading every row
before it. A worker that reads successive shards must pay this once, not once for each shard.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from batchvlm.words import described


class Chunk(Protocol):
    """Consecutive rows: a list, an Arrow record batch or an Arrow table."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


C = TypeVar("C", bound=Chunk)
K = TypeVar("K", bound=Hashable)


class BrokenStreamError(Exception):
    """A stream cannot be read from `row` on."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


class Cursors(Generic[K, C]):
    """Reads ranges of rows from streams, continuing from where the last read stopped if possible.

    Args:
        open_stream: returns the chunks of the stream with the given key, from its first row on. It
            is a generator, so that closing it releases its resources.
    """

    def __init__(self, open_stream: Callable[[K], Iterator[C]]) -> None:
        self._open_stream = open_stream
        self._parked: tuple[K, _Cursor[C]] | None = None
        self._broken: dict[K, tuple[int, str]] = {}

    def read(self, key: K, first_row: int, num_rows: int) -> Iterator[C]:
        """Yield the rows of the range in chunks; fewer rows if the stream ends early.

        Several reads may run at once, each with its own cursor; the next read can continue with the
        cursor of the read that ended last.

        Raises:
            BrokenStreamError: the stream raised; rows yielded before are valid.
        """
        broken_row, message = self._broken.get(key, (first_row + 1, ""))
        if broken_row <= first_row:
            raise BrokenStreamError(broken_row, message)
        cursor = self._claim(key, first_row)
        end = first_row + num_rows
        is_good = True
        try:
            while cursor.row < end:
                try:
                    chunk = cursor.next_chunk(end)
                except Exception as error:  # each format raises errors of its own
                    is_good = False
                    broken = (cursor.row, described(error))
                    # A stream that fails at row 0 is cheap to retry and may not have been opened.
                    if cursor.row:
                        self._broken[key] = broken
                    raise BrokenStreamError(*broken) from error
                if chunk is None:
                    break
                num_before = max(0, first_row - (cursor.row - len(chunk)))
                if num_before < len(chunk):
                    yield chunk[num_before:] if num_before else chunk
        finally:
            if is_good:
                self._parked = (key, cursor)

    def _claim(self, key: K, first_row: int) -> _Cursor[C]:
        # Take the cursor even if it does not fit: otherwise it would keep its file open.
        parked, self._parked = self._parked, None
        if parked is not None:
            parked_key, cursor = parked
            if parked_key == key and cursor.row <= first_row:
                return cursor
        return _Cursor(self._open_stream(key))


class _Cursor(Generic[C]):
    """A stream and the number of its next row."""

    def __init__(self, stream: Iterator[C]) -> None:
        self.row = 0
        self._stream = stream
        self._rest: C | None = None

    def next_chunk(self, end: int) -> C | None:
        """Return the next rows, all before row `end`; None at the end of the stream."""
        chunk, self._rest = self._rest, None
        while chunk is None or len(chunk) == 0:
            chunk = next(self._stream, None)
            if chunk is None:
                return None
        num_rows = end - self.row
        if num_rows < len(chunk):
            chunk, self._rest = chunk[:num_rows], chunk[num_rows:]
        self.row += len(chunk)
        return chunk
