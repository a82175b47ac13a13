"""Make records of rows: their position, key, and values or failure."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batchvlm.errors import ErrorType
from batchvlm.records import Failure, Record, Shard
from batchvlm.words import one_line

MAX_DEPTH = 128
"""Levels of arrays and objects in a JSON value. Later stages walk values recursively, with a few
Python frames for each level, and so would fail at several hundred levels."""


def is_too_deep(value: Any) -> bool:
    """Whether a value has more than `MAX_DEPTH` levels of arrays and objects below its own."""
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
    """Columns for `Record.values`."""
    kept: Sequence[str] = ()
    """Columns for `Record.kept`."""
    id_column: str | None
    skip: Container[int]
    """Offsets in the shard of rows to leave out."""

    @property
    def columns_read(self) -> tuple[str, ...]:
        """Columns for values, key and output, without duplicates."""
        return tuple(dict.fromkeys((*self.columns_of_values, *self.kept)))

    @property
    def columns_of_values(self) -> tuple[str, ...]:
        """Columns for values and key, without duplicates."""
        key = () if self.id_column is None else (self.id_column,)
        return tuple(dict.fromkeys((*self.columns, *key)))

    def wanted(self, first_row: int, num_rows: int) -> range:
        """Return the range of offsets without the skipped rows at its two ends."""
        rows = [r for r in range(first_row, first_row + num_rows) if r not in self.skip]
        return range(rows[0], rows[-1] + 1) if rows else range(0)

    def record(
        self, row: int, read: Mapping[str, Any], kept: Mapping[str, Any] | None = None
    ) -> Record:
        """Return the record of a row.

        Args:
            read: values of `columns_read`; a missing column is null.
            kept: values for `Record.kept`; None to take them from `read`.
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
        """Yield records of rows that cannot be read."""
        for row in rows:
            if row not in self.skip:
                yield self._record(row, {}, None, message)

    def from_arrow(self, batch: Any, first_row: int, schema: pa.Schema) -> Iterator[Record]:
        """Yield records of the rows of a record batch or table.

        Values are converted one row at a time, because a batch of images is large.

        Args:
            batch: rows; in a batch that lacks one of `columns_read`, every row fails.
            first_row: offset in the shard of the first row.
            schema: the input's schema, to which columns of other types are cast.
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
                    # Without the error's message, which may quote the value.
                    kind = one_line(column.description)
                    message = f"column {name!r} ({kind}): {type(error).__name__}"
            if message:
                yield self._record(row, {}, self._key(read), message)
            else:
                yield self.record(row, read, kept)

    def _key(self, read: Mapping[str, Any]) -> str | None:
        """Return the row's key; None if it has none, or one that is not UTF-8."""
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
    """One column of a batch, cast to the type of the schema."""

    def __init__(self, batch: Any, name: str, schema: pa.Schema) -> None:
        # None if only this part of the input lacks the column: each of its rows fails.
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
                # Some values cannot be cast: cast row by row, so that only their rows fail.
                self._type = wanted
        self._is_exact = _is_exact(wanted)
        self._wanted = wanted if _holds_json(wanted) else None

    def value(self, place: int) -> Any:
        if self._values is None:
            raise KeyError
        scalar = self._values[place]
        value = (scalar if self._type is None else scalar.cast(self._type)).as_py()
        return value if self._wanted is None else _parsed(value, self._wanted)

    def kept(self, place: int) -> Any:
        """Return a Python value if that is exact, else an Arrow array of one row."""
        if self._values is None or self._is_exact:
            return self.value(place)
        try:
            # Copied, because a slice would keep the whole batch in memory.
            row = self._values.take(pa.array([place]))
        except pa.ArrowNotImplementedError:  # string_view
            row = self._values.slice(place, 1)
        if isinstance(row, pa.ChunkedArray):
            row = row.combine_chunks()
        return row if self._type is None else row.cast(self._type)


def _is_json(kind: pa.DataType) -> bool:
    is_extension = isinstance(kind, pa.BaseExtensionType)
    return is_extension and kind.extension_name == "arrow.json"


def _holds_json(kind: pa.DataType) -> bool:
    """Whether a type has JSON text in it: values that have no single type (`datasets.Json`)."""
    if pa.types.is_struct(kind):
        return any(_holds_json(kind.field(i).type) for i in range(kind.num_fields))
    is_list = pa.types.is_nested(kind) and hasattr(kind, "value_type")
    return _holds_json(kind.value_type) if is_list else _is_json(kind)


def _parsed(value: Any, kind: pa.DataType) -> Any:
    """Return a value with the JSON text in it parsed.

    Raises:
        ValueError: text is no JSON, is nested too deeply, or holds half a surrogate pair.
    """
    if value is None:
        return None
    if _is_json(kind):
        value = json.loads(value)
        json.dumps(value, ensure_ascii=False).encode()
        if is_too_deep(value):
            raise ValueError
        return value
    if isinstance(value, dict):
        return {name: _parsed(item, kind.field(name).type) for name, item in value.items()}
    return [_parsed(item, kind.value_type) for item in value] if isinstance(value, list) else value


def _is_exact(kind: pa.DataType) -> bool:
    """Whether values of a type survive conversion to Python and back to Arrow.

    Python's times have microseconds and end in the year 9999; its dicts have no duplicate keys.
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
