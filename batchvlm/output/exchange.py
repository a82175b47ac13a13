"""One folder takes the place of `data`, in one step where the file system can."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import sys
from pathlib import Path

from batchvlm.output.disk import new_attempt, output_error, sync_folder
from batchvlm.output.folder import OutputFolder

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def exchange_data(folder: OutputFolder, aside: Path) -> None:
    """Let `aside` take the place of `data`; only under `folder.lock()`.

    What was `data` is at `aside` then.

    Raises:
        OSError: the file system refuses; `data` is as it was, or `restore_data` makes it so.
    """
    try:
        exchange(aside, folder.data)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        # Two steps with no `data` in between, which a reader is told; `restore_data` mends a kill.
        old = aside.with_name(f"{aside.name}.old")
        os.rename(folder.data, old)
        try:
            os.rename(aside, folder.data)
        except OSError:
            os.rename(old, folder.data)
            raise
        # Under this name it is nothing to restore.
        os.rename(old, aside)
    sync_folder(folder.root)
    sync_folder(folder.inner)


def exchange(first: Path, second: Path) -> None:
    """Let two folders change places in one step.

    Raises:
        OSError: EINVAL, ENOSYS or ENOTSUP where the system or the file system cannot.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = os.fsencode(first), os.fsencode(second)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(second))


def restore_data(folder: OutputFolder) -> None:
    """Put `data` back where a kill between the two steps of `exchange_data` left none.

    Raises:
        OutputError: the file system refuses.
    """
    if not folder.is_local:
        return
    try:
        if not any(folder.inner.glob("compact-*.old")):
            return
        # Whoever is at it right now holds the lock.
        with folder.lock():
            for old in sorted(folder.inner.glob("compact-*.old")):
                aside = old.with_suffix("")
                if folder.data.exists() and not aside.exists():
                    # Killed after both steps: nobody needs the old parts any more.
                    os.rename(old, aside)
                    continue
                if folder.data.exists():
                    # Between them. Then a late writer made `data` anew: its rows are in `old` too.
                    os.rename(folder.data, folder.inner / f"compact-{new_attempt()}")
                os.rename(old, folder.data)
                sync_folder(folder.root)
                logger.warning("%s: an interrupted compact was undone", folder.root)
    except OSError as error:
        raise output_error("restore", folder.data, error) from error
