"""Check that an output holds every input row exactly once, from its folder alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.errors import ConfigError, InputError, OutputError
from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import RunFile, read_run
from batchvlm.output.segments import FINGERPRINT_KEY
from batchvlm.words import number_of, one_line

_COLUMNS = ["row_index", "status", "error_type", "fingerprint"]
_MAX_RANGES = 20
"""Most ranges of rows in one line."""
_MAX_FILES = 10
"""Most files in one line."""
_MAX_COUNTED = 255


def open_run(folder: OutputFolder) -> RunFile:
    """Return the run in a folder.

    Raises:
        InputError: the folder holds no run, or is a file.
        ConfigError: run.json is of another program or of a newer release.
        OutputError: run.json cannot be read or is damaged.
    """
    if folder.is_local and folder.root.is_file():
        raise InputError(
            f"{folder} is a file", hint="name the folder that output.dir named, no file in it"
        )
    try:
        run = read_run(folder)
    except (ConfigError, OutputError) as error:
        # Naming another output.dir helps a run that writes, not a command that reads this one.
        hint = error.hint.removesuffix("name another output.dir").removesuffix(", or ")
        raise type(error)(error.message, hint=hint) from error
    if run is None:
        raise InputError(
            f"{folder} is no output of batchvlm: it has no _batchvlm/run.json",
            hint="name the folder that output.dir named",
        )
    return run


@dataclass(kw_only=True)
class Verdict:
    """The outcome of `verify`."""

    num_rows: int
    """Rows of the input, by the plan."""
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """One line for each fault."""


def verify(folder: OutputFolder) -> Verdict:
    """Check that `data` holds every input row exactly once, readable and of this run.

    Memory: one byte for each input row.

    Raises:
        InputError: the folder holds no run.
        OutputError: the folder cannot be read.
    """
    run = open_run(folder)
    num_rows = sum(shard.num_rows for shard in run.plan)
    verdict = Verdict(num_rows=num_rows)
    seen = np.zeros(num_rows, np.uint8)
    foreign: list[npt.NDArray[np.int64]] = []
    readable = []
    for path in folder.data_files():
        try:
            rows = _read_part(folder, path, run, verdict)
        except (OSError, pa.ArrowException, OutputError) as error:
            verdict.faults.append(f"unreadable  {path.name}: {one_line(error)}")
            continue
        readable.append(path)
        is_ours = (rows >= 0) & (rows < num_rows)
        foreign.append(rows[~is_ours])
        # Not `seen[rows] += 1`, which counts a row only once that is in `rows` twice.
        places, counts = np.unique(rows[is_ours], return_counts=True)
        seen[places] = np.minimum(seen[places] + counts, _MAX_COUNTED)
    missing, repeated = np.flatnonzero(seen == 0), np.flatnonzero(seen > 1)
    outside = np.unique(np.concatenate([*foreign, np.empty(0, np.int64)]))
    unmerged = np.intersect1d(missing, _rows_in_segments(folder, run) if len(missing) else [])
    for word, found, more in (
        ("missing", np.setdiff1d(missing, unmerged), ""),
        ("unfinished", unmerged, "; they are in segments, the same command brings them into parts"),
        ("double", repeated, _name_files(folder, readable, repeated)),
        ("foreign", outside, _name_files(folder, readable, outside)),
    ):
        if len(found):
            verdict.faults.append(
                f"{word:<10}  {number_of(len(found), 'row')}: {ranges(found)}{more}"
            )
    return verdict


def _rows_in_segments(folder: OutputFolder, run: RunFile) -> npt.NDArray[np.int64]:
    """Return the indices of rows in readable segments of this run."""
    found = [np.empty(0, np.int64)]
    for index in folder.shards_with_segments():
        for path in folder.list_segments(index):
            # Skip a segment that is damaged or was just removed because its part was written.
            with suppress(OSError, pa.ArrowException), folder.open(path) as file:
                parquet = pq.ParquetFile(file)
                marks = parquet.schema_arrow.metadata or {}
                if marks.get(FINGERPRINT_KEY) == run.fingerprint.encode():
                    found.append(parquet.read(columns=["row_index"])["row_index"].to_numpy())
    return np.concatenate(found)


def _name_files(folder: OutputFolder, paths: Sequence[Path], rows: npt.NDArray[Any]) -> str:
    """Return "; in FILES" for the files that hold any of these rows; "" if none does."""
    names = []
    for path in paths if len(rows) else ():
        with suppress(OSError, pa.ArrowException), folder.open(path) as file:
            table = pq.ParquetFile(file).read(columns=["row_index"])
            if np.isin(table["row_index"].to_numpy(), rows).any():
                names.append(path.relative_to(folder.data).as_posix())
    shown = ", ".join(names[:_MAX_FILES])
    more = f" and {len(names) - _MAX_FILES:,} more files" if len(names) > _MAX_FILES else ""
    return f"; in {shown}{more}" if names else ""


def _read_part(
    folder: OutputFolder, path: Path, run: RunFile, verdict: Verdict
) -> npt.NDArray[np.int64]:
    wanted = run.fingerprint.encode()
    with folder.open(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        marks = parquet.schema_arrow.metadata or {}
        if marks.get(FINGERPRINT_KEY) != wanted:
            verdict.faults.append(f"fingerprint {path.name} is of another run")
        if missing := [name for name in _COLUMNS if name not in parquet.schema_arrow.names]:
            raise OutputError(f"it is no part of an output, for it has no column {missing[0]!r}")
        rows = []
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=_COLUMNS)
            verdict.statuses.update(table["status"].to_pylist())
            verdict.errors.update(kind for kind in table["error_type"].to_pylist() if kind)
            others = set(table["fingerprint"].unique().to_pylist()) - {run.fingerprint}
            if others:
                verdict.faults.append(
                    f"fingerprint {path.name} holds rows of {sorted(others, key=str)}"
                )
            rows.append(table["row_index"].to_numpy())
    return np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64)


def ranges(rows: Sequence[int] | npt.NDArray[Any]) -> str:
    """Return sorted row indices as ranges: `0-99, 250, 300-399`."""
    rows = np.asarray(rows)
    cuts = np.flatnonzero(np.diff(rows) > 1)
    starts, ends = rows[[0, *(cuts + 1)]], rows[[*cuts, len(rows) - 1]]
    shown = [
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(starts[:_MAX_RANGES], ends[:_MAX_RANGES], strict=True)
    ]
    more = len(starts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more ranges" if more else "")
