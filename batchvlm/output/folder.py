"""Where everything of an output lies, and every call that touches the disk there.

    data/part-00012-of-00480.parquet                      finished shards: the only data
    _batchvlm/run.json                                    settings, fingerprint, plan
    _batchvlm/segments/shard-00012/<attempt>-<seq>.parquet  finished rows of unfinished shards
    _batchvlm/metrics/                                    throughput, errors, waits
    _batchvlm/tmp/                                        files not yet complete

A file under its final name is complete and on disk. Whatever a kill leaves under `tmp` is read by
nobody.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from batchvlm.errors import ConfigError, OutputError

logger = logging.getLogger(__name__)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PART = re.compile(r"part-(\d{5,})-of-(\d{5,})\.parquet")
_SHARD_FOLDER = re.compile(r"shard-(\d{5,})")

_STALE_S = 24 * 3600.0
"""Nobody takes a day to write one file: an older one in `tmp` belongs to a dead attempt."""

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def new_attempt() -> str:
    """A name that no other writer has, on any machine; a later one sorts after an earlier one."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


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
        self.metrics = self.root / "_batchvlm" / "metrics"
        self.tmp = self.root / "_batchvlm" / "tmp"
        self._segments = self.root / "_batchvlm" / "segments"

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

    def part(self, index: int, num_shards: int) -> Path:
        """Where shard `index` lies once it is finished; names sort in the order of the input."""
        assert 0 <= index < num_shards
        width = max(5, len(str(num_shards)))
        return self.data / f"part-{index:0{width}}-of-{num_shards:0{width}}.parquet"

    def segment(self, index: int, attempt: str, seq: int) -> Path:
        """Where the `seq`-th segment of one attempt at shard `index` lies."""
        return self._shard_folder(index) / f"{attempt}-{seq:05d}.parquet"

    def has_foreign_data(self) -> bool:
        """Whether `data` holds Parquet files; only foreign ones can be there before a run."""
        return any(name.endswith(".parquet") for name in self._names(self.data))

    def finished_shards(self, num_shards: int) -> frozenset[int]:
        """Indices of the shards whose parts are there, by one listing.

        Raises:
            OutputError: a part belongs to a plan with another number of shards.
        """
        finished = set()
        for name in self._names(self.data):
            if match := _PART.fullmatch(name):
                index = int(match[1])
                if not (index < num_shards and name == self.part(index, num_shards).name):
                    raise OutputError(
                        f"{self.data / name} is not of this run, which has {num_shards} shards",
                        hint="move the file away: whoever reads the folder would read it too",
                    )
                finished.add(index)
        return frozenset(finished)

    def list_segments(self, index: int) -> list[Path]:
        """The segments of shard `index`, by name, hence the earliest attempt's first."""
        folder = self._shard_folder(index)
        return [folder / name for name in self._names(folder) if name.endswith(".parquet")]

    def exists(self, path: Path) -> bool:
        """Whether a file is there; committed files are complete."""
        try:
            return path.exists()
        except OSError as error:
            raise _output_error("read", path, error) from error

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
            raise _output_error("read", path, error) from error

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
        try:
            _make_folder(self.tmp)
            try:
                with open(aside, "xb") as file:
                    write(file)
                    file.flush()
                    # A rename survives a killed process, not a lost node: without fsync the name
                    # can reach the disk before the bytes, and resume would trust it.
                    os.fsync(file.fileno())
                is_ours = _publish(aside, final, replace=replace)
                _sync_folder(final.parent)
            finally:
                with suppress(OSError):
                    aside.unlink(missing_ok=True)
        except OSError as error:
            raise _output_error("write", final, error) from error
        return is_ours

    def remove_segments(self, index: int) -> None:
        """Remove the segments of a finished shard. Failing is harmless: the part outweighs them."""
        folder = self._shard_folder(index)
        with suppress(OSError, OutputError):
            if names := self._names(folder):
                # Whoever renamed the part may have died before its name reached the disk.
                _sync_folder(self.data)
            for name in names:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()

    def remove_leftovers(self, num_shards: int) -> None:
        """Remove what killed attempts left: segments of finished shards, files of a day ago."""
        finished = self.finished_shards(num_shards)
        for name in self._names(self._segments):
            if (match := _SHARD_FOLDER.fullmatch(name)) and int(match[1]) in finished:
                self.remove_segments(int(match[1]))
        for name in self._names(self.tmp):
            path = self.tmp / name
            # Another attempt may be at work right now, so a young file is not ours to judge.
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
                    logger.info("removed %s, left by an attempt that died", path)

    def _shard_folder(self, index: int) -> Path:
        return self._segments / f"shard-{index:05d}"

    def _names(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _output_error("read", folder, error) from error


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, each on disk before anything is put into it."""
    if path.is_dir():
        return
    if path.parent != path:
        _make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
    _sync_folder(path.parent)


def _publish(aside: Path, final: Path, *, replace: bool) -> bool:
    _make_folder(final.parent)
    try:
        return _move(aside, final, replace=replace)
    except FileNotFoundError:
        # Another writer of the shard finished it and removed the folder of its segments just now.
        _make_folder(final.parent)
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


def _sync_folder(path: Path) -> None:
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


def _output_error(action: str, path: Path, error: OSError) -> OutputError:
    if error.errno in _NO_SPACE:
        hint = "make room and run the same command again: finished rows are kept"
    else:
        hint = "see to the folder, or name another output.dir"
    return OutputError(f"cannot {action} {path}: {error.strerror or error}", hint=hint)
