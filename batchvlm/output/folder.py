"""Where everything of an output lies; `disk.py` and `bucket.py` do what has to be done there.

    data/part-00012-of-00480.parquet                      finished shards: the only data
    data/part-00012-to-00047-of-00480.parquet             several of them, merged by `compact`
    _batchvlm/run.json                                    settings, fingerprint, plan
    _batchvlm/segments/shard-00012/<attempt>-<seq>.parquet  finished rows of unfinished shards
    _batchvlm/retries/shard-00012/<attempt>-<seq>.parquet   rows of finished shards, answered again
    _batchvlm/metrics/                                    throughput, errors, waits
    _batchvlm/lock                                        held where two files change as one
    _batchvlm/tmp/                                        files not yet complete

A file under its final name is complete and on disk. Whatever a kill leaves under `tmp` is read by
nobody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from batchvlm.errors import OutputError
from batchvlm.output.bucket import Bucket, is_url
from batchvlm.output.disk import Disk, output_error
from batchvlm.output.files import Files

_FILE_URL = re.compile(r"^file:/+")
_PART = re.compile(r"part-(\d{5,})(?:-to-(\d{5,}))?-of-(\d{5,})\.parquet")
_NAMES_PER_LISTING = 1000
"""Names that an object store lists in one request; looking at one of them is a request too."""
_SHARD_FOLDER = re.compile(r"shard-(\d{5,})")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One file of `data`: the rows of shards `first` to `last`, both included."""

    first: int
    last: int
    path: Path

    @property
    def shards(self) -> range:
        """Indices of its shards."""
        return range(self.first, self.last + 1)

    @property
    def mark(self) -> str:
        """How its footer names its shards: `12`, or `12-47` where several are merged."""
        return f"{self.first}" if len(self.shards) == 1 else f"{self.first}-{self.last}"


class _IsThere(Exception):
    """Another process was faster."""


class OutputFolder:
    """The output folder on a disk, or a prefix in an object store.

    Args:
        root: `output.dir`; made when the first file is written. A URL names an object store: paths
            of its files are names here, which only `bucket.py` turns into addresses.

    Raises:
        ConfigError: the URL holds a password, or its package is not installed.
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
        """Made before the first merged part: without it each part holds one shard."""
        self._files: Files = Bucket(root) if is_url(root) else Disk(self.tmp)
        self._was_compacted: bool | None = None
        self._claim: bytes | None = None
        self._claim_mark: tuple[object, ...] | None = None

    @property
    def is_local(self) -> bool:
        """Whether paths are those of a disk."""
        return self._files.is_local

    def address(self, path: Path) -> str:
        """A path as a person, or `datasets`, takes it."""
        return self._files.address(path)

    def __str__(self) -> str:
        """The folder as a person names it."""
        return self.address(self.root)

    def check_local(self, what: str) -> None:
        """Refuse what only a disk can do.

        Raises:
            OutputError: the output is in an object store.
        """
        if not self.is_local:
            raise OutputError(
                f"{self} is in an object store, where {what} is not possible",
                hint="copy the output to a disk first",
            )

    def check_writable(self) -> None:
        """Look whether the folder is writable, or can be made, without touching it.

        Raises:
            ConfigError: it is a file, or belongs to somebody else; a bucket that is not there.
        """
        self._files.check_writable(self.root)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of what follows; a killed holder lets go.

        A file system without locks, and an object store, let everybody in.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self._files.lock(self.inner / "lock"):
            yield

    def claim(self, run_json: bytes) -> None:
        """From here on write nothing unless `run.json` holds exactly this."""
        self._claim, self._claim_mark = run_json, None

    def check_claim(self) -> None:
        """Look whether the folder is still there and still of this run.

        Raises:
            OutputError: it was unmounted, moved away, or overwritten by another run.
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
        """Where shard `index` lies once it is finished; names sort in the order of the input.

        With `last`, where the merged shards `index` to `last` lie.
        """
        assert 0 <= index <= (index if last is None else last) < num_shards
        width = max(5, len(str(num_shards)))
        upto = "" if last in (None, index) else f"-to-{last:0{width}}"
        return self.data / f"part-{index:0{width}}{upto}-of-{num_shards:0{width}}.parquet"

    def segment(self, index: int, attempt: str, seq: int, *, is_retry: bool = False) -> Path:
        """Where the `seq`-th segment of one attempt at shard `index` lies."""
        return self._shard_folder(index, is_retry) / f"{attempt}-{seq:05d}.parquet"

    def has_foreign_data(self) -> bool:
        """Whether `data` holds Parquet files; only foreign ones can be there before a run."""
        return any(name.endswith(".parquet") for name in self._names(self.data))

    def parts(self, num_shards: int) -> list[Part]:
        """The parts that are there, in the order of the input, by one listing.

        Raises:
            OutputError: a part belongs to a plan with another number of shards.
        """
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
        """Every Parquet file below `data`, as readers of the whole folder find them."""
        try:
            found = [path for path, _ in self._files.below(self.data)]
        except OSError as error:
            raise output_error("read", self.data, error) from error
        return [path for path in found if path.suffix == ".parquet"]

    def written(self, folder: Path) -> list[tuple[Path, float]]:
        """Every file below one of the folders, and when it was written, in seconds since 1970.

        Raises:
            OutputError: the folder cannot be read.
        """
        try:
            return self._files.below(folder)
        except OSError as error:
            raise output_error("read", folder, error) from error

    def finished_shards(
        self, num_shards: int, among: Sequence[int] | None = None
    ) -> frozenset[int]:
        """Indices of the shards whose parts are there.

        Args:
            among: look at these alone; that is cheaper than a listing where they are few.

        Raises:
            OutputError: a part belongs to a plan with another number of shards.
        """
        if among is not None and len(among) < num_shards / _NAMES_PER_LISTING:
            paths = [self.part(index, num_shards) for index in among]
            try:
                if not self._has_merged():
                    there = self._files.exist(paths)
                    return frozenset(
                        i for i, is_there in zip(among, there, strict=True) if is_there
                    )
            except OSError as error:
                raise output_error("read", self.data, error) from error
        parts = self.parts(num_shards)
        return frozenset(index for part in parts for index in part.shards)

    def find_part(self, index: int, num_shards: int) -> Part | None:
        """The part that holds shard `index`, its own or a merged one."""
        own = self.part(index, num_shards)
        if self.exists(own):
            return Part(index, index, own)
        if not self._has_merged():
            # No listing: of 100,000 parts it would be one for each shard.
            return None
        parts = self.parts(num_shards)
        return next((part for part in parts if index in part.shards), None)

    def _has_merged(self) -> bool:
        # In an object store nothing is compacted, so once it was looked for it is not there.
        if self.is_local or self._was_compacted is None:
            self._was_compacted = self.exists(self.compacted)
        return self._was_compacted

    def list_segments(self, index: int, *, is_retry: bool = False) -> list[Path]:
        """The segments of shard `index`, by name, hence the earliest attempt's first."""
        folder = self._shard_folder(index, is_retry)
        return [folder / name for name in self._names(folder) if name.endswith(".parquet")]

    def shards_with_segments(self, *, is_retry: bool = False) -> list[int]:
        """Indices of the shards that have a folder of segments."""
        names = self._names(self.retries if is_retry else self.segments)
        return [int(match[1]) for name in names if (match := _SHARD_FOLDER.fullmatch(name))]

    def exists(self, path: Path) -> bool:
        """Whether a file is there; committed files are complete."""
        try:
            return self._files.exists(path)
        except OSError as error:
            raise output_error("read", path, error) from error

    def open(self, path: Path) -> BinaryIO:
        """Open a committed file for reading. Raises OSError, for the caller knows what it means."""
        return self._files.open(path)

    def read_bytes(self, path: Path) -> bytes | None:
        """The whole of a small file; None where there is none.

        Raises:
            OutputError: it is there and cannot be read.
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
        """Write a file such that it is there completely, whatever happens, or not at all.

        Args:
            write: gets the open file; may be as slow as it likes.
            final: the file's path, in this output folder.
            replace: what is there already gives way; if not, the first of several writers wins.

        Returns:
            Whether this file is now at `final`; only ever False where `replace` is.

        Raises:
            OutputError: the file system refuses. `final` is as it was, or complete.
        """
        try:
            return self._files.commit(write, final, replace=replace, check=self.check_claim)
        except OSError as error:
            raise output_error("write", final, error) from error

    def commit_part(self, write: Callable[[BinaryIO], object], index: int, num_shards: int) -> bool:
        """Write a shard's first part, unless a part with its rows is there by then.

        Returns:
            Whether it is this one that is there.

        Raises:
            OutputError: the file system refuses, or the folder is not this run's any more.
        """
        final = self.part(index, num_shards)

        def check() -> None:
            self.check_claim()
            if self.find_part(index, num_shards) is not None:
                raise _IsThere

        try:
            # Writing may take any time. Under the lock nothing is retried, compacted or overwritten
            # between the last look and the rename.
            return self._files.commit(write, final, replace=False, check=check, hold=self.lock)
        except _IsThere:
            return False
        except OSError as error:
            raise output_error("write", final, error) from error

    def append_line(self, path: Path, line: bytes) -> None:
        """Add a line to a file that only this process writes. A kill may tear it, no earlier one.

        Raises:
            OutputError: the file system refuses, or the folder is not this run's any more.
        """
        self.check_claim()
        try:
            self._files.append(path, line)
        except OSError as error:
            raise output_error("write", path, error) from error

    def remove_segments(
        self, index: int, *, is_retry: bool = False, only: Container[Path] | None = None
    ) -> None:
        """Remove the segments of a finished shard. Failing is harmless: the part outweighs them."""
        folder = self._shard_folder(index, is_retry)
        with suppress(OSError, OutputError):
            if names := self._names(folder):
                # Whoever renamed the part may have died before its name reached the disk.
                self._files.sync(self.data)
            for name in names:
                if only is None or folder / name in only:
                    self._files.remove(folder / name)
            self._files.remove_folder(folder)

    def remove_leftovers(self, num_shards: int) -> None:
        """Remove what killed attempts left: segments of finished shards, files of a day ago."""
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
