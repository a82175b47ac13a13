"""Read a folder of images, one record for each file; preprocess reads the images themselves."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence

import pyarrow as pa

from batchvlm.config import DataConfig
from batchvlm.errors import ErrorType, InputError
from batchvlm.records import Failure, InputFile, Record, Shard
from batchvlm.sources import Source
from batchvlm.sources.files import image_root_of, is_text, walk
from batchvlm.sources.metadata import find_metadata
from batchvlm.words import counted, number_of

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".jpe", ".jfif", ".mpo", ".apng", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Usual suffixes of the formats that preprocess decodes."""
_UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".svg", ".ico", ".psd", ".tga", ".eps", ".jxr", ".exr", ".hdr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf"),
)
"""Suffixes of pictures that it does not decode."""

FOLDER_NAME = "."
"""Name of the input's only file, the folder; a record's `source_file` is the path of its image."""


def open_folder(cfg: DataConfig) -> Source:
    """Open the images below `data.path`, or the rows of the metadata files there.

    Raises:
        InputError: the folder does not exist, holds no image, or cannot be listed completely, or
            its metadata files cannot be used.
    """
    root = os.path.abspath(os.path.expanduser(cfg.path))
    if not os.path.isdir(root):
        raise InputError(
            f"data.path: no such folder: {cfg.path}",
            hint="data=folder takes a folder of images on this machine",
        )
    if (described := find_metadata(cfg, root)) is not None:
        return described
    unread: Counter[str] = Counter()
    images = sorted(_find_images(root, unread))
    if not images:
        raise InputError(
            f"data.path: no image in {cfg.path} (looked for {' '.join(IMAGE_SUFFIXES)})",
            hint="check the folder; names that begin with '.' are left out",
        )
    if unread:
        log.warning(
            "data.path: %s of %s are no rows, since their formats are not decoded: %s",
            number_of(unread.total(), "picture"),
            cfg.path,
            counted(unread),
        )
    return FolderSource(
        images,
        image_root=image_root_of(cfg.image_root, root),
        prefix="" if cfg.image_root is None else root,
    )


class FolderSource:
    """The images of a folder and its subfolders, sorted by relative path.

    Args:
        images: (relative path, size in bytes) of each.
        image_root: folder that the paths in `image` may not leave.
        prefix: folder to join before each path in `image`, if `image_root` is another folder.
    """

    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("file_name", pa.string()),
        ]
    )

    def __init__(
        self,
        images: list[tuple[str, int]],
        *,
        image_root: str | None,
        prefix: str = "",
    ) -> None:
        self.image_root = image_root
        self._images = images
        self._prefix = prefix

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the folder as one file, with a digest of the images' names and sizes."""
        digest = hashlib.sha256()
        for name, size_bytes in self._images:
            digest.update(os.fsencode(name) + b"\0%d\0" % size_bytes)
        num_rows = len(self._images)
        return [
            InputFile(
                name=FOLDER_NAME,
                num_rows=num_rows,
                row_groups=(num_rows,),
                identity=digest.hexdigest(),
            )
        ]

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield a record for each image, with its path as the key. No image is opened."""
        for row in range(shard.num_rows):
            if row in skip:
                continue
            message = ""
            place = shard.first_row + row
            name = self._images[place][0] if place < len(self._images) else ""
            if not name:
                message = "the folder has fewer images than planned"
            elif not is_text(name):
                # Neither the output nor JSON can store such a name.
                name = ascii(name)[1:-1]
                message = "the file name is not UTF-8"
            # Elsewhere "data:x.png" is a broken data: URI; here it is a file's name.
            prefix = self._prefix or (os.curdir if ":" in name else "")
            image = {"bytes": None, "path": os.path.join(prefix, name)}
            read = {"image": image, "file_name": name}
            yield Record(
                row=row,
                row_index=shard.first_row_index + row,
                source_file=name or shard.source_file,
                id=name or f"{shard.source_file}:{place}",
                values={} if message else {column: read.get(column) for column in columns},
                kept={} if message else {column: read.get(column) for column in kept},
                failure=Failure(error_type=ErrorType.INPUT, message=message) if message else None,
            )


def _find_images(root: str, unread: Counter[str]) -> Iterator[tuple[str, int]]:
    """Yield (path relative to `root`, size in bytes) of each image.

    Args:
        unread: counts pictures that are not decoded, by suffix.
    """
    for folder, subfolders, names in walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name.lower())[1]
            if name.startswith("."):
                continue
            if suffix in _UNREAD_SUFFIXES:
                unread[suffix] += 1
            elif suffix in IMAGE_SUFFIXES:
                path = os.path.join(folder, name)
                try:
                    size_bytes = os.stat(path).st_size
                except OSError:
                    size_bytes = 0  # a dangling link: its row fails when it is read
                yield os.path.relpath(path, root), size_bytes
