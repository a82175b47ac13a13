"""An output folder on a local or mounted disk: file operations and atomic commits."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from batchvlm.errors import ConfigError, OutputError

log = logging.getLogger(__name__)

_STALE_S = 24 * 3600.0
"""Writing one file takes less than a day: an older file in `tmp` is of a killed process."""

NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def new_attempt() -> str:
    """Return a name that is unique across machines; names sort by the second they were made in."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


class Disk:
    """Files of an output folder on a disk; see `output.files.Files`.

    Args:
        tmp: folder in which files are written before they are moved to their final names.
    """

    is_local = True

    def __init__(self, tmp: Path) -> None:
        self._tmp = tmp

    def address(self, path: Path) -> str:
        return os.fspath(path)

    def check_writable(self, root: Path) -> None:
        path = root.absolute()
        while not os.path.lexists(path) and path.parent != path:
            path = path.parent
        code = 0 if path.is_dir() else errno.ENOTDIR
        if code or not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(
                f"output.dir={root} cannot be written: {os.strerror(code or errno.EACCES)}",
                hint="check the folder, or name another output.dir",
            )

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        try:
            make_folder(path.parent)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise output_error("write", path, error) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise output_error("lock", path, error) from error
            yield
        finally:
            os.close(fd)

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except OSError as error:
            _raise_unless_gone(error)
            return []

    def below(self, folder: Path) -> list[tuple[Path, float]]:
        found = []
        # Not rglob: before Python 3.13 it fails if a folder is removed during the walk.
        for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
            for path in (Path(parent, name) for name in names):
                with suppress(FileNotFoundError):
                    if path.is_file():
                        found.append((path, path.stat().st_mtime))
        return sorted(found)

    def exists(self, path: Path) -> bool:
        return path.exists()

    def exist(self, paths: list[Path]) -> list[bool]:
        return [path.exists() for path in paths]

    def open(self, path: Path) -> BinaryIO:
        return path.open("rb")

    def read_bytes(self, path: Path) -> bytes:
        return path.read_bytes()

    def mark(self, path: Path) -> tuple[object, ...]:
        stat = path.stat()
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def commit(
        self,
        write: Callable[[BinaryIO], object],
        final: Path,
        *,
        replace: bool,
        check: Callable[[], None],
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> bool:
        # A unique name: two attempts, or two ranks forked from one process, may write the same
        # part at the same time.
        aside = self._tmp / f"{new_attempt()}-{final.name}"
        check()
        make_folder(self._tmp)
        try:
            with open(aside, "xb") as file:
                write(file)
                file.flush()
                # A rename survives a killed process, not a lost node: without fsync the name
                # can reach the disk before the bytes, and resume would trust it.
                os.fsync(file.fileno())
            with hold():
                check()
                is_ours = _publish(aside, final, replace=replace)
                # Another writer of the shard may just have removed the folder of its segments.
                with suppress(FileNotFoundError):
                    sync_folder(final.parent)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        return is_ours

    def append(self, path: Path, line: bytes) -> None:
        make_folder(path.parent)
        with open(path, "ab", buffering=0) as file:
            file.write(line)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        path.rmdir()

    def sync(self, folder: Path) -> None:
        sync_folder(folder)

    def remove_stale(self, paths: list[Path]) -> None:
        for path in paths:
            # A younger file may belong to a process that is still writing it.
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                    log.info("removed %s, left by an attempt that died", path)


def _raise_unless_gone(error: OSError) -> None:
    if not is_gone(error):
        raise error


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and sync each parent so that its new entry is on disk."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def _publish(aside: Path, final: Path, *, replace: bool) -> bool:
    make_folder(final.parent)
    try:
        return _move(aside, final, replace=replace)
    except FileNotFoundError:
        # Another writer of the shard has just finished it and removed the folder of its segments.
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
            if error.errno not in NO_HARD_LINKS:
                raise
        # Without hard links, a second writer between these two calls replaces the first one's file;
        # the caller reads back which file is there in the end.
        if final.exists():
            return False
    os.replace(aside, final)
    return True


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk; fsync of the files in it does not do that."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network and FUSE file systems do not support fsync of folders.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(fd)


def is_gone(error: Exception) -> bool:
    """Whether a file or folder does not exist, or was removed or replaced while it was read.

    A network file system reports the latter if another machine did it.
    """
    is_stale = isinstance(error, OSError) and error.errno == errno.ESTALE
    return is_stale or isinstance(error, FileNotFoundError)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or the cause of an `OutputError`, is a full disk or an exceeded quota."""
    if isinstance(error, OutputError):
        error = error.__cause__
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def output_error(action: str, path: Path, error: OSError) -> OutputError:
    """Return `error` as an OutputError: "cannot `action` `path`", with a hint."""
    if is_full(error):
        hint = "make room and run the same command again: finished rows are kept"
    else:
        hint = "check the folder, or name another output.dir"
    return OutputError(f"cannot {action} {path}: {error.strerror or error}", hint=hint)
