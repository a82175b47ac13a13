"""The layout of an output folder; `disk.py` and `bucket.py` implement the file operations.

    data/part-00012-of-00480.parquet                      finished shards: the only data
    data/part-00012-to-00047-of-00480.parquet             several of them, merged by `compact`
    _batchvlm/run.json                                    settings, fingerprint, plan
    _batchvlm/segments/shard-00012/<attempt>-<seq>.parquet  finished rows of unfinished shards
    _batchvlm/retries/shard-00012/<attempt>-<seq>.parquet   rows of finished shards, answered again
    _batchvlm/metrics/                                    throughput, errors, waits
    _batchvlm/lock                                        held while several files change together
    _batchvlm/tmp/                                        incomplete files

A file under its final name is complete and on disk. Nothing reads what a killed process leaves
under `tmp`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from batchvlm.errors import OutputError
from batchvlm.output.bucket import Bucket, is_url
from batchvlm.output.disk import Disk, output_error
from batchvlm.output.files import Files
from batchvlm.words import one_line

_FILE_URL = re.compile(r"^file:/+")
_PART = re.compile(r"part-(\d{5,})(?:-to-(\d{5,}))?-of-(\d{5,})\.parquet")
_NAMES_PER_LISTING = 1000
"""Names that an object store lists in one request; checking a single name also costs a request."""
_SHARD_FOLDER = re.compile(r"shard-(\d{5,})")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One file of `data`: the rows of shards `first` to `last`, both included."""

    first: int
    last: int
    path: Path

    @property
    def shards(self) -> range:
        """Indices of the shards in the part."""
        return range(self.first, self.last + 1)

    @property
    def mark(self) -> str:
        """The shards as the file's footer names them: `12`, or `12-47` for a merged part."""
        return f"{self.first}" if len(self.shards) == 1 else f"{self.first}-{self.last}"


class _PartExists(Exception):
    """Another process has already written the part."""


class OutputFolder:
    """The output folder on a disk, or a prefix in an object store.

    Args:
        root: `output.dir`; created when the first file is written. For a URL of an object store,
            paths are plain names that only `bucket.py` turns into addresses.

    Raises:
        ConfigError: the URL contains a password or a query, or is on the Hugging Face Hub.
    """

    def __init__(self, root: str | Path) -> None:
        root = _FILE_URL.sub("/", os.fspath(root))
        self.root = Path(root)
        self.data = self.root / "data"
        self.run_json = self.root / "_batchvlm" / "run.json"
        self.inner = self.root / "_batchvlm"
        self.metrics = self.inner / "metrics"
        self.tmp = self.inner / "tmp"
        self.segments = self.inner / "segments"
        self.retries = self.inner / "retries"
        self.compacted = self.inner / "compacted"
        """Written before the first merged part: if it is absent, each part holds one shard."""
        self._files: Files = Bucket(root) if is_url(root) else Disk(self.tmp)
        self._was_compacted: bool | None = None
        self._claim: bytes | None = None
        self._claim_mark: tuple[object, ...] | None = None

    @property
    def is_local(self) -> bool:
        """Whether paths are those of a disk."""
        return self._files.is_local

    def address(self, path: Path) -> str:
        """Return the path or URL that people and other programs, such as `datasets`, use."""
        return self._files.address(path)

    def __str__(self) -> str:
        """Return the address of the folder."""
        return self.address(self.root)

    def damaged(self, part: Path, error: Exception) -> OutputError:
        """Return the error for a part that cannot be read."""
        return OutputError(
            f"{self.address(part)} cannot be read: {one_line(error)}",
            hint="if it is damaged, delete it and run the same command again: its rows are "
            "computed again",
        )

    def check_local(self, what: str) -> None:
        """Check that the output is on a disk, which `what` needs.

        Raises:
            OutputError: the output is in an object store.
        """
        if not self.is_local:
            raise OutputError(
                f"{self} is in an object store, where {what} is not possible",
                hint="copy the output to a disk first",
            )

    def check_writable(self) -> None:
        """Check that the folder is writable or can be created; change nothing.

        Raises:
            ConfigError: it is a file or not writable, or its bucket does not exist or cannot be
                reached.
        """
        self._files.check_writable(self.root)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's lock; it is released if the holder is killed.

        Without effect in an object store and on a file system without locks.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self._files.lock(self.inner / "lock"):
            yield

    def claim(self, run_json: bytes) -> None:
        """Make every later write check that `run.json` holds exactly `run_json`."""
        self._claim, self._claim_mark = run_json, None

    def check_claim(self) -> None:
        """Check that the folder still exists and still belongs to this run.

        Raises:
            OutputError: the folder was unmounted, moved, or overwritten by another run.
        """
        if self._claim is None:
            return
        try:
            mark = self._files.mark(self.run_json)
            if mark == self._claim_mark:
                return
            text = self._files.read_bytes(self.run_json)
        except OSError as error:
            raise OutputError(
                f"{self.address(self.run_json)} cannot be found any more: {error.strerror}",
                hint="see whether the folder was moved or its file system unmounted, "
                "and run the same command again",
            ) from error
        if text != self._claim:
            raise OutputError(
                f"{self} was given to another run meanwhile",
                hint="name another output.dir for one of the two",
            )
        self._claim_mark = mark

    def part(self, index: int, num_shards: int, last: int | None = None) -> Path:
        """Return the path of the part of shard `index`, or of merged shards `index` to `last`.

        Names sort in input order.
        """
        assert 0 <= index <= (index if last is None else last) < num_shards
        width = max(5, len(str(num_shards)))
        upto = "" if last in (None, index) else f"-to-{last:0{width}}"
        return self.data / f"part-{index:0{width}}{upto}-of-{num_shards:0{width}}.parquet"

    def segment(self, index: int, attempt: str, seq: int, *, is_retry: bool = False) -> Path:
        """Return the path of the `seq`-th segment of one attempt at shard `index`."""
        return self._shard_folder(index, is_retry) / f"{attempt}-{seq:05d}.parquet"

    def has_foreign_data(self) -> bool:
        """Whether `data` holds Parquet files; if the folder has no run, these are foreign."""
        return any(name.endswith(".parquet") for name in self._names(self.data))

    def parts(self, num_shards: int, among: Collection[int] | None = None) -> list[Part]:
        """Return the existing parts in input order.

        Args:
            among: the shards of interest. If they are few, the part of each is looked up by name;
                otherwise `data` is listed, and parts of other shards are returned too.

        Raises:
            OutputError: the folder cannot be read, or a part belongs to a plan with another number
                of shards.
        """
        is_few = among is not None and len(among) < num_shards / _NAMES_PER_LISTING
        if among is not None and is_few and not self._has_merged():
            paths = {index: self.part(index, num_shards) for index in sorted(among)}
            try:
                exist = self._files.exist(list(paths.values()))
            except OSError as error:
                raise output_error("read", self.data, error) from error
            found = zip(paths.items(), exist, strict=True)
            return [Part(index, index, path) for (index, path), is_there in found if is_there]
        parts = []
        for name in self._names(self.data):
            if match := _PART.fullmatch(name):
                first, last = int(match[1]), int(match[2] or match[1])
                is_ours = first <= last < num_shards
                if not (is_ours and name == self.part(first, num_shards, last).name):
                    raise OutputError(
                        f"{self.data / name} is not of this run, which has {num_shards} shards",
                        hint="move the file away: whoever reads the folder would read it too",
                    )
                parts.append(Part(first, last, self.data / name))
        return sorted(parts)

    def data_files(self) -> list[Path]:
        """Return every Parquet file below `data`, as readers of the folder find them.

        Raises:
            OutputError: the folder cannot be read.
        """
        try:
            found = [path for path, _ in self._files.below(self.data)]
        except OSError as error:
            raise output_error("read", self.data, error) from error
        return [path for path in found if path.suffix == ".parquet"]

    def written(self, folder: Path) -> list[tuple[Path, float]]:
        """Return every file below `folder`, with its mtime in seconds since 1970.

        Raises:
            OutputError: the folder cannot be read.
        """
        try:
            return self._files.below(folder)
        except OSError as error:
            raise output_error("read", folder, error) from error

    def finished_shards(
        self, num_shards: int, among: Collection[int] | None = None
    ) -> frozenset[int]:
        """Return the indices of the shards that are in parts; for `among`, see `parts`.

        Raises:
            OutputError: as for `parts`.
        """
        parts = self.parts(num_shards, among)
        return frozenset(index for part in parts for index in part.shards)

    def find_part(self, index: int, num_shards: int) -> Part | None:
        """Return the part that holds shard `index`, its own or a merged one; None if there is none.

        Raises:
            OutputError: the folder cannot be read, or a part belongs to a plan with another number
                of shards.
        """
        own = self.part(index, num_shards)
        if self.exists(own):
            return Part(index, index, own)
        if not self._has_merged():
            # No listing: there would be one for each shard, of up to 100,000 names.
            return None
        parts = self.parts(num_shards)
        return next((part for part in parts if index in part.shards), None)

    def _has_merged(self) -> bool:
        # In an object store nothing is compacted, so one check is enough.
        if self.is_local or self._was_compacted is None:
            self._was_compacted = self.exists(self.compacted)
        return self._was_compacted

    def list_segments(self, index: int, *, is_retry: bool = False) -> list[Path]:
        """Return the segments of shard `index`, sorted by name: the earliest attempt first."""
        folder = self._shard_folder(index, is_retry)
        return [folder / name for name in self._names(folder) if name.endswith(".parquet")]

    def shards_with_segments(self, *, is_retry: bool = False) -> list[int]:
        """Return the indices of the shards that have a folder of segments."""
        names = self._names(self.retries if is_retry else self.segments)
        return [int(match[1]) for name in names if (match := _SHARD_FOLDER.fullmatch(name))]

    def exists(self, path: Path) -> bool:
        """Whether a file exists; a committed file is complete.

        Raises:
            OutputError: the folder cannot be read.
        """
        try:
            return self._files.exists(path)
        except OSError as error:
            raise output_error("read", path, error) from error

    def open(self, path: Path) -> BinaryIO:
        """Open a committed file for reading. Raises OSError: callers differ in what it means."""
        return self._files.open(path)

    def read_bytes(self, path: Path) -> bytes | None:
        """Return the content of a small file; None if it does not exist.

        Raises:
            OutputError: the file exists and cannot be read.
        """
        try:
            return self._files.read_bytes(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise output_error("read", path, error) from error

    def commit_file(
        self, write: Callable[[BinaryIO], object], final: Path, *, replace: bool = True
    ) -> bool:
        """Write a file atomically: whatever happens, it is complete or not there at all.

        Args:
            write: is called with the open file; it may take any time.
            final: the file's path, in this output folder.
            replace: whether to replace an existing file; if not, the first of several writers wins.

        Returns:
            Whether this file is now at `final`; always True with `replace`.

        Raises:
            OutputError: the file system refuses, or the folder no longer belongs to this run.
                `final` is as it was, or complete.
        """
        try:
            return self._files.commit(write, final, replace=replace, check=self.check_claim)
        except OSError as error:
            raise output_error("write", final, error) from error

    def commit_part(self, write: Callable[[BinaryIO], object], index: int, num_shards: int) -> bool:
        """Write a shard's part, unless a part with its rows exists by then.

        Returns:
            Whether this part was written.

        Raises:
            OutputError: the file system refuses, or the folder no longer belongs to this run.
        """
        final = self.part(index, num_shards)

        def check() -> None:
            self.check_claim()
            if self.find_part(index, num_shards) is not None:
                raise _PartExists

        try:
            # Writing may take any time. The lock keeps retries, compact and overwrites out between
            # the last check and the rename.
            return self._files.commit(write, final, replace=False, check=check, hold=self.lock)
        except _PartExists:
            return False
        except OSError as error:
            raise output_error("write", final, error) from error

    def append_line(self, path: Path, line: bytes) -> None:
        """Append a line to a file that only this process writes.

        If the process is killed, this line may be incomplete; earlier lines are not affected.

        Raises:
            OutputError: the file system refuses, or the folder no longer belongs to this run.
        """
        self.check_claim()
        try:
            self._files.append(path, line)
        except OSError as error:
            raise output_error("write", path, error) from error

    def remove_segments(
        self, index: int, *, is_retry: bool = False, only: Container[Path] | None = None
    ) -> None:
        """Remove the segments of a finished shard, or those in `only`.

        Errors are ignored, because the part takes precedence over segments that stay.
        """
        folder = self._shard_folder(index, is_retry)
        with suppress(OSError, OutputError):
            if names := self._names(folder):
                # The process that renamed the part may have died before its name was on disk.
                self._files.sync(self.data)
            for name in names:
                if only is None or folder / name in only:
                    self._files.remove(folder / name)
            self._files.remove_folder(folder)

    def remove_leftovers(self, num_shards: int) -> None:
        """Remove what killed processes left: segments of finished shards, day-old temporary files.

        Raises:
            OutputError: the folder cannot be read.
        """
        for index in sorted(self.finished_shards(num_shards, self.shards_with_segments())):
            self.remove_segments(index)
        if self.is_local:
            old = [self.inner / name for name in self._names(self.inner) if name[:8] == "compact-"]
            self._files.remove_stale([self.tmp / name for name in self._names(self.tmp)] + old)

    def _shard_folder(self, index: int, is_retry: bool) -> Path:
        return (self.retries if is_retry else self.segments) / f"shard-{index:05d}"

    def _names(self, folder: Path) -> list[str]:
        try:
            return self._files.names(folder)
        except OSError as error:
            raise output_error("read", folder, error) from error
