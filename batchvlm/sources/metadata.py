"""Read a folder of images with metadata files: one record for each row of the metadata.

The layout is that of Hugging Face's `imagefolder`: `metadata.jsonl`, `metadata.csv` or
`metadata.parquet` with a column `file_name`, relative to the folder of the metadata file, and any
other columns.
"""

from __future__ import annotations

import csv
import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from batchvlm.config import DataConfig
from batchvlm.errors import InputError
from batchvlm.records import InputFile, Record, Shard
from batchvlm.sources import Source
from batchvlm.sources.cursor import BrokenStreamError, Cursors
from batchvlm.sources.files import HAS_CHANGED, Listing, image_root_of, is_text, walk
from batchvlm.sources.jsonl import JsonlSource
from batchvlm.sources.parquet import ParquetSource
from batchvlm.sources.rows import ShardRows
from batchvlm.words import described

_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_NAME = "file_name"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_CHUNK_ROWS = 64
_MAX_FIELD_CHARS = 64 << 20


def find_metadata(cfg: DataConfig, root: str) -> MetadataSource | None:
    """Return the source of a folder with metadata files; None if the folder has none.

    Raises:
        InputError: the metadata files are of several formats, or have no column `file_name`.
    """
    found: dict[str, str] = {}
    for folder, subfolders, names in walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in set(names) & set(_NAMES):
            path = os.path.join(folder, name)
            found[os.path.relpath(path, root)] = path
    if not found:
        return None
    kinds = {os.path.basename(path) for path in found}
    if len(kinds) > 1:
        raise InputError(
            f"data.path: {cfg.path} has {' and '.join(sorted(kinds))}",
            hint="keep one kind of metadata file",
        )
    listing = Listing(fs=LocalFileSystem(), root=root, paths=dict(sorted(found.items())))
    rows: Source
    match kinds.pop():
        case "metadata.jsonl":
            rows = JsonlSource(listing, id_column=cfg.columns.id)
        case "metadata.csv":
            rows = _CsvSource(listing, id_column=cfg.columns.id)
        case _:
            rows = ParquetSource(listing, id_column=cfg.columns.id)
    if _FILE_NAME not in rows.schema.names:
        hint = f"name each row's image in {_FILE_NAME}, or move that file out of the folder"
        if named := [n for n in rows.schema.names if n.endswith(("_file_name", "file_names"))]:
            hint = f"data=hf reads {named[0]!r}, as Hugging Face's imagefolder names other images"
        raise InputError(f"data.path: {next(iter(found))} has no column {_FILE_NAME!r}", hint=hint)
    return MetadataSource(
        rows,
        image_root=image_root_of(cfg.image_root, root),
        prefix=os.curdir if cfg.image_root is None else root,
    )


class MetadataSource:
    """The rows of metadata files, each with a column `image`.

    Args:
        rows: source of the metadata files.
        image_root: folder that paths may not leave.
        prefix: joined before each image's path, which is relative to the input's folder.
    """

    def __init__(self, rows: Source, *, image_root: str | None, prefix: str) -> None:
        self.image_root = image_root
        self._rows = rows
        self._prefix = prefix

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the metadata files, and `image`."""
        others = [field for field in self._rows.schema if field.name != "image"]
        return pa.schema([pa.field("image", _IMAGE), *others])

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the metadata files.

        Raises:
            InputError: a file cannot be read, or lacks a column.
        """
        return self._rows.files([*_without_image(columns), _FILE_NAME], _without_image(kept))

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield every row of the shard; no image is opened."""
        needed = [*_without_image(columns), _FILE_NAME]
        for record in self._rows.read_shard(shard, needed, kept=_without_image(kept), skip=skip):
            if record.failure is None:
                image = self._image(record.values[_FILE_NAME], shard.source_file)
                read = {**record.values, "image": image}
                others = {"image": image} if "image" in kept else {}
                record = replace(
                    record,
                    values={name: read.get(name) for name in columns},
                    kept={**record.kept, **others},
                )
            yield record

    def _image(self, name: Any, source_file: str) -> dict[str, Any] | None:
        if not isinstance(name, str) or not name.strip():
            return None
        # With a folder before them, "data:x.png" and "http:x.png" are also read as file names.
        path = posixpath.join(self._prefix, posixpath.dirname(source_file), name)
        return {"bytes": None, "path": path}


def _without_image(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name != "image"]


class _CsvSource:
    """CSV files with a header line; every value is text, and an empty value is null."""

    image_root = None

    def __init__(self, listing: Listing, *, id_column: str | None) -> None:
        self._listing = listing
        self._id_column = id_column
        self._planned: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._cursors = Cursors(self._chunks)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of all header lines, as text.

        Raises:
            InputError: a file cannot be read.
        """
        names = (self._scan(name, max_rows=0)[0] for name in self._listing.paths)
        return pa.schema(
            [(name, pa.string()) for name in dict.fromkeys(chain.from_iterable(names))]
        )

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the files by name, each read once for its number of rows and digest.

        Raises:
            InputError: a file cannot be read, lacks one of `columns`, or has two of one name.
        """
        files = []
        for name in self._listing.paths:
            stamp = self._listing.stamp(name)
            header, num_rows, digest = self._scan(name)
            if twice := [column for column, num in Counter(header).items() if num > 1]:
                raise InputError(
                    f"data.path: {name} has several columns {twice[0]!r}",
                    hint="give each its own name",
                )
            if missing := [column for column in columns if column not in header]:
                raise InputError(
                    f"data.path: {name} has no column {missing[0]!r}",
                    hint="its first line has to name the columns",
                )
            self._planned[name] = digest, stamp
            files.append(
                InputFile(name=name, num_rows=num_rows, row_groups=(num_rows,), identity=digest)
            )
        return files

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield every row of the shard; a row with too few or too many values as a failure."""
        rows = ShardRows(
            shard=shard, columns=columns, kept=kept, id_column=self._id_column, skip=skip
        )
        row = 0
        message = "the file ends before this row"
        try:
            chunks = self._cursors.read(shard.source_file, shard.first_row, shard.num_rows)
            for values in chain.from_iterable(chunks):
                if row not in skip:
                    if isinstance(values, str):
                        yield from rows.failed([row], f"{shard.source_file}: {values}")
                    else:
                        yield rows.record(row, values)
                row += 1
        except Exception as error:  # csv, decoding and file system errors
            message = str(error) if isinstance(error, BrokenStreamError) else described(error)
        yield from rows.failed(range(row, shard.num_rows), f"{shard.source_file}: {message}")

    def _chunks(self, name: str) -> Iterator[list[Mapping[str, Any] | str]]:
        with self._open(name) as file:
            reader = csv.reader(file)
            header = next(reader, [])
            lines = (line for line in reader if line)
            while chunk := list(islice(lines, _CHUNK_ROWS)):
                self._check_unchanged(name)
                yield [_row(header, line) for line in chunk]

    def _check_unchanged(self, name: str) -> None:
        stamp = self._listing.stamp(name)
        digest, planned = self._planned.get(name, ("", stamp))
        if stamp != planned:
            if self._scan(name)[2] != digest:
                raise ValueError(HAS_CHANGED)
            self._planned[name] = digest, stamp

    def _scan(self, name: str, max_rows: int | None = None) -> tuple[list[str], int, str]:
        """Return the column names, the number of rows, and a digest of the lines read."""
        digest = hashlib.sha256()

        def watched(file: Any) -> Iterator[str]:
            for line in file:
                digest.update(line.encode("utf-8", "surrogateescape"))
                yield line

        try:
            with self._open(name) as file:
                reader = csv.reader(watched(file))
                header = next(reader, [])
                num_rows = sum(1 for line in islice(reader, max_rows) if line)
        except (OSError, csv.Error) as error:
            raise InputError(
                f"data.path: cannot read {name}: {described(error)}",
                hint="check that the file is whole CSV and that you may read it",
            ) from error
        return header, num_rows, digest.hexdigest()

    def _open(self, name: str) -> Any:
        csv.field_size_limit(_MAX_FIELD_CHARS)
        path = self._listing.paths[name]
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _row(header: Sequence[str], line: Sequence[str]) -> Mapping[str, Any] | str:
    if len(line) != len(header):
        return f"{len(line)} values for {len(header)} columns"
    if not all(map(is_text, line)):
        return "a value is not UTF-8"
    return {name: value or None for name, value in zip(header, line, strict=True)}
