"""The interface of storage for an output folder; `Disk` and `Bucket` implement it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, Protocol


class Files(Protocol):
    """File operations by path. Methods raise OSError unless their docstring says otherwise."""

    is_local: bool
    """Whether paths are those of a disk."""

    def address(self, path: Path) -> str:
        """Return the path or URL that other programs accept."""

    def check_writable(self, root: Path) -> None:
        """Raise ConfigError if `root` cannot be written; change nothing."""

    def lock(self, path: Path) -> AbstractContextManager[None]:
        """Exclude other processes, if the storage supports locks. Raises OutputError."""

    def names(self, folder: Path) -> list[str]:
        """Return the names in a folder, sorted; an empty list if it does not exist."""

    def below(self, folder: Path) -> list[tuple[Path, float]]:
        """Return every file below a folder, sorted, with its mtime in seconds since 1970."""

    def exists(self, path: Path) -> bool:
        """Whether a file exists."""

    def exist(self, paths: list[Path]) -> list[bool]:
        """Whether each of many files exists."""

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading; it is seekable."""

    def read_bytes(self, path: Path) -> bytes:
        """Return the content of a small file. Raises FileNotFoundError."""

    def mark(self, path: Path) -> tuple[object, ...]:
        """Return a value that changes whenever the file changes."""

    def commit(
        self,
        write: Callable[[BinaryIO], object],
        final: Path,
        *,
        replace: bool,
        check: Callable[[], None],
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> bool:
        """Write `final` completely or leave it as it was; see `OutputFolder.commit_file`.

        Args:
            check: called last before the file gets its name; if it raises, nothing is written.
            hold: context, such as a lock, that is entered from the last `check` until the file has
                its name.
        """

    def append(self, path: Path, line: bytes) -> None:
        """Append a line to a file that only this process writes."""

    def remove(self, path: Path) -> None:
        """Remove a file if it exists."""

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""

    def sync(self, folder: Path) -> None:
        """Flush a folder's entries to disk."""

    def remove_stale(self, paths: list[Path]) -> None:
        """Remove those of the files and folders that were not modified for a day."""
