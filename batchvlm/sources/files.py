"""Finding the files of an input: one file, a folder or a glob, on a disk or behind a URL."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from batchvlm.errors import InputError
from batchvlm.sources.rows import one_line

HAS_CHANGED = "the file has changed since the plan was made"
_TABLE_LOGS = {
    "Delta": re.compile(r"(^|/)_delta_log/"),
    "Hudi": re.compile(r"(^|/)\.hoodie/"),
    "Iceberg": re.compile(r"(^|/)metadata/[^/]*\.metadata\.json$"),
}
"""By what a folder tells that it is a table of which some files do not count any more."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of an input and where they are."""

    fs: Any
    """The fsspec file system."""
    root: str
    """The folder that the names are relative to, as `fs` takes it."""
    paths: Mapping[str, str]
    """Name relative to `root` -> path as `fs` takes it, in the input's order."""

    def stamp(self, name: str) -> tuple[int, ...]:
        """What changes when a local file is written or replaced; nothing for a remote one.

        Raises:
            OSError: the file is not there any more.
        """
        if not isinstance(self.fs, LocalFileSystem):
            return ()
        found = os.stat(self.paths[name])
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    @property
    def local_root(self) -> str | None:
        """The root where it is a folder on this machine."""
        return self.root if isinstance(self.fs, LocalFileSystem) else None


def list_files(path: str, *, suffixes: tuple[str, ...]) -> Listing:
    """List what `data.path` names, sorted by name.

    Args:
        path: a file, a folder (with its subfolders, not those behind links), a glob, or a URL of
            one of them.
        suffixes: endings, in lower case, of the files that count in a folder.

    Raises:
        InputError: nothing is there, the place cannot be reached, or the folder is a table with a
            log of its own.
    """
    try:
        fs, place = url_to_fs(path)
        if fs.isfile(place):
            return listing_of(fs, [place])
        if fs.isdir(place):
            root = place
            # Writers leave `_SUCCESS`, `_metadata` and hidden half-written files beside the data.
            listed = fs.find(place)
            _refuse_table(path, [posixpath.relpath(p, root) for p in listed])
            found = [p for p in listed if p.lower().endswith(suffixes)]
        elif "*" in place or "?" in place or "[" in place:
            root = _fixed_prefix(place)
            # A linked file has type "link".
            found = [p for p, i in fs.glob(place, detail=True).items() if i["type"] != "directory"]
        else:
            raise InputError(
                f"data.path: no such file or folder: {path}",
                hint="check the spelling; relative paths start at the folder you run from",
            )
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"data.path: {path} needs a package that is not installed: {one_line(error)}",
            hint="install it with pip",
        ) from error
    except Exception as error:  # every file system raises errors of its own
        raise InputError(
            f"data.path: cannot list {path}: {one_line(error)}",
            hint="check the address, the credentials and the permissions",
        ) from error
    names = {posixpath.relpath(p, root) if root else p: p for p in found}
    shown = sorted(n for n in names if not _is_hidden(n))
    if not shown:
        raise InputError(
            f"data.path: no {' or '.join('*' + s for s in suffixes)} file in {path}",
            hint="names that begin with '.' or '_' are left out",
        )
    return Listing(fs=fs, root=root, paths=_checked({name: names[name] for name in shown}))


def listing_of(fs: Any, paths: list[str]) -> Listing:
    """The listing of files whose paths are known already, in their order."""
    root = posixpath.commonpath([posixpath.dirname(p) for p in paths])
    return Listing(
        fs=fs,
        root=root,
        paths=_checked({posixpath.relpath(p, root) if root else p: p for p in paths}),
    )


def image_root_of(setting: str | None, own_folder: str | None) -> str | None:
    """The folder for image paths: `data.image_root`, else the input's own folder.

    Raises:
        InputError: `data.image_root` is no folder.
    """
    root = setting if setting is not None else own_folder
    if root is None:
        return None
    root = os.path.abspath(os.path.expanduser(root))
    if setting is not None and not os.path.isdir(root):
        raise InputError(
            f"data.image_root: no such folder: {setting}",
            hint="name a folder of this machine that holds the images",
        )
    return root


def _refuse_table(path: str, names: list[str]) -> None:
    for kind, log in _TABLE_LOGS.items():
        if any(map(log.search, names)):
            raise InputError(
                f"data.path: {path} is a table of {kind}, among whose files are some that were "
                "replaced or deleted",
                hint="write the table's rows out as plain Parquet, or name its files by a glob to "
                "read them all",
            )


def _fixed_prefix(pattern: str) -> str:
    """The folder part of a glob before its first wildcard."""
    return posixpath.dirname(re.split(r"[*?\[]", pattern, maxsplit=1)[0])


def _is_hidden(name: str) -> bool:
    # `_day=3` is a partition of a table, as Spark sees it too.
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part)
        for part in name.split("/")
    )


def is_text(name: str) -> bool:
    """Whether a string can be stored: file names may hold bytes that are no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(paths: dict[str, str]) -> dict[str, str]:
    for name in paths:
        if not is_text(name):
            raise InputError(f"data.path: file name {name!a} is not UTF-8", hint="rename the file")
    return paths
