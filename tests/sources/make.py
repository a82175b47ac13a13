"""Ways to read a source, and the check that every row comes out once."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.config import ColumnsConfig, DataConfig, SourceKind
from batchvlm.plan import plan_shards
from batchvlm.records import Record, Shard
from batchvlm.sources import Source, open_source


def open_path(kind: str, path: object, *, id_column: str | None = None, **settings: Any) -> Source:
    """The source of a path."""
    cfg = DataConfig(
        source=SourceKind[kind],
        path=str(path),
        columns=ColumnsConfig(id=id_column),
        **settings,
    )
    return open_source(cfg)


def plan(source: Source, rows_per_shard: int = 7, max_rows: int | None = None) -> list[Shard]:
    return plan_shards(source.files(), rows_per_shard=rows_per_shard, max_rows=max_rows)


def read_all(source: Source, columns: Sequence[str], rows_per_shard: int = 7) -> list[Record]:
    """Every record of the input, shard after shard."""
    return [
        record
        for shard in plan(source, rows_per_shard)
        for record in source.read_shard(shard, columns)
    ]


def numbers(records: Sequence[Record]) -> list[Any]:
    """The column `n` of the records."""
    return [r.values.get("n") for r in records]


def write_groups(path: Path, row_groups: list[int], first: int = 0, **options: Any) -> None:
    """A file of numbered rows in row groups of the given sizes."""
    schema = pa.schema([("n", pa.int64()), ("text", pa.string()), ("image", pa.binary())])
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, **options) as writer:
        for num_rows in row_groups:
            n = range(first, first + num_rows)
            first += num_rows
            columns = [list(n), [f"text {i}" for i in n], [bytes([i % 256]) * 50 for i in n]]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(1, num_rows))


def flip_page(path: Path, *, group: int, column: int = 2, share: float = 0.0) -> None:
    """Overwrite some bytes of a column chunk, `share` of the way into its data pages."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    start = chunk.data_page_offset
    end = (chunk.dictionary_page_offset or start) + chunk.total_compressed_size
    data = bytearray(path.read_bytes())
    place = start + int((end - start) * share)
    data[place : place + 12] = b"\xff" * 12
    path.write_bytes(data)


def check_positions(records: Sequence[Record], shard: Shard, skip: Container[int] = ()) -> None:
    """Each row of a shard that is not skipped is there once, in order, and knows its place."""
    wanted = [row for row in range(shard.num_rows) if row not in skip]
    assert [r.row for r in records] == wanted
    assert [r.row_index for r in records] == [shard.first_row_index + row for row in wanted]


def in_order(
    source: Source, shards: Sequence[Shard], columns: Sequence[str], seed: int
) -> dict[int, list[Record]]:
    return {s.index: list(source.read_shard(s, columns)) for s in shards}


def in_random_order(
    source: Source, shards: Sequence[Shard], columns: Sequence[str], seed: int
) -> dict[int, list[Record]]:
    shuffled = random.Random(seed).sample(shards, len(shards))
    return in_order(source, shuffled, columns, seed)


def every_third(
    source: Source, shards: Sequence[Shard], columns: Sequence[str], seed: int
) -> dict[int, list[Record]]:
    """As a worker does that shares the input with two others; then the others' turns."""
    return in_order(source, [s for k in range(3) for s in shards[k::3]], columns, seed)


def interleaved(
    source: Source, shards: Sequence[Shard], columns: Sequence[str], seed: int
) -> dict[int, list[Record]]:
    """All shards at once, a row of a random one at a time."""
    rng = random.Random(seed)
    found: dict[int, list[Record]] = {s.index: [] for s in shards}
    readers: list[tuple[int, Iterator[Record]]] = [
        (s.index, source.read_shard(s, columns)) for s in shards
    ]
    while readers:
        place = rng.randrange(len(readers))
        index, reader = readers[place]
        record = next(reader, None)
        if record is None:
            del readers[place]
        else:
            found[index].append(record)
    return found


def broken_off(
    source: Source, shards: Sequence[Shard], columns: Sequence[str], seed: int
) -> dict[int, list[Record]]:
    """Each shard is begun and dropped, then read again without the rows that were had."""
    rng = random.Random(seed)
    found: dict[int, list[Record]] = {}
    for shard in shards:
        reader = source.read_shard(shard, columns)
        first = [record for record, _ in zip(reader, range(rng.randint(0, 9)), strict=False)]
        reader.close()  # type: ignore[attr-defined]
        done = {record.row for record in first}
        rest = list(source.read_shard(shard, columns, skip=done))
        check_positions(rest, shard, done)
        found[shard.index] = [*first, *rest]
    return found


ReadShards = Callable[[Source, Sequence[Shard], Sequence[str], int], dict[int, list[Record]]]
WAYS: tuple[ReadShards, ...] = (in_order, in_random_order, every_third, interleaved, broken_off)


def check_all_ways(source: Source, columns: Sequence[str], rows_per_shard: int, seed: int) -> None:
    """However the shards are read, the same rows come out, each once."""
    shards = plan(source, rows_per_shard)
    expected = None
    for read in WAYS:
        found = read(source, shards, columns, seed)
        for shard in shards:
            check_positions(found[shard.index], shard)
        expected = expected or found
        assert found == expected, read.__name__
