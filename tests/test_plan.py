"""Shards cover the input once, in order, whatever its layout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.plan import plan_shards
from batchvlm.records import InputFile, Shard


def make_file(name: str, *row_groups: int) -> InputFile:
    return InputFile(
        name=name, num_rows=sum(row_groups), row_groups=row_groups, identity=f"id of {name}"
    )


def ranges(shards: list[Shard]) -> list[tuple[str, int, int]]:
    return [(s.source_file, s.first_row, s.num_rows) for s in shards]


def test_whole_row_groups_are_gathered_while_they_fit() -> None:
    shards = plan_shards([make_file("a", 4, 4, 4, 2, 9, 1)], rows_per_shard=10, max_rows=None)

    assert ranges(shards) == [("a", 0, 8), ("a", 8, 6), ("a", 14, 10)]


def test_a_large_row_group_is_split_evenly_and_alone() -> None:
    shards = plan_shards([make_file("a", 3, 25, 3)], rows_per_shard=10, max_rows=None)

    assert ranges(shards) == [("a", 0, 3), ("a", 3, 9), ("a", 12, 8), ("a", 20, 8), ("a", 28, 3)]


def test_a_shard_never_crosses_a_file_and_empty_files_give_none() -> None:
    files = [make_file("a", 2), make_file("b"), make_file("c", 0), make_file("d", 0, 2, 0)]

    shards = plan_shards(files, rows_per_shard=100, max_rows=None)

    assert ranges(shards) == [("a", 0, 2), ("d", 0, 2)]
    assert [s.first_row_index for s in shards] == [0, 2]
    assert [s.index for s in shards] == [0, 1]


@pytest.mark.parametrize("files", [[], [make_file("a")], [make_file("a", 0, 0)]])
def test_no_rows_give_an_empty_plan(files: list[InputFile]) -> None:
    assert plan_shards(files, rows_per_shard=10, max_rows=None) == []


def test_no_rows_wanted_give_an_empty_plan() -> None:
    assert plan_shards([make_file("a", 5)], rows_per_shard=10, max_rows=0) == []


layouts = st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=5)


@given(layouts, st.integers(1, 25), st.none() | st.integers(0, 150))
def test_every_row_is_in_one_shard(
    layout: list[list[int]], rows_per_shard: int, max_rows: int | None
) -> None:
    files = [make_file(f"f{i}", *groups) for i, groups in enumerate(layout)]
    expected = [(f.name, row) for f in files for row in range(f.num_rows)][:max_rows]

    shards = plan_shards(files, rows_per_shard=rows_per_shard, max_rows=max_rows)

    planned = [(s.source_file, s.first_row + row) for s in shards for row in range(s.num_rows)]
    assert planned == expected
    assert all(1 <= s.num_rows <= rows_per_shard for s in shards)
    assert [s.index for s in shards] == list(range(len(shards)))
    starts = [sum(s.num_rows for s in shards[:i]) for i in range(len(shards))]
    assert [s.first_row_index for s in shards] == starts


@given(layouts, st.integers(1, 25), st.integers(0, 150))
def test_max_rows_gives_the_start_of_the_same_plan(
    layout: list[list[int]], rows_per_shard: int, max_rows: int
) -> None:
    files = [make_file(f"f{i}", *groups) for i, groups in enumerate(layout)]

    whole = plan_shards(files, rows_per_shard=rows_per_shard, max_rows=None)
    start = plan_shards(files, rows_per_shard=rows_per_shard, max_rows=max_rows)

    assert start[:-1] == whole[: max(0, len(start) - 1)]


@given(st.integers(1, 5000), st.integers(1, 400))
def test_pieces_of_a_row_group_differ_by_a_row_at_most(num_rows: int, rows_per_shard: int) -> None:
    shards = plan_shards([make_file("a", num_rows)], rows_per_shard=rows_per_shard, max_rows=None)

    sizes = {s.num_rows for s in shards}
    assert max(sizes) - min(sizes) <= 1
    assert len(shards) == -(-num_rows // rows_per_shard)


def test_the_shards_do_not_depend_on_identity() -> None:
    """A changed input is refused by its fingerprint, not by shards that moved."""
    one = InputFile(name="a", num_rows=5, row_groups=(5,), identity="one")
    two = InputFile(name="a", num_rows=5, row_groups=(5,), identity="two")

    assert plan_shards([one], rows_per_shard=2, max_rows=None) == plan_shards(
        [two], rows_per_shard=2, max_rows=None
    )


def test_a_hundred_thousand_shards_are_planned() -> None:
    files = [make_file(f"f{i}", *[1000] * 1000) for i in range(100)]

    assert len(plan_shards(files, rows_per_shard=1000, max_rows=None)) == 100_000
