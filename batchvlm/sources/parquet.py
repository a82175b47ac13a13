"""Read Parquet files, in memory bounded by a batch of rows, not by a row group.

Folders named `key=value` (Hive and Spark partitions) become text columns of their files.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
from bisect import bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from batchvlm.config import DataConfig
from batchvlm.errors import InputError
from batchvlm.records import InputFile, Record, Shard
from batchvlm.sources.cursor import BrokenStreamError, Cursors
from batchvlm.sources.files import HAS_CHANGED, Listing, image_root_of, list_files
from batchvlm.sources.rows import ShardRows
from batchvlm.words import described

TAIL_BYTES = 1 << 16
"""Size of the first read from a file's end; only footers with very many row groups are larger."""
BATCH_BYTES = 8 << 20
"""Target uncompressed size of a batch of rows."""
MAX_BATCH_ROWS = 256
"""Limits batches whose uncompressed size dictionary encoding hides, as that of repeated images."""
LOCAL_BUFFER_BYTES = 1 << 20
"""Size of one read of a column from a disk."""
REMOTE_BUFFER_BYTES = 8 << 20
"""Size of one read of a column over a network, where a request costs more than its bytes."""
MAX_FOOTER_THREADS = 32
"""Footers read concurrently."""
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""The value that names the partition of null in Hive."""

log = logging.getLogger(__name__)


def open_parquet(cfg: DataConfig) -> ParquetSource:
    """Open the Parquet files of `data.path`.

    Raises:
        InputError: no file is found, or the footer of one is corrupt.
    """
    listing = list_files(cfg.path, suffixes=(".parquet",))
    return ParquetSource(
        listing,
        id_column=cfg.columns.id,
        image_root=image_root_of(cfg.image_root, listing.local_root),
    )


class ParquetSource:
    """Parquet files as one input.

    The schema has the columns of all files, those of the first file first. A column has the type of
    the first file in which it is not of type null. Integer columns, and float columns, have a type
    that holds the values of every file.
    """

    def __init__(
        self, listing: Listing, *, id_column: str | None, image_root: str | None = None
    ) -> None:
        self.image_root = image_root
        self._listing = listing
        self._id_column = id_column
        self._footers = _read_footers(listing)
        self._last_file: _File | None = None
        self._cursors = Cursors(self._batches)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of all files; see the class."""
        schemas = list(dict.fromkeys(footer.schema for footer in self._footers.values()))
        types: dict[str, pa.DataType] = {}
        for field in chain.from_iterable(schemas):
            types[field.name] = _common_type(types.get(field.name, pa.null()), field.type)
        fields = [field.with_type(types[field.name]) for field in schemas[0]]
        others = types.keys() - set(schemas[0].names)
        fields += [pa.field(name, kind) for name, kind in types.items() if name in others]
        return pa.schema(fields, metadata=schemas[0].metadata)

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the files by name, each with its row groups and a digest of its size and footer.

        Raises:
            InputError: a file lacks one of `columns`, or has a column of a type that cannot be cast
                to the input's.
        """
        for schema, name in {f.schema: name for name, f in self._footers.items()}.items():
            _check_columns(name, schema, self.schema, columns, kept)
        for column in kept:
            lacking = [n for n, f in self._footers.items() if column not in f.schema.names]
            if lacking and column in self.schema.names:
                log.warning(
                    "output.keep_columns: %d of %d files have no column %r, as %s; it is null in "
                    "their rows",
                    len(lacking),
                    len(self._footers),
                    column,
                    lacking[0],
                )
        return [footer.file for footer in self._footers.values()]

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield every row of the shard; after a corrupt page, the rest of a row group fails."""
        rows = ShardRows(
            shard=shard, columns=columns, kept=kept, id_column=self._id_column, skip=skip
        )
        name = shard.source_file
        try:
            file = self._checked_file(name)
            _check_columns(name, file.schema, self.schema, rows.columns_of_values, rows.kept)
        except Exception as error:  # each file system raises errors of its own
            yield from rows.failed(range(shard.num_rows), f"{name}: {described(error)}")
            return
        row = 0
        while row < shard.num_rows:
            row_in_file = shard.first_row + row
            group = file.group_at(row_in_file)
            if group is None:
                yield from rows.failed(range(row, shard.num_rows), f"{name} ends before this row")
                return
            first, end = file.bounds[group], file.bounds[group + 1]
            num_rows = min(shard.num_rows - row, end - row_in_file)
            yield from self._read_group(rows, group, row, num_rows, shift=shard.first_row - first)
            row += num_rows

    def _read_group(
        self, rows: ShardRows, group: int, row: int, num_rows: int, *, shift: int
    ) -> Iterator[Record]:
        """Yield the rows at offsets `row` to `row + num_rows` of the shard, all in one row group.

        `shift` is added to an offset in the shard to get the row in the row group.
        """
        wanted = rows.wanted(row, num_rows)
        row, end = wanted.start, wanted.stop
        message = ""
        # A batch fails as a whole if a bad page starts in it, so its rows before that page are read
        # again one by one. So which rows fail depends on the file alone, not on the shards or the
        # order in which they are read.
        for is_single in (False, True):
            if row >= end:
                return
            stream = _Stream(rows.shard.source_file, group, rows.columns_read, is_single)
            message = "it has fewer rows than its footer says"
            try:
                for batch in self._cursors.read(stream, row + shift, end - row):
                    first, row = row, row + batch.num_rows
                    yield from rows.from_arrow(batch, first, self.schema)
            except BrokenStreamError as error:
                message = f"unreadable from its row {error.row}: {error}"
        place = f"{rows.shard.source_file}, row group {group}"
        yield from rows.failed(range(row, end), f"{place}: {message}")

    def _batches(self, stream: _Stream) -> Iterator[pa.RecordBatch]:
        checked = self._checked_file(stream.name)
        num_rows = 1 if stream.is_single else checked.batch_rows(stream.group, stream.columns)
        stored = [name for name in stream.columns if name in checked.stored]
        others = {
            name: _scalar(checked.partition.get(name), self.schema.field(name).type)
            for name in stream.columns
            if name not in checked.stored and name in self.schema.names
        }
        # A separate reader for each stream: pyarrow's iterators over one share their batch size.
        with checked.open() as file:
            # For "a.b", pyarrow also reads the field b of a struct a.
            for batch in file.iter_batches(
                batch_size=num_rows, row_groups=[stream.group], columns=stored
            ):
                # Do not return data from a file that was overwritten during the read.
                self._checked_file(stream.name)
                for name, value in others.items():
                    batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
                yield batch

    def _checked_file(self, name: str) -> _File:
        """Return a file after checking that its footer is still that of the plan.

        Raises:
            Exception: the file has changed, does not exist or cannot be read.
        """
        # The last file is kept, because the next shard is likely to be of the same one.
        if name not in self._footers:
            raise FileNotFoundError("no such file in the input")
        stamp = self._listing.stamp(name)
        last = self._last_file
        if last is None or (last.name, last.stamp) != (name, stamp):
            path = self._listing.paths[name]
            footer, metadata = _read_footer(self._listing.fs, name, path)
            if footer.file.identity != self._footers[name].file.identity:
                raise ValueError(HAS_CHANGED)
            last = self._last_file = _File(self._listing.fs, path, metadata, footer, stamp)
        return last


def _scalar(text: str | None, kind: pa.DataType) -> pa.Scalar:
    return pa.scalar(None, kind) if text is None else pa.scalar(text, pa.string()).cast(kind)


class _Stream(NamedTuple):
    """The key of a stream: some columns of a row group, read forwards."""

    name: str
    group: int
    columns: tuple[str, ...]
    is_single: bool
    """Whether to read batches of one row."""


@dataclass(frozen=True, kw_only=True)
class _Footer:
    """The data of a file's footer that planning needs."""

    file: InputFile
    schema: pa.Schema
    """The columns in the file, followed by its partition columns."""
    partition: Mapping[str, str | None]
    """Name to value of each partition column."""
    is_signed: bool
    """Whether a signature follows the footer; some columns are then encrypted."""


class _File:
    """A Parquet file whose footer has been read."""

    def __init__(
        self, fs: Any, path: str, metadata: Any, footer: _Footer, stamp: tuple[int, ...]
    ) -> None:
        self.name = footer.file.name
        self.stamp = stamp
        self.schema = footer.schema
        self.partition = footer.partition
        self.stored = set(footer.schema.names) - footer.partition.keys()
        self.bounds = [0, *accumulate(footer.file.row_groups)]
        self._fs = fs
        self._path = path
        self._metadata = metadata
        self._is_signed = footer.is_signed

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file as a `pyarrow.parquet.ParquetFile`."""
        with ExitStack() as stack:
            is_local = isinstance(self._fs, LocalFileSystem)
            source: Any = self._path
            if not is_local:
                # Arrow buffers reads itself; a second buffer would fetch everything twice.
                source = stack.enter_context(self._fs.open(self._path, "rb", cache_type="none"))
            yield stack.enter_context(
                pq.ParquetFile(
                    source,
                    metadata=self._metadata,
                    # Pre-buffering keeps all compressed bytes of a row group in memory: gigabytes
                    # with default writers.
                    pre_buffer=False,
                    buffer_size=LOCAL_BUFFER_BYTES if is_local else REMOTE_BUFFER_BYTES,
                    page_checksum_verification=True,
                )
            )

    def group_at(self, row: int) -> int | None:
        """Return the row group that holds a row; None if the file ends before it."""
        group = bisect_right(self.bounds, row) - 1
        return group if group < len(self.bounds) - 1 else None

    def batch_rows(self, group: int, columns: Sequence[str]) -> int:
        """Return the number of rows in a batch of about `BATCH_BYTES`."""
        metadata, schema = self._metadata.row_group(group), self._metadata.schema
        size_bytes = metadata.total_byte_size
        if not self._is_signed:  # pyarrow aborts if asked for the size of an encrypted column
            size_bytes = sum(
                metadata.column(i).total_uncompressed_size
                for i in range(metadata.num_columns)
                if any(f"{schema.column(i).path}.".startswith(f"{name}.") for name in columns)
            )
        num_rows = BATCH_BYTES * metadata.num_rows // max(1, size_bytes)
        return int(min(max(1, num_rows), MAX_BATCH_ROWS))


def _read_footers(listing: Listing) -> dict[str, _Footer]:
    """Read the footers of all files, by name.

    Raises:
        InputError: a file is not a Parquet file, or its footer is corrupt.
    """
    schemas: dict[pa.Schema, pa.Schema] = {}

    def read(item: tuple[str, str]) -> _Footer:
        name, path = item
        try:
            footer, _ = _read_footer(listing.fs, name, path)
        except Exception as error:  # each file system raises errors of its own
            raise InputError(
                f"data.path: {name} is no readable Parquet file: {described(error)}",
                hint="write it again or take it out of the input; data=hf reads CSV and JSON files",
            ) from error
        # Files with equal schemas share one object: there may be ten thousand.
        return replace(footer, schema=schemas.setdefault(footer.schema, footer.schema))

    items = listing.paths.items()
    with ThreadPoolExecutor(min(MAX_FOOTER_THREADS, len(items))) as threads:
        return dict(zip(listing.paths, threads.map(read, items), strict=True))


def _read_footer(fs: Any, name: str, path: str) -> tuple[_Footer, Any]:
    """Read the footer of one file from its end; return it and pyarrow's metadata."""
    size_bytes = fs.size(path)
    tail = fs.cat_file(path, start=max(0, size_bytes - TAIL_BYTES), end=size_bytes)
    footer_bytes = 8 + int.from_bytes(tail[-8:-4], "little")
    if len(tail) < footer_bytes <= size_bytes:
        tail = fs.cat_file(path, start=size_bytes - footer_bytes, end=size_bytes)
    metadata = pq.read_metadata(pa.BufferReader(tail))
    row_groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    digest = hashlib.sha256(size_bytes.to_bytes(8, "little") + tail[-footer_bytes:])
    file = InputFile(
        name=name,
        num_rows=sum(row_groups),
        row_groups=row_groups,
        identity=digest.hexdigest(),
    )
    schema = metadata.schema.to_arrow_schema()
    partition = {k: v for k, v in _partition(name).items() if k not in schema.names}
    for key in partition:
        schema = schema.append(pa.field(key, pa.string()))
    is_signed = metadata.serialized_size < footer_bytes - 8
    footer = _Footer(file=file, schema=schema, partition=partition, is_signed=is_signed)
    return footer, metadata


def _partition(name: str) -> dict[str, str | None]:
    """Return the partition columns of a file, from its folders named `key=value`."""
    pairs = [part.partition("=") for part in posixpath.dirname(name).split("/")]
    return {
        unquote(key): None if value == _NULL_PARTITION else unquote(value)
        for key, sign, value in pairs
        if key and sign
    }


def _common_type(known: pa.DataType, found: pa.DataType) -> pa.DataType:
    """Return the type for a column with type `known` so far and type `found` in another file."""
    if pa.types.is_null(known):
        return found
    kinds = (pa.types.is_integer, pa.types.is_floating)
    if known != found and any(is_kind(known) and is_kind(found) for is_kind in kinds):
        one, other = (pa.schema([("", kind)]) for kind in (known, found))
        return pa.unify_schemas([one, other], promote_options="permissive").field(0).type
    return known


def _check_columns(
    name: str, schema: pa.Schema, wanted: pa.Schema, columns: Sequence[str], kept: Sequence[str]
) -> None:
    """Check that the columns of a file can be read with the types of the input's schema.

    Args:
        name: the file's name.
        schema: the file's schema.
        wanted: the input's schema.
        columns: columns that the file must have.
        kept: columns that the file may lack.

    Raises:
        InputError: the file lacks one of `columns`, has a column twice, or has one of a type that
            cannot be cast.
    """
    for column in dict.fromkeys((*columns, *kept)):
        num_matches = len(schema.get_all_field_indices(column))
        if num_matches == 0 and column not in columns and column in wanted.names:
            continue
        if num_matches != 1:
            raise InputError(
                f"{name} has {num_matches or 'no'} column{'s'[:num_matches]} {column!r}",
                hint="every file must have each column that the job reads, once",
            )
        found, expected = schema.field(column).type, wanted.field(column).type
        try:
            pa.nulls(0, found).cast(expected)
        except pa.ArrowException as error:
            raise InputError(
                f"{name} has column {column!r} as {found}, other files have it as {expected}",
                hint="write the files with one schema",
            ) from error
