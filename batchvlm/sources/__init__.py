"""Shard -> records: one `Source` for each kind of input.

    files()       what there is, by metadata alone; `plan_shards` cuts it into shards
    read_shard()  the rows of one shard, in order, each exactly once, readable or not

Finding files is shared in `files.py`, forward reading in `cursor.py`, making records in `rows.py`.
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
"""Column names an error message lists at most."""


class Source(Protocol):
    """An input that is cut into shards and read shard by shard."""

    @property
    def schema(self) -> pa.Schema:
        """Every column there is, with its Arrow type, by metadata alone."""

    @property
    def image_root(self) -> str | None:
        """Folder that image paths are resolved in and may not leave; None: paths are refused."""

    def files(self, columns: Sequence[str] = (), kept: Sequence[str] = ()) -> list[InputFile]:
        """List the input in its order.

        Args:
            columns: what prompts are made of; every file must have these.
            kept: what is copied to the output; null in the rows of a file without it.

        Raises:
            InputError: a file cannot be planned, or lacks one of `columns`.
        """

    def read_shard(
        self,
        shard: Shard,
        columns: Sequence[str],
        *,
        kept: Sequence[str] = (),
        skip: Container[int] = (),
    ) -> Iterator[Record]:
        """Yield each row of the shard once, in order; an unreadable one with its `failure`.

        Args:
            shard: rows of this input, from `plan_shards`.
            columns: names of the columns that `Record.values` shall hold.
            kept: those that `Record.kept` shall hold, exactly as they are.
            skip: offsets in the shard that are left out.
        """


def open_source(cfg: DataConfig) -> Source:
    """Open the input that the settings name, reading no more than metadata.

    Raises:
        InputError: nothing is there, or it is not what `data.source` says.
    """
    match cfg.source:
        case SourceKind.parquet:
            from batchvlm.sources.parquet import open_parquet

            return open_parquet(cfg)
        case SourceKind.hf:
            # Importing `datasets` takes seconds that the other sources need not pay.
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
    """Refuse a job that names columns the input lacks.

    Args:
        schema: the columns there are.
        needed: column name -> the setting that names it.

    Raises:
        InputError: a column is missing, or its name stands for several columns.
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
            if setting in ("task.prompt", "task.system") and not near:
                hint = f"{setting} is a template: name one of them in it, or write plain text"
            if setting == "data.columns.image":
                hint += " or" if near else ", or"
                hint += f" {setting}=null if no column holds images"
            raise InputError(
                f"{setting} names column {column!r}, which the input does not have"
                f" (its columns: {names})",
                hint=hint,
            )
