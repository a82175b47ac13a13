"""Read shards into records: one `Source` for each kind of input.

    files()       lists the input from metadata alone; `plan_shards` cuts it into shards
    read_shard()  yields each row of a shard exactly once, in order, readable or not

All sources share `files.py` (finding files), `cursor.py` (forward reading) and `rows.py` (making
records).
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Protocol

import pyarrow as pa

from batchvlm.config import DataConfig, SourceKind
from batchvlm.errors import InputError
from batchvlm.records import InputFile, Record, Shard

MAX_COLUMNS_NAMED = 30
"""Most column names in one error message."""
_TEMPLATES = ("task.prompt", "task.system", "task.answer_prefix")


class Source(Protocol):
    """An input that is planned as shards and read shard by shard."""

    @property
    def schema(self) -> pa.Schema:
        """All columns with their Arrow types."""

    @property
    def image_root(self) -> str | None:
        """Folder in which image paths are resolved and which they may not leave; None: no paths."""

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """Return the input's files in order.

        Args:
            columns: columns that prompts are made of; every file must have these.
            kept: columns that are copied to the output; null in the rows of a file without them.

        Raises:
            InputError: a file cannot be read, or lacks one of `columns`.
        """

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield each row of the shard once, in order; an unreadable one has a `failure`.

        Args:
            shard: a shard of this input, from `plan_shards`.
            columns: columns to put into `Record.values`.
            kept: columns to put into `Record.kept`, without loss.
            skip: offsets in the shard of rows to leave out.
        """


def open_source(cfg: DataConfig) -> Source:
    """Open the input that the settings name, reading metadata only.

    Raises:
        InputError: the input does not exist, or is not of the kind `data.source`.
    """
    match cfg.source:
        case SourceKind.parquet:
            from batchvlm.sources.parquet import open_parquet

            return open_parquet(cfg)
        case SourceKind.hf:
            # Imported only here: importing `datasets` takes seconds.
            from batchvlm.sources.hf import open_hf

            return open_hf(cfg)
        case SourceKind.folder:
            from batchvlm.sources.folder import open_folder

            return open_folder(cfg)
        case SourceKind.jsonl:
            from batchvlm.sources.jsonl import open_jsonl

            return open_jsonl(cfg)
        case SourceKind.openai:
            from batchvlm.sources.openai import open_openai

            return open_openai(cfg)
        case SourceKind.webdataset:
            from batchvlm.sources.webdataset import open_webdataset

            return open_webdataset(cfg)


def check_columns(schema: pa.Schema, needed: Mapping[str, str]) -> None:
    """Check that the input has every column that the settings name.

    Args:
        schema: the input's columns.
        needed: column name -> the setting that names it.

    Raises:
        InputError: a column is missing, or several columns have its name.
    """
    for column, setting in needed.items():
        num_matches = len(schema.get_all_field_indices(column))
        if num_matches > 1:
            raise InputError(
                f"{setting} names column {column!r}, of which the input has {num_matches}",
                hint="rename them in the input so that each name is unique",
            )
        if num_matches == 0:
            names = ", ".join(schema.names[:MAX_COLUMNS_NAMED]) or "none"
            if len(schema.names) > MAX_COLUMNS_NAMED:
                names += f" and {len(schema.names) - MAX_COLUMNS_NAMED} more"
            others = [name for name in schema.names if name not in needed]
            near = difflib.get_close_matches(column, others, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"set {setting} to one of them"
            if setting in _TEMPLATES and not near:
                hint = f"{setting} is a template: name one of them in it, or write plain text"
            if setting == "data.columns.image":
                hint += " or" if near else ", or"
                hint += f" {setting}=null if no column holds images"
            raise InputError(
                f"{setting} names column {column!r}, which the input does not have"
                f" (its columns: {names})",
                hint=hint,
            )
