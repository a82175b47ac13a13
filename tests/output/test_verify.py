"""Every input row exactly once: what `verify` finds wrong, and what it says of it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.errors import InputError
from batchvlm.output.folder import OutputFolder
from batchvlm.output.verify import ranges, verify

from .test_overwrite import run_job

# Of `run_job`: shard 0 with rows 0 to 5, shard 1 with rows 6 and 7.


def last_byte(part: Path, name: str) -> int:
    """Where the values of a column end in a file."""
    group = pq.read_metadata(part).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    column = next(c for c in columns if c.path_in_schema == name)
    start: int = column.dictionary_page_offset or column.data_page_offset
    return start + int(column.total_compressed_size) - 1


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    run_job(tmp_path / "out", "ours")
    return OutputFolder(tmp_path / "out")


def test_a_finished_job_is_whole(folder: OutputFolder) -> None:
    verdict = verify(folder)
    assert verdict.faults == []
    assert verdict.num_rows == verdict.statuses.total() == 8
    assert verdict.statuses == {"success": 7, "error": 1}
    assert verdict.errors == {"decode": 1}


def test_an_unfinished_job_misses_rows(tmp_path: Path) -> None:
    run_job(tmp_path, "ours", stop_after=7)
    assert verify(OutputFolder(tmp_path)).faults == [
        "missing     1 row: 7",
        "unfinished  1 row: 6; they are in segments, the same command brings them into parts",
    ]


def test_missing_double_and_foreign_rows_are_named(folder: OutputFolder) -> None:
    first, last = folder.part(0, 2), folder.part(1, 2)
    table = pq.read_table(first)
    odd = table.slice(0, 2)
    place = odd.schema.get_field_index("row_index")
    odd = odd.set_column(place, "row_index", [[8, -3]])
    pq.write_table(table.slice(0, 4), folder.data / "copy.parquet")
    pq.write_table(odd.cast(table.schema), folder.data / "odd.parquet")
    last.unlink()
    assert verify(folder).faults == [
        "missing     2 rows: 6-7",
        "double      4 rows: 0-3; in copy.parquet, part-00000-of-00002.parquet",
        "foreign     2 rows: -3, 8; in odd.parquet",
    ]


def test_a_row_twice_in_one_part(folder: OutputFolder) -> None:
    part = folder.part(0, 2)
    table = pq.read_table(part)
    pq.write_table(table.take([0, 1, 2, 3, 4, 4]), part)
    assert verify(folder).faults == [
        "missing     1 row: 5",
        "double      1 row: 4; in part-00000-of-00002.parquet",
    ]


def test_a_copy_over_another_part(folder: OutputFolder) -> None:
    first, last = folder.part(0, 2), folder.part(1, 2)
    last.write_bytes(first.read_bytes())
    assert verify(folder).faults == [
        "missing     2 rows: 6-7",
        "double      6 rows: 0-5; in part-00000-of-00002.parquet, part-00001-of-00002.parquet",
    ]


@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_an_unreadable_part_is_named(folder: OutputFolder, damage: str) -> None:
    part = folder.part(0, 2)
    content = bytearray(part.read_bytes())
    if damage == "garbled":
        # In a column that is read: the page's checksum tells.
        content[last_byte(part, "row_index")] ^= 0xFF
    part.write_bytes({"cut": content[:-7], "garbled": content, "empty": b""}[damage])
    unreadable, missing = verify(folder).faults
    assert unreadable.startswith(f"unreadable  {part.name}: ")
    assert missing == "missing     6 rows: 0-5"


def test_parts_of_another_run_are_named(folder: OutputFolder, tmp_path: Path) -> None:
    run_job(tmp_path / "other", "theirs")
    other = OutputFolder(tmp_path / "other").part(1, 2)
    folder.part(1, 2).write_bytes(other.read_bytes())
    faults = verify(folder).faults
    assert len(faults) == 2 and all(fault.startswith("fingerprint part-00001") for fault in faults)


def test_a_foreign_file_is_named(folder: OutputFolder) -> None:
    pq.write_table(pa.table({"x": [1]}), folder.data / "mine.parquet")
    faults = verify(folder).faults
    assert "mine.parquet" in faults[0] and "no column 'row_index'" in faults[-1]
    assert all("mine.parquet" in fault for fault in faults)


def test_a_folder_that_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no output of batchvlm: it has no _batchvlm/run\.json"):
        verify(OutputFolder(tmp_path))


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_name_what_they_are_given(rows: set[int]) -> None:
    shown = ranges(sorted(rows))
    if "more" in shown:
        assert shown.count(",") >= 19
        return
    named = set()
    for piece in shown.split(", "):
        first, _, last = piece.partition("-")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == rows


def test_very_many_ranges_are_cut_short() -> None:
    assert ranges(list(range(0, 100, 2))).endswith(", 38 and 30 more ranges")
