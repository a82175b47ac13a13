"""Replace the folder `data` by another one, in one step if the file system supports it."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from batchvlm.output.disk import new_attempt, output_error, sync_folder
from batchvlm.output.folder import OutputFolder

log = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def exchange_data(folder: OutputFolder, aside: Path) -> None:
    """Put `aside` in the place of `data`; the caller holds `folder.lock()`.

    The old `data` is moved to `replaced_path(aside)`, which `restore_data` deletes.

    Raises:
        OSError: the file system refuses; `data` is unchanged, or `restore_data` brings it back.
    """
    old = aside
    try:
        exchange(aside, folder.data)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        # Two renames, with no `data` between them. `restore_data` repairs the folder if the process
        # is killed there.
        old = aside.with_name(f"{aside.name}.old")
        os.rename(folder.data, old)
        try:
            os.rename(aside, folder.data)
        except OSError:
            os.rename(old, folder.data)
            raise
    sync_folder(folder.root)
    sync_folder(folder.inner)
    with suppress(OSError):
        os.rename(old, replaced_path(aside))


def replaced_path(aside: Path) -> Path:
    """Return the path for old parts that merged ones have replaced; any process may delete it.

    The suffix tells it from a folder that another `compact` is about to put in place of `data`.
    """
    return aside.with_name(f"{aside.name}.done")


def exchange(first: Path, second: Path) -> None:
    """Exchange two folders in one step, by renameat2.

    Raises:
        OSError: EINVAL, ENOSYS or ENOTSUP if the system or the file system does not support it.
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
    """Repair the folder after a process was killed in or after `exchange_data`.

    If `data` is missing because the process was killed between two renames, put the old `data`
    back. Delete the replaced parts that a killed process left.

    Raises:
        OutputError: the file system refuses.
    """
    if not folder.is_local:
        return
    try:
        if any(folder.inner.glob("compact-*.old")):
            _restore(folder)
        for done in folder.inner.glob("compact-*.done"):
            shutil.rmtree(done, ignore_errors=True)
    except OSError as error:
        raise output_error("restore", folder.data, error) from error


def _restore(folder: OutputFolder) -> None:
    # A live `compact` holds the lock.
    with folder.lock():
        for old in sorted(folder.inner.glob("compact-*.old")):
            aside = old.with_suffix("")
            if folder.data.exists() and not aside.exists():
                # Killed after both renames: the old parts are not needed any more.
                os.rename(old, replaced_path(aside))
                continue
            if folder.data.exists():
                # Killed between the renames, and a late writer then made `data` again: its rows
                # are in `old` too.
                os.rename(folder.data, folder.inner / f"compact-{new_attempt()}")
            os.rename(old, folder.data)
            sync_folder(folder.root)
            log.warning("%s: an interrupted compact was undone", folder.root)
