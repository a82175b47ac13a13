"""Read an output folder: its run, columns of its parts, and the counts of its processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.config import JobConfig
from batchvlm.errors import OutputError
from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import RunFile
from batchvlm.output.segments import column_statistics
from batchvlm.output.verify import open_run

T = TypeVar("T")
log = logging.getLogger(__name__)

_BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Output:
    """A folder that a run has written or is writing."""

    folder: OutputFolder
    run: RunFile
    parts: Sequence[Path]
    """The parts, in input order."""
    schema: pa.Schema
    """Schema of the parts, with `parsed` as text; empty if there is no part yet."""

    @property
    def num_planned(self) -> int:
        """Number of rows of the input."""
        return sum(shard.num_rows for shard in self.run.plan)

    @property
    def model(self) -> str:
        return str(self.run.layout.get("model.name", "unknown"))

    def batches(
        self,
        columns: Sequence[str],
        *,
        wants_group: Callable[[int, int], bool] = lambda low, high: True,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of every part in input order, in batches of bounded size.

        Typed answers in `parsed` are converted to JSON text.

        Args:
            columns: columns to read; those that the parts lack are left out.
            wants_group: called with the lowest and highest `row_index` of a row group; returns
                whether to read it.

        Raises:
            OutputError: a part cannot be read.
        """
        present = [name for name in columns if name in self.schema.names]
        for path in self.parts:
            try:
                with self.folder.open(path) as file:
                    parquet = pq.ParquetFile(file, page_checksum_verification=True)
                    groups = [
                        group
                        for group in range(parquet.num_row_groups)
                        if wants_group(*_row_range(parquet.metadata.row_group(group)))
                    ]
                    batches = parquet.iter_batches(
                        batch_size=_BATCH_ROWS, row_groups=groups, columns=present
                    )
                    yield from map(_with_parsed_as_text, batches)
            except (OSError, pa.ArrowException) as error:
                raise self.folder.damaged(path, error) from error


def open_output(root: str | Path) -> Output:
    """Open the folder that `output.dir` named.

    Raises:
        InputError: the folder holds no run.
        ConfigError: run.json is of another program or of a newer release.
        OutputError: the folder cannot be read, or holds a part of another plan.
    """
    folder = OutputFolder(root)
    run = open_run(folder)
    parts = [part.path for part in folder.parts(len(run.plan))]
    schema = pa.schema([])
    if parts:
        try:
            with folder.open(parts[0]) as file:
                schema = pq.read_schema(file)
            if (place := schema.get_field_index("parsed")) >= 0:
                schema = schema.set(place, pa.field("parsed", pa.string()))
        except (OSError, pa.ArrowException) as error:
            raise folder.damaged(parts[0], error) from error
    return Output(folder=folder, run=run, parts=parts, schema=schema)


def _with_parsed_as_text(batch: pa.RecordBatch) -> pa.RecordBatch:
    place = batch.schema.get_field_index("parsed")
    if place < 0 or pa.types.is_string(batch.schema.field(place).type):
        return batch
    texts = [
        None if value is None else json.dumps(value, ensure_ascii=False, default=str)
        for value in batch.column(place).to_pylist()
    ]
    return batch.set_column(place, "parsed", pa.array(texts, pa.string()))


def _row_range(group: Any) -> tuple[int, int]:
    stats = column_statistics(group, "row_index")
    return (stats.min, stats.max) if stats is not None and stats.has_min_max else (0, 1 << 62)


def job_config(run: RunFile) -> JobConfig:
    """Return the job's settings; those that its release lacked have this release's defaults."""
    return _build(JobConfig, run.settings)


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    hints = get_type_hints(cls)
    kwargs: dict[str, Any] = {}
    assert is_dataclass(cls)
    for item in fields(cls):
        factory = item.default_factory
        if item.name not in values:
            continue
        value = values[item.name]
        kind = hints[item.name]
        if factory is not MISSING and is_dataclass(factory):
            value = _build(kind, value if isinstance(value, dict) else {})
        elif isinstance(kind, type) and issubclass(kind, Enum):
            value = kind(value)
        kwargs[item.name] = value
    return cls(**kwargs)


@dataclass(frozen=True, kw_only=True)
class Process:
    """The counts of one process of the job."""

    name: str
    num_rows: int
    completion_tokens: int
    start_s: float
    wait_s: float
    run_s: float
    engine: Mapping[str, Any] = field(default_factory=dict)


def read_processes(folder: OutputFolder) -> list[Process]:
    """Return the counts of every process, sorted by name.

    A killed process has those of the last line of its time line.
    """
    found: dict[str, Mapping[str, Any]] = {}
    paths = [path for path, _ in folder.written(folder.metrics)]
    for path in paths:
        if path.suffix == ".jsonl" and (lines := read_lines(folder, path)):
            found[path.stem] = lines[-1]
    for path in paths:
        if path.suffix == ".json":
            try:
                counts = json.loads(folder.read_bytes(path) or b"")
            except (OutputError, ValueError):
                continue
            if isinstance(counts, dict):
                found[path.stem] = counts
    return [_process(name, counts) for name, counts in sorted(found.items())]


def read_lines(folder: OutputFolder, path: Path) -> list[Mapping[str, Any]]:
    """Return the lines of a time line, without incomplete ones."""
    lines: list[Mapping[str, Any]] = []
    try:
        for line in (folder.read_bytes(path) or b"").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("time_s"), int | float):
                lines.append(value)
    except OutputError as error:
        log.warning("%s", error)
    return lines


def number(counts: Mapping[str, Any], name: str) -> float:
    """Return a count; 0 if it is missing or not a number."""
    value = counts.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _process(name: str, counts: Mapping[str, Any]) -> Process:
    engine = counts.get("engine")
    return Process(
        name=name,
        num_rows=int(number(counts, "num_rows")),
        completion_tokens=int(number(counts, "completion_tokens")),
        start_s=number(counts, "start_s"),
        wait_s=number(counts, "wait_s"),
        run_s=number(counts, "run_s"),
        engine=engine if isinstance(engine, dict) else {},
    )
