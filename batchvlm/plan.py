"""Plan the shards of an input from metadata alone.

The plan depends on the input and `rows_per_shard`, not on the number of workers, so a job can be
resumed with another number of GPUs. A smaller `max_rows` gives the start of the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from batchvlm.records import InputFile, Shard


def plan_shards(
    files: Iterable[InputFile], *, rows_per_shard: int, max_rows: int | None
) -> list[Shard]:
    """Cut the input into contiguous shards that together contain every row once, in order.

    Args:
        files: the files of the input, in order; files without rows get no shard.
        rows_per_shard: maximum number of rows in a shard, at least 1.
        max_rows: number of rows to take from the start of the input; None for all.

    Returns:
        The shards in input order, none of them empty; an empty list if there are no rows.
    """
    assert rows_per_shard >= 1, "settings/checks.py checks the range"
    shards: list[Shard] = []
    first_row_index = 0
    for file in files:
        for first_row, num_rows in _cut(file.row_groups, rows_per_shard):
            if max_rows is not None:
                num_rows = min(num_rows, max_rows - first_row_index)
                if num_rows <= 0:
                    return shards
            shards.append(
                Shard(
                    index=len(shards),
                    source_file=file.name,
                    first_row=first_row,
                    num_rows=num_rows,
                    first_row_index=first_row_index,
                )
            )
            first_row_index += num_rows
    return shards


def _cut(row_groups: Iterable[int], rows_per_shard: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of each shard of one file.

    Whole row groups are combined while they fit, because reading part of one takes as long as
    reading all of it. A row group that exceeds a shard is split evenly, so that no shard is tiny.
    """
    first_row = num_rows = 0
    for group_rows in row_groups:
        if num_rows and num_rows + group_rows > rows_per_shard:
            yield first_row, num_rows
            first_row, num_rows = first_row + num_rows, 0
        if group_rows <= rows_per_shard:
            num_rows += group_rows
            continue
        num_pieces = -(-group_rows // rows_per_shard)
        for piece in range(num_pieces):
            piece_rows = group_rows // num_pieces + (piece < group_rows % num_pieces)
            yield first_row, piece_rows
            first_row += piece_rows
    if num_rows:
        yield first_row, num_rows
