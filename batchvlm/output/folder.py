"""Where everything of an output lies, and every call that touches the disk there.

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

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from batchvlm.errors import ConfigError, OutputError

logger = logging.getLogger(__name__)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PART = re.compile(r"part-(\d{5,})(?:-to-(\d{5,}))?-of-(\d{5,})\.parquet")
_SHARD_FOLDER = re.compile(r"shard-(\d{5,})")

_STALE_S = 24 * 3600.0
"""Nobody takes a day to write one file: an older one in `tmp` belongs to a dead attempt."""

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def new_attempt() -> str:
    """A name that no other writer has, on any machine; a later one sorts after an earlier one."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """One file of `data`: the rows of shards `first` to `last`, both included."""

    first: int
    last: int
    path: Path


class OutputFolder:
    """The output folder on a local (or mounted) file system.

    Args:
        root: `output.dir`; made when the first file is written.

    Raises:
        ConfigError: `root` is a URL.
    """

    def __init__(self, root: str | Path) -> None:
        if _URL.match(os.fspath(root)):
            raise ConfigError(
                f"output.dir={os.fspath(root)!r} is a URL",
                hint="name a local or mounted folder and copy it to the object store afterwards",
            )
        self.root = Path(root)
        self.data = self.root / "data"
        self.run_json = self.root / "_batchvlm" / "run.json"
        self.inner = self.root / "_batchvlm"
        self.metrics = self.inner / "metrics"
        self.tmp = self.inner / "tmp"
        self.segments = self.inner / "segments"
        self.retries = self.inner / "retries"
        self._claim: bytes | None = None
        self._claim_mark: tuple[int, int, int] | None = None

    def check_writable(self) -> None:
        """Look whether the folder is writable, or can be made, without touching it.

        Raises:
            ConfigError: it is a file, or belongs to somebody else.
        """
        path = self.root.absolute()
        while not os.path.lexists(path) and path.parent != path:
            path = path.parent
        code = 0 if path.is_dir() else errno.ENOTDIR
        if code or not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(
                f"output.dir={self.root} cannot be written: {os.strerror(code or errno.EACCES)}",
                hint="see to the folder, or name another output.dir",
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of what follows; a killed holder lets go.

        A file system without locks lets everybody in.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            make_folder(self.inner)
            fd = os.open(self.inner / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise output_error("write", self.inner / "lock", error) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise output_error("lock", self.inner / "lock", error) from error
            yield
        finally:
            os.close(fd)

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
            stat = self.run_json.stat()
            mark = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if mark == self._claim_mark:
                return
            text = self.run_json.read_bytes()
        except OSError as error:
            raise OutputError(
                f"{self.run_json} cannot be found any more: {error.strerror}",
                hint="see whether the folder was moved or its file system unmounted, "
                "and run the same command again",
            ) from error
        if text != self._claim:
            raise OutputError(
                f"{self.root} was given to another run meanwhile",
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
            return sorted(self.data.rglob("*.parquet"))
        except OSError as error:
            raise output_error("read", self.data, error) from error

    def finished_shards(self, num_shards: int) -> frozenset[int]:
        """Indices of the shards whose parts are there, by one listing.

        Raises:
            OutputError: a part belongs to a plan with another number of shards.
        """
        parts = self.parts(num_shards)
        return frozenset(index for part in parts for index in range(part.first, part.last + 1))

    def find_part(self, index: int, num_shards: int) -> Part | None:
        """The part that holds shard `index`, its own or a merged one."""
        own = self.part(index, num_shards)
        if self.exists(own):
            return Part(index, index, own)
        parts = self.parts(num_shards)
        return next((part for part in parts if part.first <= index <= part.last), None)

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
            return path.exists()
        except OSError as error:
            raise output_error("read", path, error) from error

    def open(self, path: Path) -> BinaryIO:
        """Open a committed file for reading. Raises OSError, for the caller knows what it means."""
        return path.open("rb")

    def read_bytes(self, path: Path) -> bytes | None:
        """The whole of a small file; None where there is none.

        Raises:
            OutputError: it is there and cannot be read.
        """
        try:
            return path.read_bytes()
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
        # A name of its own for every file: two attempts, or two ranks forked from one process,
        # may write the same part at the same time.
        aside = self.tmp / f"{new_attempt()}-{final.name}"
        self.check_claim()
        try:
            make_folder(self.tmp)
            try:
                with open(aside, "xb") as file:
                    write(file)
                    file.flush()
                    # A rename survives a killed process, not a lost node: without fsync the name
                    # can reach the disk before the bytes, and resume would trust it.
                    os.fsync(file.fileno())
                self.check_claim()
                is_ours = _publish(aside, final, replace=replace)
                sync_folder(final.parent)
            finally:
                with suppress(OSError):
                    aside.unlink(missing_ok=True)
        except OSError as error:
            raise output_error("write", final, error) from error
        return is_ours

    def append_line(self, path: Path, line: bytes) -> None:
        """Add a line to a file that only this process writes. A kill may tear it, no earlier one.

        Raises:
            OutputError: the file system refuses, or the folder is not this run's any more.
        """
        self.check_claim()
        try:
            make_folder(path.parent)
            with open(path, "ab", buffering=0) as file:
                file.write(line)
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
                sync_folder(self.data)
            for name in names:
                if only is None or folder / name in only:
                    (folder / name).unlink(missing_ok=True)
            folder.rmdir()

    def remove_leftovers(self, num_shards: int) -> None:
        """Remove what killed attempts left: segments of finished shards, files of a day ago."""
        finished = self.finished_shards(num_shards)
        for index in self.shards_with_segments():
            if index in finished:
                self.remove_segments(index)
        old = [self.inner / name for name in self._names(self.inner) if name[:8] == "compact-"]
        for path in [self.tmp / name for name in self._names(self.tmp)] + old:
            # Another attempt may be at work right now, so a young file is not ours to judge.
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                    logger.info("removed %s, left by an attempt that died", path)

    def _shard_folder(self, index: int, is_retry: bool) -> Path:
        return (self.retries if is_retry else self.segments) / f"shard-{index:05d}"

    def _names(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise output_error("read", folder, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each on disk before anything is put into it."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_folder(path.parent)


def _publish(aside: Path, final: Path, *, replace: bool) -> bool:
    make_folder(final.parent)
    try:
        return _move(aside, final, replace=replace)
    except FileNotFoundError:
        # Another writer of the shard finished it and removed the folder of its segments just now.
        make_folder(final.parent)
        return _move(aside, final, replace=replace)


def _move(aside: Path, final: Path, *, replace: bool) -> bool:
    if not replace:
        try:
            os.link(aside, final)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
        # Without hard links a second writer in this instant would win over the first; the caller
        # reads back what is there in the end.
        if final.exists():
            return False
    os.replace(aside, final)
    return True


def sync_folder(path: Path) -> None:
    """Bring a folder's entries to disk, which fsync of the files in it does not."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network and FUSE file systems know no fsync of folders.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)


def is_full(error: BaseException | None) -> bool:
    """Whether the disk, or a quota, had no room; also of what an `OutputError` was made from."""
    if isinstance(error, OutputError):
        error = error.__cause__
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def output_error(action: str, path: Path, error: OSError) -> OutputError:
    if is_full(error):
        hint = "make room and run the same command again: finished rows are kept"
    else:
        hint = "see to the folder, or name another output.dir"
    return OutputError(f"cannot {action} {path}: {error.strerror or error}", hint=hint)
