"""What an output folder needs of the place where it lies: a disk or an object store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, Protocol


class Files(Protocol):
    """Files by their paths. Whatever goes wrong is an OSError unless said otherwise."""

    is_local: bool

    def address(self, path: Path) -> str:
        """The path as other programs take it."""

    def check_writable(self, root: Path) -> None:
        """Raise a ConfigError where `root` cannot be written, without touching it."""

    def lock(self, path: Path) -> AbstractContextManager[None]:
        """Keep other processes out, where that can be had. Raises OutputError."""

    def names(self, folder: Path) -> list[str]:
        """Names in a folder, sorted; none where it is not there."""

    def below(self, folder: Path) -> list[tuple[Path, float]]:
        """Every file below a folder, sorted, and when it was written, in seconds since 1970."""

    def exists(self, path: Path) -> bool:
        """Whether a file is there."""

    def exist(self, paths: list[Path]) -> list[bool]:
        """Which of many files are there."""

    def open(self, path: Path) -> BinaryIO:
        """Open for reading, anywhere in the file."""

    def read_bytes(self, path: Path) -> bytes:
        """The whole of a small file. Raises FileNotFoundError."""

    def mark(self, path: Path) -> tuple[object, ...]:
        """What changes when the file does."""

    def commit(
        self,
        write: Callable[[BinaryIO], object],
        final: Path,
        *,
        replace: bool,
        check: Callable[[], None],
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> bool:
        """Let `final` be there completely, or as it was; see `OutputFolder.commit_file`.

        Args:
            check: called at the last moment; what it raises keeps the file from being there.
            hold: what to be in from the last check until the file is there: a lock.
        """

    def append(self, path: Path, line: bytes) -> None:
        """Add a line to a file that only this process writes."""

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""

    def sync(self, folder: Path) -> None:
        """Bring a folder's entries to disk."""

    def remove_stale(self, paths: list[Path]) -> None:
        """Remove those files and folders that nobody has written to for a day."""
