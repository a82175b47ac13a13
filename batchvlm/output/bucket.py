"""An output in an object store, by fsspec: `s3://bucket/prefix`, `gs://bucket/prefix`, ...

Each file is one object and is written by one request, so it exists completely or not at all. A
failed request leaves nothing behind. The store's client library finds the credentials in the
environment; this module never handles them.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from batchvlm.errors import ConfigError
from batchvlm.words import described

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_SECRET = re.compile(r"[^/@]*:[^/@]*@|.*[?#]")
_MAX_PUT_BYTES = 5 << 30
"""The most bytes that S3 accepts in one request. Only a larger part is uploaded in pieces; s3fs
aborts the upload if one of them fails."""
_NUM_LOOKS = 32
"""Concurrent requests when many objects are checked for existence."""
_BUFFER_BYTES = 1 << 20
# Retry through outages of about a minute: losing a part costs more than that.
_S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"mode": "standard", "max_attempts": 8},
    }
}


def is_url(root: str | Path) -> bool:
    """Whether `root` is a URL, so that the output is in an object store."""
    return _URL.match(os.fspath(root)) is not None


class Bucket:
    """Files of an output in an object store; see `output.files.Files`.

    Args:
        url: `output.dir`, as given or as text of a Path made of it (one slash after the colon).

    Raises:
        ConfigError: the URL contains a password or a query, or it is on the Hugging Face Hub, where
            every file is a commit.
    """

    is_local = False

    def __init__(self, url: str) -> None:
        match = _URL.match(url)
        assert match is not None, "is_url was asked"
        self._protocol = match[1].lower()
        if self._protocol == "hf":
            raise ConfigError(
                "output.dir is on the Hub: the Hub makes a commit of every file, and a run writes "
                "and removes hundreds",
                hint="write to a disk or a bucket, then `batchvlm export OUT --to hub REPO`",
            )
        rest = url[match.end() :]
        if _SECRET.match(rest):
            raise ConfigError(
                "output.dir is a URL with a password or a query",
                hint="leave credentials to the environment, as the store's own tools find them",
            )
        self._prefix = re.compile(re.escape(match[1]) + ":/+")
        self._lines: dict[Path, bytearray] = {}

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        options = _S3_OPTIONS if self._protocol in ("s3", "s3a") else {}
        try:
            return fsspec.filesystem(self._protocol, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"output.dir: {self._protocol}:// needs a package that is not installed: {error}",
                hint="pip install 'batchvlm[s3]' for s3://, 'batchvlm[gcs]' for gs://",
            ) from error

    def _key(self, path: Path) -> str:
        return self._prefix.sub("", os.fspath(path), count=1)

    def address(self, path: Path) -> str:
        return f"{self._protocol}://{self._key(path)}"

    def check_writable(self, root: Path) -> None:
        bucket = self._key(root).partition("/")[0]
        try:
            with _as_os_errors():
                is_there = self._fs.exists(bucket)
        except OSError as error:
            raise ConfigError(
                f"output.dir={self.address(root)} cannot be reached: {error.strerror or error}",
                hint="check the address, the credentials and the network",
            ) from error
        if not is_there and self._protocol != "memory":
            raise ConfigError(
                f"output.dir={self.address(root)}: there is no bucket {bucket!r}",
                hint="make it first, or name another",
            )

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        # An object store has no lock that is released when its holder is killed.
        yield

    def names(self, folder: Path) -> list[str]:
        try:
            with _as_os_errors():
                found = self._fs.ls(self._key(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def below(self, folder: Path) -> list[tuple[Path, float]]:
        with _as_os_errors():
            found = self._fs.find(self._key(folder), detail=True)
        start = len(self._key(folder)) + 1
        return [
            (folder / key.lstrip("/")[start:], _written_at(info))
            for key, info in sorted(found.items())
        ]

    def exists(self, path: Path) -> bool:
        with _as_os_errors():
            return bool(self._fs.exists(self._key(path)))

    def exist(self, paths: list[Path]) -> list[bool]:
        with ThreadPoolExecutor(_NUM_LOOKS) as pool:
            return list(pool.map(self.exists, paths))

    def open(self, path: Path) -> BinaryIO:
        with _as_os_errors():
            size = int(self._fs.size(self._key(path)))
        return io.BufferedReader(_Object(self._fs, self._key(path), size), _BUFFER_BYTES)

    def read_bytes(self, path: Path) -> bytes:
        with _as_os_errors():
            return bytes(self._fs.cat_file(self._key(path)))

    def mark(self, path: Path) -> tuple[object, ...]:
        with _as_os_errors():
            info = self._fs.info(self._key(path))
        return (info.get("ETag", info.get("etag")), info["size"], _written_at(info))

    def commit(
        self,
        write: Callable[[BinaryIO], object],
        final: Path,
        *,
        replace: bool,
        check: Callable[[], None],
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> bool:
        buffer = io.BytesIO()
        write(buffer)
        with hold():
            check()
            for path in [path for path in self._lines if path.parent == final.parent]:
                # Appended lines (a time line) are uploaded with the next file of their folder.
                self._put(path, bytes(self._lines[path]), replace=True)
            return self._put(final, buffer.getvalue(), replace=replace)

    def _put(self, path: Path, content: bytes, *, replace: bool) -> bool:
        options: dict[str, Any] = {} if replace else {"mode": "create"}
        if self._protocol in ("s3", "s3a"):
            options["chunksize"] = _MAX_PUT_BYTES // 2 + 1
        try:
            with _as_os_errors():
                self._fs.pipe_file(self._key(path), content, **options)
        except FileExistsError:
            return False
        return True

    def append(self, path: Path, line: bytes) -> None:
        self._lines.setdefault(path, bytearray()).extend(line)

    def remove(self, path: Path) -> None:
        try:
            with _as_os_errors():
                self._fs.rm_file(self._key(path))
        except FileNotFoundError:
            pass

    def remove_folder(self, path: Path) -> None:
        pass

    def sync(self, folder: Path) -> None:
        pass

    def remove_stale(self, paths: list[Path]) -> None:
        pass


class _Object(io.RawIOBase):
    """A read-only file on an object; each read is a range request."""

    def __init__(self, fs: Any, key: str, size: int) -> None:
        super().__init__()
        self._fs, self._key, self._size = fs, key, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        if end <= self._place:
            return 0
        with _as_os_errors():
            found = self._fs.cat_file(self._key, start=self._place, end=end)
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn the errors of any store into OSError, which `OutputFolder` handles.

    A failed precondition ("create only") becomes FileExistsError.
    """
    try:
        yield
    except (ConfigError, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        text = described(error)
        if "PreconditionFailed" in text or "pre-conditions" in text:
            raise FileExistsError(errno.EEXIST, text) from error
        raise OSError(errno.EIO, text) from error


def _written_at(info: dict[str, Any]) -> float:
    for name in ("LastModified", "mtime", "updated", "created"):
        match info.get(name):
            case datetime() as time:
                return time.timestamp()
            case str() as text:
                return datetime.fromisoformat(text).timestamp()
            case int() | float() as seconds:
                return float(seconds)
    return 0.0
