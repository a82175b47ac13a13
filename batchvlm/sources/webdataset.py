"""Read WebDataset tar shards: adjacent members with the same key are a row.

`a/001.jpg`, `a/001.json`, `a/001.seg.png` are the row `a/001` with the columns `jpg`, `json`,
`seg.png`, and `image`, its first image. Members are read in place: nothing is unpacked, and a
member's name is never used as a path.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import pyarrow as pa

from batchvlm.config import DataConfig
from batchvlm.errors import InputError
from batchvlm.records import InputFile, Record, Shard
from batchvlm.sources.files import HAS_CHANGED, Listing, image_root_of, is_text, list_files
from batchvlm.sources.folder import IMAGE_SUFFIXES
from batchvlm.sources.rows import MAX_DEPTH, ShardRows, is_too_deep
from batchvlm.words import described

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
"""Key and extension, split as WebDataset does: at the first dot of the file name."""
_TEXTS = {"txt", "text", "transcript", "caption", "prompt", "cls", "cls2", "html", "md", "csv"}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MAX_HEADER_BYTES = 1 << 20
"""Limit for a member's name or extended header; only malformed archives exceed it."""
_MAX_TEXT_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 16
_INDEX_THREADS = 8


def open_webdataset(cfg: DataConfig) -> WebDatasetSource:
    """Open the tar files of `data.path`.

    Raises:
        InputError: no file is found.
    """
    listing = list_files(cfg.path, suffixes=(".tar",))
    return WebDatasetSource(
        listing,
        id_column=cfg.columns.id,
        image_root=image_root_of(cfg.image_root, listing.local_root),
        max_image_bytes=cfg.max_image_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    """Byte offset of its content in the archive."""
    size_bytes: int
    is_plain: bool
    """Whether it is a regular file: not a link, device or sparse file."""


@dataclass(frozen=True, slots=True)
class _Row:
    key: str
    members: dict[str, _Member]
    """Members by extension, in lower case."""
    has_doubles: bool = False
    """Whether two members have the same extension."""


@dataclass(frozen=True, slots=True)
class _Index:
    rows: list[_Row]
    digest: str
    """SHA-256 of the names, sizes and times in all headers."""
    stamp: tuple[int, ...]


class WebDatasetSource:
    """Tar files as one input.

    Args:
        listing: the files.
        id_column, image_root: as in every source.
        max_image_bytes: at most one byte more than this is read of an image.
    """

    def __init__(
        self,
        listing: Listing,
        *,
        id_column: str | None,
        image_root: str | None,
        max_image_bytes: int,
    ) -> None:
        self.image_root = image_root
        self._listing = listing
        self._id_column = id_column
        self._max_image_bytes = max_image_bytes
        self._planned: dict[str, str] = {}
        self._last: tuple[str, _Index] | None = None

    @cached_property
    def schema(self) -> pa.Schema:
        """`__key__`, `image`, and the extensions in the first file that has rows.

        Raises:
            InputError: a file cannot be read, or no file has rows.
        """
        for name in self._listing.paths:
            rows = self._index(name).rows
            if rows:
                found = dict.fromkeys(extension for row in rows for extension in row.members)
                own = {"__key__": pa.string(), "image": _IMAGE}
                types = own | {e: _type_of(e) for e in found if e not in own}
                return pa.schema(list(types.items()))
        raise InputError(
            "data.path holds no WebDataset rows: no member has a name like 001.jpg",
            hint="each row is some members of one name with different endings",
        )

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the files by name, each with its number of rows by the tar headers.

        Raises:
            InputError: a file cannot be read, or is not a complete tar archive.
        """

        def about(name: str) -> InputFile:
            index = self._index(name)
            self._planned[name] = index.digest
            num_rows = len(index.rows)
            return InputFile(
                name=name, num_rows=num_rows, row_groups=(num_rows,), identity=index.digest
            )

        with ThreadPoolExecutor(_INDEX_THREADS) as threads:
            return list(threads.map(about, self._listing.paths))

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield every row of the shard; a row with a member that cannot be read as a failure."""
        rows = ShardRows(
            shard=shard, columns=columns, kept=kept, id_column=self._id_column, skip=skip
        )
        name = shard.source_file
        row = 0
        try:
            if name not in self._listing.paths:
                raise FileNotFoundError("no such file in the input")
            index = self._checked_index(name)
            with self._listing.fs.open(self._listing.paths[name], "rb") as file:
                for row in range(shard.num_rows):
                    if row in skip:
                        continue
                    found = index.rows[shard.first_row + row]
                    record = self._record(rows, row, found, file)
                    if self._listing.stamp(name) != index.stamp:
                        index = self._checked_index(name)
                    yield record
            return
        # Each file system has its own errors.
        except Exception as error:
            message = str(error) if str(error) == HAS_CHANGED else described(error)
        yield from rows.failed(range(row, shard.num_rows), f"{name}: {message}")

    def _record(self, rows: ShardRows, row: int, found: _Row, file: BinaryIO) -> Record:
        message = ""
        read: dict[str, Any] = {"__key__": found.key}
        if not is_text(found.key):
            message = "the key is not UTF-8"
        elif found.has_doubles:
            message = "two members have the same name"
        else:
            try:
                for column in rows.columns_read:
                    if column != "__key__":
                        read[column] = self._value(column, found, file)
            except _BadMemberError as error:
                message = str(error)
        if message:
            (record,) = rows.failed([row], f"{rows.shard.source_file}: {message}")
            return record
        kept = {name: _stored(read.get(name)) for name in rows.kept}
        return rows.record(row, read, kept)

    def _value(self, column: str, found: _Row, file: BinaryIO) -> Any:
        extension: str | None = column
        if column == "image":
            extension = next((e for e in found.members if _is_image(e)), None)
        member = found.members.get(extension or "")
        if member is None or extension is None:
            return None
        if not member.is_plain:
            raise _BadMemberError(f"the member .{extension} is no plain file")
        if _is_image(extension):
            data = _read(file, member, self._max_image_bytes + 1)
            return {"bytes": data, "path": member.name if is_text(member.name) else None}
        if member.size_bytes > _MAX_TEXT_BYTES:
            raise _BadMemberError(f"the member .{extension} has {member.size_bytes} bytes")
        data = _read(file, member, member.size_bytes)
        if _type_of(extension) != pa.string():
            return data
        try:
            text = data.decode("utf-8-sig")
            if not _is_json(extension):
                return text
            value = json.loads(text)
            if not is_too_deep(value):
                json.dumps(value, ensure_ascii=False).encode()
                return value
        except (ValueError, RecursionError) as error:
            kind = "JSON" if _is_json(extension) else "UTF-8"
            raise _BadMemberError(f"the member .{extension} is no {kind}") from error
        raise _BadMemberError(
            f"the member .{extension} is nested too deeply, on more than {MAX_DEPTH} levels"
        )

    def _checked_index(self, name: str) -> _Index:
        """Return the index of a file after checking that it is still that of the plan.

        Raises:
            ValueError: the file has changed.
        """
        if self._last is None or self._last[0] != name:
            self._last = None  # only one index in memory at a time
            self._last = name, self._index(name)
        index = self._last[1]
        if index.stamp != self._listing.stamp(name):
            index = self._index(name)
            self._last = name, index
        if index.digest != self._planned.setdefault(name, index.digest):
            raise ValueError(HAS_CHANGED)
        return index

    def _index(self, name: str) -> _Index:
        try:
            stamp = self._listing.stamp(name)
            with self._listing.fs.open(self._listing.paths[name], "rb") as file:
                rows, digest = _scan(file)
        except Exception as error:  # tarfile raises many types for a damaged archive
            raise InputError(
                f"data.path: {name} is no whole tar archive: {described(error)}",
                hint="fetch or write that file again; compressed ones have to be unpacked to .tar",
            ) from error
        return _Index(rows, digest, stamp)


class _BadMemberError(ValueError):
    """A row cannot be read; the message is one line."""


class _Headers:
    """A file that refuses reads larger than a tar header may be."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _scan(file: BinaryIO) -> tuple[list[_Row], str]:
    """Return the rows of an archive and a digest, from its headers alone."""
    digest = hashlib.sha256()
    rows: list[_Row] = []
    members: dict[str, _Member] = {}
    key: str | None = None
    has_doubles = False
    end = 0
    reader: Any = _Headers(file)
    with tarfile.open(fileobj=reader, mode="r:") as archive:
        while (found := archive.next()) is not None:
            # A malformed header can have a negative size and lead back to itself.
            if found.size < 0 or found.offset_data < end:
                raise tarfile.ReadError("members overlap")
            end = found.offset_data
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member
            name = found.name
            digest.update(f"{name}\0{found.size}\0{found.mtime}\0".encode("utf-8", "replace"))
            match = _NAME.fullmatch(name)
            if found.isdir() or match is None:
                continue
            if match[1] != key:
                if key is not None:
                    rows.append(_Row(key, members, has_doubles))
                key, members, has_doubles = match[1], {}, False
            extension = match[2].lower()
            has_doubles |= extension in members
            is_plain = found.isreg() and not found.issparse()
            members[extension] = _Member(name, found.offset_data, found.size, is_plain)
        # tarfile treats an unreadable header as the end of the archive.
        file.seek(archive.offset)
        while block := file.read(_BLOCK_BYTES):
            if block.strip(b"\0"):
                raise tarfile.ReadError(
                    f"no header at byte {archive.offset}, or data behind its end"
                )
    if key is not None:
        rows.append(_Row(key, members, has_doubles))
    return rows, digest.hexdigest()


def _read(file: BinaryIO, member: _Member, most: int) -> bytes:
    file.seek(member.offset)
    wanted = min(member.size_bytes, most)
    data = file.read(wanted)
    if len(data) < wanted:
        raise EOFError("the file ends within a member")
    return data


def _is_image(extension: str) -> bool:
    return f".{extension}".endswith(IMAGE_SUFFIXES)


def _is_json(extension: str) -> bool:
    return extension.rpartition(".")[2] == "json"


def _type_of(extension: str) -> pa.DataType:
    if _is_image(extension):
        return _IMAGE
    last = extension.rpartition(".")[2]
    return pa.string() if last in _TEXTS or last == "json" else pa.binary()


def _stored(value: Any) -> Any:
    """Return a value as its column stores it: JSON as text."""
    is_image = isinstance(value, Mapping) and value.keys() == {"bytes", "path"}
    if value is None or is_image or isinstance(value, str | bytes):
        return value
    return json.dumps(value, ensure_ascii=False)
