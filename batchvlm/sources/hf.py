"""Read Hugging Face datasets: from the hub, data files, or `save_to_disk`.

Everything is read as Arrow, in which images are still bytes or paths. Rows are identified by their
position in the split: resuming a streamed dataset from its `state_dict` repeats or loses rows.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
from datasets.packaged_modules.csv.csv import Csv
from fsspec.core import url_to_fs

from batchvlm.config import DataConfig
from batchvlm.errors import InputError
from batchvlm.records import InputFile, Record, Shard
from batchvlm.sources.cursor import BrokenStreamError, Cursors
from batchvlm.sources.files import image_root_of, listing_of
from batchvlm.sources.parquet import ParquetSource
from batchvlm.sources.rows import ShardRows
from batchvlm.words import described

CHUNK_ROWS = 32
"""Number of rows read at once."""
SAMPLED_BYTES = 1 << 16
"""Bytes at the start and at the end of a local data file that its identity includes."""

log = logging.getLogger(__name__)


def open_hf(cfg: DataConfig) -> DatasetSource | StreamSource | ParquetSource:
    """Open the split that the settings name.

    Raises:
        InputError: the dataset, subset or split does not exist or cannot be loaded.
    """
    with _quiet_datasets():
        try:
            folder = os.path.abspath(os.path.expanduser(cfg.path))
            if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
                return _open_saved(cfg, _split_folder(cfg, folder), cfg.split)
            if os.path.isfile(os.path.join(folder, "state.json")):
                return _open_saved(cfg, folder)
            return _open_builder(cfg, folder)
        except InputError:
            raise
        except Exception as error:  # the library and its many formats raise errors of their own
            raise InputError(
                f"data.path: cannot load dataset {cfg.path}: {described(error)}",
                hint="check data.path, data.subset, data.split and data.revision",
            ) from error


def _split_folder(cfg: DataConfig, folder: str) -> str:
    with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
        splits = json.load(file)["splits"]
    if cfg.split not in splits:
        raise _no_split(cfg, splits)
    return os.path.join(folder, cfg.split)


def _open_saved(cfg: DataConfig, folder: str, split: str | None = None) -> DatasetSource:
    _refuse_ineffective(cfg, ("subset", "revision", "streaming"), "a folder made by save_to_disk")
    with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
        state = json.load(file)
    name = state.get("_split") or split or DataConfig.split
    # A split that was saved alone is also read under the default name and its folder's name.
    if split is None and cfg.split not in (name, DataConfig.split, os.path.basename(folder)):
        raise _no_split(cfg, [name])
    if not state.get("_data_files", True):
        # The library writes no file for a split without rows, and then fails to load it.
        raise InputError(f"data.path={cfg.path} holds no rows")
    dataset = datasets.load_from_disk(folder)
    return DatasetSource(
        dataset,
        name=name,
        identity=_digest("saved", state["_fingerprint"], len(dataset), dataset.features),
        id_column=cfg.columns.id,
        image_root=image_root_of(cfg.image_root, os.path.abspath(os.path.expanduser(cfg.path))),
    )


def _open_builder(cfg: DataConfig, folder: str) -> DatasetSource | StreamSource | ParquetSource:
    file_name = None
    if os.path.isfile(folder):
        folder, file_name = os.path.split(folder)
    is_local = os.path.isdir(folder)
    if not is_local and cfg.path.startswith((".", "~", os.sep)):
        raise InputError(
            f"data.path: no such folder: {cfg.path}",
            hint="name a dataset of the hub, a folder of data files or one made by save_to_disk",
        )
    if is_local:
        _refuse_ineffective(
            cfg, ("revision",), f"a {'file' if file_name else 'folder'} of this machine"
        )

    def load(**options: Any) -> Any:
        return datasets.load_dataset_builder(
            folder if is_local else cfg.path,
            name=cfg.subset,
            revision=cfg.revision,
            data_files=file_name and glob.escape(file_name),
            **options,
        )

    builder = load()
    if cfg.columns.id and isinstance(builder, Csv):
        builder = load(converters={cfg.columns.id: _read_key})
    by_split = {str(k): list(v) for k, v in (builder.config.data_files or {}).items()}
    by_split = by_split or {str(name): [] for name in builder.info.splits or ()}
    # The library resolves slices such as "train[:100]".
    is_whole = cfg.split in by_split
    if not is_whole and (cfg.streaming or cfg.split.isidentifier()):
        raise _no_split(cfg, sorted(by_split))
    urls = by_split[cfg.split] if is_whole else [u for urls in by_split.values() for u in urls]
    own_folder = folder if is_local else _hub_folder(cfg.path)
    identity = [type(builder).__module__, builder.config.name, cfg.split, *_sources(urls)]
    if not cfg.streaming:
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=cfg.split)
        return DatasetSource(
            dataset,
            name=cfg.split,
            identity=_digest(*identity, len(dataset), dataset.features),
            id_column=cfg.columns.id,
            image_root=image_root_of(cfg.image_root, own_folder),
        )
    image_root = image_root_of(cfg.image_root, folder if is_local else None)
    if urls and all(url.endswith(".parquet") for url in urls):
        # Parquet metadata has exact row counts, and reading can start at any row group.
        places = [url_to_fs(url) for url in urls]
        return ParquetSource(
            listing_of(places[0][0], [path for _, path in places]),
            id_column=cfg.columns.id,
            image_root=image_root,
        )
    splits = builder.info.splits or {}
    return StreamSource(
        builder.as_streaming_dataset(split=cfg.split),
        name=cfg.split,
        identity=_digest(*identity),
        num_rows=splits[cfg.split].num_examples if cfg.split in splits else None,
        id_column=cfg.columns.id,
        image_root=image_root,
    )


def _read_key(text: str) -> str | None:
    """Keep a key of a CSV file as it is written: pandas would read 007 as 7."""
    return text or None


class DatasetSource:
    """A split on this machine's disk, with random access to rows."""

    def __init__(
        self,
        dataset: Any,
        *,
        name: str,
        identity: str,
        id_column: str | None,
        image_root: str | None,
    ) -> None:
        self.schema: pa.Schema = dataset.features.arrow_schema
        self.image_root = image_root
        self._dataset = dataset
        self._name = name
        self._identity = identity
        self._id_column = id_column

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the split as one file."""
        return [_input_file(self._name, len(self._dataset), self._identity)]

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield every row of the shard."""
        rows = ShardRows(
            shard=shard, columns=columns, kept=kept, id_column=self._id_column, skip=skip
        )
        names = [name for name in rows.columns_read if name in self.schema.names]
        table = self._dataset.select_columns(names or self.schema.names[:1]).with_format("arrow")
        for first in range(0, shard.num_rows, CHUNK_ROWS):
            wanted = rows.wanted(first, min(CHUNK_ROWS, shard.num_rows - first))
            start = shard.first_row + wanted.start
            message = f"{self._name} ends before this row"
            row = wanted.start
            try:
                chunk = table[start : start + len(wanted)] if wanted else []
            except Exception as error:  # a cache file was removed or overwritten
                chunk, message = [], f"{self._name}: {described(error)}"
            if len(chunk):
                yield from rows.from_arrow(chunk, row, self.schema)
                row += len(chunk)
            yield from rows.failed(range(row, wanted.stop), message)


class StreamSource:
    """A split that is streamed over the network from its first row to its last.

    Args:
        dataset: an `IterableDataset`.
        num_rows: number of rows by the split's metadata; None to count them when needed.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        name: str,
        identity: str,
        num_rows: int | None,
        id_column: str | None,
        image_root: str | None,
    ) -> None:
        self.image_root = image_root
        self._dataset = dataset.with_format("arrow")
        self._name = name
        self._identity = identity
        self._num_rows = num_rows or None
        self._id_column = id_column
        self._cursors = Cursors(self._chunks)

    @cached_property
    def schema(self) -> pa.Schema:
        """The split's features if it has some, else the columns of its first rows."""
        if self._dataset.features is not None:
            return self._dataset.features.arrow_schema
        first = next(self._chunks(()), None)
        return pa.schema([]) if first is None else first.schema

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the split as one file; count its rows if the metadata lacks their number.

        Raises:
            InputError: counting failed.
        """
        num_rows = self._num_rows if self._num_rows is not None else self._counted_rows
        return [_input_file(self._name, num_rows, _digest(self._identity, num_rows, self.schema))]

    @cached_property
    def _counted_rows(self) -> int:
        log.info("counting the rows of split %s once, by streaming it", self._name)
        try:
            names = sorted(self.schema.names, key=self._cost)
            return sum(len(chunk) for chunk in self._chunks(tuple(names[:1])))
        except Exception as error:  # each format raises errors of its own
            raise InputError(
                f"data.path: split {self._name} cannot be streamed: {described(error)}",
                hint="load it whole by data.streaming=false",
            ) from error

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield every row of the shard; if the stream fails, all later rows as failures."""
        rows = ShardRows(
            shard=shard, columns=columns, kept=kept, id_column=self._id_column, skip=skip
        )
        names = tuple(name for name in rows.columns_read if name in self.schema.names)
        wanted = rows.wanted(0, shard.num_rows)
        row = wanted.start
        message = "the stream ends before this row"
        try:
            for chunk in self._cursors.read(names, shard.first_row + row, len(wanted)):
                first, row = row, row + len(chunk)
                yield from rows.from_arrow(chunk, first, self.schema)
        except BrokenStreamError as error:
            message = f"the stream breaks before this row: {error}"
        yield from rows.failed(range(row, wanted.stop), f"{self._name}: {message}")
        if shard.first_row + row == self._num_rows and self._has_row(names, self._num_rows):
            log.warning(
                "split %s has more rows than the %d of its metadata; the others are left out"
                " (load it whole by data.streaming=false)",
                self._name,
                self._num_rows,
            )

    def _has_row(self, names: tuple[str, ...], row: int) -> bool:
        try:
            return next(self._cursors.read(names, row, 1), None) is not None
        except BrokenStreamError:
            return False

    def _chunks(self, names: tuple[str, ...]) -> Iterator[Any]:
        dataset = self._dataset.select_columns(list(names)) if names else self._dataset
        yield from dataset.iter(batch_size=CHUNK_ROWS)

    def _cost(self, name: str) -> int:
        """Return a rank of a column by the likely size of its values, the smallest first."""
        kind = self.schema.field(name).type
        if pa.types.is_primitive(kind):
            return 0
        return 1 if pa.types.is_string(kind) else 2


def _input_file(name: str, num_rows: int, identity: str) -> InputFile:
    return InputFile(name=name, num_rows=num_rows, row_groups=(num_rows,), identity=identity)


def _refuse_ineffective(cfg: DataConfig, settings: Sequence[str], what: str) -> None:
    for key in settings:
        if getattr(cfg, key):
            raise InputError(
                f"data.{key} has no effect: data.path={cfg.path} is {what}",
                hint=f"leave data.{key} out",
            )


def _no_split(cfg: DataConfig, splits: Sequence[str]) -> InputError:
    return InputError(
        f"data.split: dataset {cfg.path} has no split {cfg.split!r}",
        hint=f"its splits: {', '.join(splits) or 'none'}",
    )


def _hub_folder(name: str) -> str:
    """Return the folder of a dataset in the hub's cache, in which the paths of its images lie."""
    repository = name.removeprefix("hf://datasets/").replace("/", "--")
    return os.path.join(huggingface_hub.constants.HF_HUB_CACHE, f"datasets--{repository}")


def _sources(urls: Sequence[str]) -> Iterator[str]:
    """Yield a string for each data file that depends on its content, not on where it is stored.

    For a remote file this is the URL; a hub URL includes the commit. For a local file it is the
    path relative to the common folder, the size, and a digest of the start and the end. The folder
    and the modification time are left out because copying changes them.
    """
    local = [url for url in urls if os.path.isfile(url)]
    root = os.path.commonpath([os.path.dirname(path) for path in local]) if local else ""
    for url in urls:
        if not os.path.isfile(url):
            yield url
            continue
        with open(url, "rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.sha256(file.read(SAMPLED_BYTES))
            file.seek(max(0, size_bytes - SAMPLED_BYTES))
            digest.update(file.read(SAMPLED_BYTES))
        yield f"{os.path.relpath(url, root)}:{size_bytes}:{digest.hexdigest()}"


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Disable progress bars and warnings of the libraries; restore their settings at the end."""
    library = datasets.utils.logging
    verbosity = library.get_verbosity()
    bars = [
        module
        for module in (datasets.utils, huggingface_hub.utils)
        if not module.are_progress_bars_disabled()
    ]
    library.set_verbosity_error()
    for module in bars:
        module.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(verbosity)
        for module in bars:
            module.enable_progress_bars()
