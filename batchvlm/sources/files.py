"""Find the files of an input: one file, a folder or a glob, on a disk or behind a URL."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from batchvlm.errors import InputError
from batchvlm.words import described

HAS_CHANGED = "the file has changed since the plan was made"
_TABLE_LOGS = {
    "Delta": re.compile(r"(^|/)_delta_log/"),
    "Hudi": re.compile(r"(^|/)\.hoodie/"),
    "Iceberg": re.compile(r"(^|/)metadata/[^/]*\.metadata\.json$"),
}
"""Table formats whose folders also hold deleted or replaced files, by the files of their logs."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of an input and their paths."""

    fs: Any
    """The fsspec file system."""
    root: str
    """The folder that names are relative to, as a path of `fs`."""
    paths: Mapping[str, str]
    """Name relative to `root` -> path of `fs`, in input order."""

    def stamp(self, name: str) -> tuple[int, ...]:
        """Return a local file's inode, size and mtime; an empty tuple for a remote file.

        Raises:
            OSError: the file does not exist any more.
        """
        if not isinstance(self.fs, LocalFileSystem):
            return ()
        found = os.stat(self.paths[name])
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    @property
    def local_root(self) -> str | None:
        """The root if the files are on this machine, else None."""
        return self.root if isinstance(self.fs, LocalFileSystem) else None


def list_files(path: str, *, suffixes: tuple[str, ...]) -> Listing:
    """List the files of `data.path`, sorted by name.

    Args:
        path: a file, a folder (with its subfolders, but without following links), a glob, or a URL
            of one of them.
        suffixes: suffixes, in lower case, of the files to list in a folder.

    Raises:
        InputError: no file is found, the path cannot be reached, or the folder is a Delta, Hudi or
            Iceberg table.
    """
    try:
        fs, fs_path = url_to_fs(path)
        if fs.isfile(fs_path):
            return listing_of(fs, [fs_path])
        if fs.isdir(fs_path):
            root = fs_path
            # Writers leave `_SUCCESS`, `_metadata` and hidden incomplete files beside the data.
            listed = _walked(fs_path) if isinstance(fs, LocalFileSystem) else fs.find(fs_path)
            _refuse_table(path, [posixpath.relpath(p, root) for p in listed])
            found = [p for p in listed if p.lower().endswith(suffixes)]
        elif "*" in fs_path or "?" in fs_path or "[" in fs_path:
            root = _fixed_prefix(fs_path)
            # A linked file has type "link".
            found = [
                p for p, i in fs.glob(fs_path, detail=True).items() if i["type"] != "directory"
            ]
        else:
            hint = "check the spelling; relative paths start at the folder you run from"
            if re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}", path):
                hint = "braces are not expanded: name the folder, or a glob such as *.tar"
            raise InputError(f"data.path: no such file or folder: {path}", hint=hint)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"data.path: {path} needs a package that is not installed: {described(error)}",
            hint="install it with pip",
        ) from error
    except Exception as error:  # every file system raises errors of its own
        raise InputError(
            f"data.path: cannot list {path}: {described(error)}",
            hint="check the address, the credentials and the permissions",
        ) from error
    names = {posixpath.relpath(p, root) if root else p: p for p in found}
    shown = sorted(n for n in names if not is_hidden(n))
    if not shown:
        raise InputError(
            f"data.path: no {' or '.join('*' + s for s in suffixes)} file in {path}",
            hint="names that begin with '.' or '_' are left out, except _key=value folders",
        )
    return Listing(fs=fs, root=root, paths=_checked({name: names[name] for name in shown}))


def listing_of(fs: Any, paths: list[str]) -> Listing:
    """Return a listing of files whose paths are already known, in the given order."""
    root = posixpath.commonpath([posixpath.dirname(p) for p in paths])
    return Listing(
        fs=fs,
        root=root,
        paths=_checked({posixpath.relpath(p, root) if root else p: p for p in paths}),
    )


def image_root_of(setting: str | None, own_folder: str | None) -> str | None:
    """Return the folder for image paths: `data.image_root`, else the input's folder, else None.

    Raises:
        InputError: `data.image_root` is not a folder.
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


def walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder of this machine like `os.walk`, but refuse a subfolder that cannot be listed.

    Without it, its rows would be lost silently.

    Raises:
        InputError: a folder whose name is not hidden cannot be listed.
    """

    def refuse(error: OSError) -> None:
        if error.filename == root or not is_hidden(os.path.relpath(error.filename, root)):
            raise InputError(
                f"data.path: cannot list {error.filename}: {error.strerror}",
                hint="check the permissions",
            )

    return os.walk(root, onerror=refuse)


def _walked(root: str) -> list[str]:
    return [os.path.join(folder, name) for folder, _, names in walk(root) for name in names]


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
    """Return the folder part of a glob before its first wildcard."""
    return posixpath.dirname(re.split(r"[*?\[]", pattern, maxsplit=1)[0])


def is_hidden(name: str) -> bool:
    """Whether a file of a folder is left out, by its path relative to the folder."""
    # `_day=3` is a partition of a table and not hidden, as in Spark.
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part)
        for part in name.split("/")
    )


def is_text(name: str) -> bool:
    """Whether a string can be encoded as UTF-8, which a file name with other bytes cannot."""
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
