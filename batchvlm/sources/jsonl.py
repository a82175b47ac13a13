"""Read JSON lines. Blank lines are not rows; a line that is not a JSON object is a failed row."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from array import array
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, BinaryIO

import pyarrow as pa
from fsspec.compression import compr
from fsspec.utils import infer_compression

from batchvlm.config import DataConfig
from batchvlm.errors import InputError
from batchvlm.records import InputFile, Record, Shard
from batchvlm.sources.cursor import BrokenStreamError, Cursors
from batchvlm.sources.files import HAS_CHANGED, Listing, image_root_of, is_text, list_files
from batchvlm.sources.rows import MAX_DEPTH, ShardRows, is_too_deep
from batchvlm.words import described

SUFFIXES = tuple(f".{kind}{end}" for kind in ("jsonl", "ndjson") for end in ("", ".gz"))
CHUNK_BYTES = 1 << 20
"""Bytes of text read at once."""
ROWS_PER_MARK = 1024
"""Rows between two known byte offsets: a shard is read from the last one before its first row."""
CHUNK_ROWS = 64
"""Lines of a compressed file read at once."""
SCHEMA_ROWS = 1000
"""Number of rows from which the columns and their types are inferred."""
_ARRAY = re.compile(rb"\[\s*(\{|$)")
"""The start of a JSON array of objects, on one line or on many."""
BLANK = b" \t\r\n\xef\xbb\xbf"
"""White space and the UTF-8 byte order mark."""


def open_jsonl(cfg: DataConfig) -> JsonlSource:
    """Open the files of `data.path`.

    Raises:
        InputError: no file is found.
    """
    listing = list_files(cfg.path, suffixes=SUFFIXES)
    return JsonlSource(
        listing,
        id_column=cfg.columns.id,
        image_root=image_root_of(cfg.image_root, listing.local_root),
    )


class JsonlSource:
    """Files with a JSON object on each line, as one input.

    Values are as the line has them, even if the inferred type of their column is another one. A
    column of mixed or nested values has type string and is stored as JSON text.
    """

    def __init__(
        self, listing: Listing, *, id_column: str | None, image_root: str | None = None
    ) -> None:
        self.image_root = image_root
        self._listing = listing
        self._id_column = id_column
        self._lines: dict[str, _Lines] = {}
        self._changed: dict[str, tuple[int, ...]] = {}
        self._cursors = Cursors(self._chunks)

    @cached_property
    def schema(self) -> pa.Schema:
        """The keys of the first 1,000 rows; a key that first appears later is not a column.

        Raises:
            InputError: a file cannot be read, holds JSON of another form, or all are empty.
        """
        kinds: dict[str, set[str]] = {}
        lines = chain.from_iterable(map(self._all_lines, self._listing.paths))
        start = b""
        num_lines = num_objects = 0
        try:
            for line in islice(lines, SCHEMA_ROWS):
                row, message = parse(line)
                start = start or line.strip(BLANK)[:80]
                num_lines += 1
                num_objects += not message
                for key, value in row.items():
                    if is_text(key):
                        kinds.setdefault(key, set()).update(_kind(value))
        except Exception as error:  # each file system and compression has its own errors
            raise _unreadable(self._listing.root, error) from error
        if num_objects == 0 or _ARRAY.match(start):
            raise _not_json_lines(next(iter(self._listing.paths)), start, num_lines)
        return pa.schema([(key, _arrow_type(found)) for key, found in kinds.items()])

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the files by name, each scanned once for its number of rows and digest.

        A row without one of `columns` has null there.

        Raises:
            InputError: a file cannot be read.
        """
        lines = {name: self._scanned(name) for name in self._listing.paths}
        return [
            InputFile(
                name=name,
                num_rows=found.num_rows,
                row_groups=(found.num_rows,),
                identity=found.digest,
            )
            for name, found in lines.items()
        ]

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield every row of the shard; a line that is not a JSON object as a failure."""
        rows = ShardRows(
            shard=shard, columns=columns, kept=kept, id_column=self._id_column, skip=skip
        )
        row = 0
        message = "the file ends before this row"
        try:
            for line in self._read_lines(shard):
                if row not in skip:
                    yield self._to_record(rows, row, line)
                row += 1
        # Each file system and compression has its own errors.
        except Exception as error:
            message = str(error) if isinstance(error, BrokenStreamError) else described(error)
        yield from rows.failed(range(row, shard.num_rows), f"{shard.source_file}: {message}")

    def _to_record(self, rows: ShardRows, row: int, line: bytes) -> Record:
        read, message = parse(line)
        if not message:
            read = {name: read.get(name) for name in rows.columns_read}
            message = why_unusable(read, line)
        if message:
            return next(rows.failed([row], f"the line is no usable JSON object: {message}"))
        return rows.record(row, read)

    def _read_lines(self, shard: Shard) -> Iterator[bytes]:
        name = shard.source_file
        if name not in self._listing.paths:
            raise FileNotFoundError("no such file in the input")
        if infer_compression(name) is not None:
            chunks = self._cursors.read(name, shard.first_row, shard.num_rows)
            yield from chain.from_iterable(chunks)
            return
        mark, num_before = divmod(shard.first_row, ROWS_PER_MARK)
        marks = self._scanned(name).marks
        if mark < len(marks):
            with self._open(name) as file:
                file.seek(marks[mark])
                for line in islice(_rows(file), num_before, num_before + shard.num_rows):
                    self._check_unchanged(name)
                    yield line

    def _chunks(self, name: str) -> Iterator[list[bytes]]:
        lines = self._all_lines(name)
        while chunk := list(islice(lines, CHUNK_ROWS)):
            self._check_unchanged(name)
            yield chunk

    def _check_unchanged(self, name: str) -> None:
        """Check that the file still has the content of the plan.

        Raises:
            Exception: the file has changed or does not exist any more.
        """
        planned, stamp = self._scanned(name), self._listing.stamp(name)
        if stamp == planned.stamp:
            return
        if stamp != self._changed.get(name):
            with self._open(name) as file:
                # Lines appended after the planned ones are allowed.
                if _scan(file, planned.num_bytes).digest == planned.digest:
                    self._lines[name] = replace(planned, stamp=stamp)
                    return
            self._changed[name] = stamp
        raise ValueError(HAS_CHANGED)

    def _all_lines(self, name: str) -> Iterator[bytes]:
        with self._open(name) as file:
            yield from _rows(file)

    def _scanned(self, name: str) -> _Lines:
        if name not in self._lines:
            try:
                stamp = self._listing.stamp(name)
                with self._open(name) as file:
                    self._lines[name] = replace(_scan(file), stamp=stamp)
            except Exception as error:  # as above
                raise _unreadable(name, error) from error
        return self._lines[name]

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        with self._listing.fs.open(self._listing.paths[name], "rb") as stored:
            compression = infer_compression(name)
            text: Any = stored if compression is None else compr[compression](stored, mode="r")
            # fsspec's own readline copies a whole block for each line. Decompressors buffer
            # themselves, in pieces small enough to return the text before a damaged byte.
            is_buffered = isinstance(text, io.BufferedIOBase)
            with text if is_buffered else io.BufferedReader(text, CHUNK_BYTES) as file:
                yield file


def _not_json_lines(name: str, start: bytes, num_lines: int) -> InputError:
    if not num_lines:
        return InputError("data.path holds no rows: every line is empty")
    problem = f"none of its first {num_lines} lines is a JSON object"
    if _ARRAY.match(start):
        problem = "it holds a JSON array"
    return InputError(
        f"data.path: {name} is no JSON lines: {problem}",
        hint=f"write one object a line, as jq -c '.[]' {name} does of an array; data=hf reads CSV "
        "and JSON files",
    )


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(
        f"data.path: cannot read {name}: {described(error)}",
        hint="check that the file is whole and that you may read it",
    )


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """The result of one pass over a file."""

    num_rows: int
    marks: array[int]
    """Byte offset of every `ROWS_PER_MARK`-th row."""
    num_bytes: int
    """Length of the decompressed text."""
    digest: str
    """SHA-256 of the decompressed text."""
    stamp: tuple[int, ...] = ()
    """`Listing.stamp` when the pass began."""


def _scan(file: BinaryIO, max_bytes: int = sys.maxsize) -> _Lines:
    """Scan the first `max_bytes`, in memory that does not grow with the length of a line."""
    digest = hashlib.sha256()
    marks = array("q")
    num_rows = offset = line_start = 0
    has_text = False
    while piece := file.readline(min(CHUNK_BYTES, max_bytes - offset)):
        digest.update(piece)
        if not has_text and piece.strip(BLANK):
            has_text = True
            if num_rows % ROWS_PER_MARK == 0:
                marks.append(line_start)
            num_rows += 1
        offset += len(piece)
        if piece.endswith(b"\n"):
            line_start, has_text = offset, False
    return _Lines(num_rows=num_rows, marks=marks, num_bytes=offset, digest=digest.hexdigest())


def _rows(file: BinaryIO) -> Iterator[bytes]:
    return (line for line in file if line.strip(BLANK))


def why_unusable(read: Mapping[str, Any], line: bytes) -> str:
    """Return why the values read from a line cannot be used; "" if they can."""
    # Only lines with many brackets can be too deep, and few lines have as many.
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and is_too_deep(read):
        return f"a value is nested too deeply, on more than {MAX_DEPTH} levels"
    try:
        # JSON can escape a lone surrogate, which a string column cannot store.
        if b"\\u" in line:
            json.dumps(read, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "a string holds half a surrogate pair, which is no text"
    except (RecursionError, ValueError):
        return "the values are nested too deeply or too long"
    return ""


def parse(line: bytes) -> tuple[Mapping[str, Any], str]:
    """Return the object on a line and "", or {} and the reason, which never quotes the line."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return {}, f"{error.msg} at character {error.pos}"
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 at byte {error.start}"
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return {}, "a value is nested too deeply or too long"
    if not isinstance(value, dict):
        return {}, f"it holds a {type(value).__name__}"
    return value, ""


def _kind(value: Any) -> set[str]:
    """Return the kind of a value as a set; an empty set for null."""
    match value:
        case None:
            return set()
        case bool():
            return {"bool"}
        case int() if -(2**63) <= value < 2**63:
            return {"int64"}
        case float():
            return {"float64"}
        case str():
            return {"string"}
    return {"json"}


def _arrow_type(kinds: set[str]) -> pa.DataType:
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int64"}:
        return pa.int64()
    if kinds and kinds <= {"int64", "float64"}:
        return pa.float64()
    return pa.string()
