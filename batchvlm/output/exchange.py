"""One folder takes the place of `data`, in one step where the file system can."""

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
    """Let `aside` take the place of `data`; only under `folder.lock()`.

    What was `data` is at `given_up(aside)` then, and `restore_data` deletes it.

    Raises:
        OSError: the file system refuses; `data` is as it was, or `restore_data` makes it so.
    """
    old = aside
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
    sync_folder(folder.root)
    sync_folder(folder.inner)
    with suppress(OSError):
        os.rename(old, given_up(aside))


def given_up(aside: Path) -> Path:
    """The name of a folder of old parts that merged ones have replaced: anybody may delete it.

    Without a name of its own it could be what another `compact` is about to put in place of `data`.
    """
    return aside.with_name(f"{aside.name}.done")


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

    And delete what a kill after them left.

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
    # Whoever is at it right now holds the lock.
    with folder.lock():
        for old in sorted(folder.inner.glob("compact-*.old")):
            aside = old.with_suffix("")
            if folder.data.exists() and not aside.exists():
                # Killed after both steps: nobody needs the old parts any more.
                os.rename(old, given_up(aside))
                continue
            if folder.data.exists():
                # Between them. Then a late writer made `data` anew: its rows are in `old` too.
                os.rename(folder.data, folder.inner / f"compact-{new_attempt()}")
            os.rename(old, folder.data)
            sync_folder(folder.root)
            log.warning("%s: an interrupted compact was undone", folder.root)
