"""Rows -> records: their position, their key, their values or why there are none."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchvlm.errors import ErrorType
from batchvlm.records import Failure, Record, Shard

MAX_ERROR_CHARS = 200
"""Longest piece of another library's message that one of ours quotes."""

MAX_DEPTH = 128
"""Levels of arrays and objects in a JSON value. What comes after reading walks values by recursion,
which ends at some hundred levels, a few frames of Python each."""


def is_too_deep(value: Any) -> bool:
    """Whether a value holds arrays and objects on more than `MAX_DEPTH` levels below its own."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH + 1):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRows:
    """Makes the records of one shard."""

    shard: Shard
    columns: Sequence[str]
    """Columns that `Record.values` holds."""
    kept: Sequence[str] = ()
    """Columns that `Record.kept` holds."""
    id_column: str | None
    skip: Container[int]
    """Offsets in the shard that are left out."""

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The columns for values, key and output, each once."""
        return tuple(dict.fromkeys((*self.columns_of_values, *self.kept)))

    @property
    def columns_of_values(self) -> tuple[str, ...]:
        """The columns for values and key."""
        key = () if self.id_column is None else (self.id_column,)
        return tuple(dict.fromkeys((*self.columns, *key)))

    def wanted(self, first_row: int, num_rows: int) -> range:
        """The range of offsets less what is skipped at its ends; reading may stop short of it."""
        rows = [r for r in range(first_row, first_row + num_rows) if r not in self.skip]
        return range(rows[0], rows[-1] + 1) if rows else range(0)

    def record(
        self, row: int, read: Mapping[str, Any], kept: Mapping[str, Any] | None = None
    ) -> Record:
        """The record of a row whose `columns_read` are at hand; an absent column is null.

        Args:
            kept: where the values to keep are others than those in `read`.
        """
        values = {name: read.get(name) for name in self.columns}
        if kept is None:
            kept = {name: read.get(name) for name in self.kept}
        key = self._key(read)
        if key is None and self.id_column is not None and read.get(self.id_column) is not None:
            message = f"column {self.id_column!r}, the key, holds bytes that are no UTF-8"
            return self._record(row, {}, None, message)
        return self._record(row, values, key, kept=kept)

    def failed(self, rows: Iterable[int], message: str) -> Iterator[Record]:
        """Records of rows that cannot be read."""
        for row in rows:
            if row not in self.skip:
                yield self._record(row, {}, None, message)

    def from_arrow(self, batch: Any, first_row: int, schema: pa.Schema) -> Iterator[Record]:
        """Records of the rows of a record batch or table.

        Values are made one row at a time, because a batch of images is large.

        Args:
            batch: rows with at least the columns to read.
            first_row: offset in the shard of the first of them.
            schema: the input's schema; files that differ from it are converted.
        """
        columns = {name: _Column(batch, name, schema) for name in self.columns_read}
        values = self.columns_of_values
        for place in range(batch.num_rows):
            row = first_row + place
            if row in self.skip:
                continue
            read: dict[str, Any] = {}
            kept: dict[str, Any] = {}
            message = ""
            for name, column in columns.items():
                try:
                    if name in values:
                        read[name] = column.value(place)
                    if name in self.kept:
                        kept[name] = column.kept(place)
                except Exception as error:  # Arrow, Unicode, date and overflow errors
                    # Not the error's own text, which may quote the value.
                    kind = column.description[:MAX_ERROR_CHARS]
                    message = f"column {name!r} ({kind}): {type(error).__name__}"
            if message:
                yield self._record(row, {}, self._key(read), message)
            else:
                yield self.record(row, read, kept)

    def _key(self, read: Mapping[str, Any]) -> str | None:
        """The row's own key; None where it has none, or one that is no text."""
        value = None if self.id_column is None else read.get(self.id_column)
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError:
                return None
        return None if value is None else str(value)

    def _record(
        self,
        row: int,
        values: Mapping[str, Any],
        key: str | None,
        message: str | None = None,
        *,
        kept: Mapping[str, Any] | None = None,
    ) -> Record:
        return Record(
            row=row,
            row_index=self.shard.first_row_index + row,
            source_file=self.shard.source_file,
            id=f"{self.shard.source_file}:{self.shard.first_row + row}" if key is None else key,
            values=values,
            kept=kept or {},
            failure=None
            if message is None
            else Failure(error_type=ErrorType.INPUT, message=message),
        )


class _Column:
    """One column of a batch as the schema has it."""

    def __init__(self, batch: Any, name: str, schema: pa.Schema) -> None:
        # Absent from this part of the input alone: its rows fail, one by one.
        self._values = batch.column(name) if name in batch.schema.names else None
        self._type = None
        self.description = "absent here"
        if self._values is None:
            return
        found = self._values.type
        wanted = schema.field(name).type if name in schema.names else found
        self.description = str(found)
        if found != wanted:
            self.description = f"{found} as {wanted}"
            try:
                self._values = self._values.cast(wanted)
            except (pa.ArrowException, ValueError):
                # Some value does not convert: find out which, row by row.
                self._type = wanted
        self._is_exact = _is_exact(wanted)

    def value(self, place: int) -> Any:
        if self._values is None:
            raise KeyError
        scalar = self._values[place]
        return (scalar if self._type is None else scalar.cast(self._type)).as_py()

    def kept(self, place: int) -> Any:
        """The value for the output: as Python where that is exact, else an array of one row."""
        if self._values is None or self._is_exact:
            return self.value(place)
        try:
            # Copied: a slice would hold the whole batch in memory.
            row = self._values.take(pa.array([place]))
        except pa.ArrowNotImplementedError:  # string_view
            row = self._values.slice(place, 1)
        if isinstance(row, pa.ChunkedArray):
            row = row.combine_chunks()
        return row if self._type is None else row.cast(self._type)


def _is_exact(kind: pa.DataType) -> bool:
    """Whether Python's values of a type become the same Arrow values again.

    Python's times end at microseconds and in the year 9999, its dicts have each name once.
    """
    if pa.types.is_dictionary(kind):
        return _is_exact(kind.value_type)
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return len({f.name for f in fields}) == len(fields) and all(
            _is_exact(f.type) for f in fields
        )
    if pa.types.is_map(kind):
        return _is_exact(kind.key_type) and _is_exact(kind.item_type)
    if pa.types.is_nested(kind):
        return hasattr(kind, "value_type") and _is_exact(kind.value_type)
    return not pa.types.is_temporal(kind) and not isinstance(kind, pa.BaseExtensionType)


def one_line(error: BaseException) -> str:
    """What another library complains of, short enough for one line of ours."""
    text = " ".join(str(error).split())[:MAX_ERROR_CHARS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
