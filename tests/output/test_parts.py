"""Parts are what their names say, and how many of their rows failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchvlm.config import RetryConfig
from batchvlm.errors import OutputError
from batchvlm.output import folder as folder_module
from batchvlm.output.compact import compact
from batchvlm.output.folder import OutputFolder
from batchvlm.output.parts import Failures, failures_in_parts, shards_to_retry
from batchvlm.output.run_file import RunFile, read_run
from batchvlm.records import Shard

from .test_compact import NUM_SHARDS, job
from .test_overwrite import run_job


@pytest.fixture
def finished(tmp_path: Path) -> tuple[OutputFolder, RunFile]:
    folder = job(tmp_path / "out")
    run = read_run(folder)
    assert run is not None
    return folder, run


def failures(folder: OutputFolder, run: RunFile, wanted: Collection[int]) -> Failures:
    return failures_in_parts(folder, run.plan, run.fingerprint, wanted)


def errors(folder: OutputFolder, run: RunFile, wanted: Collection[int]) -> dict[str, int]:
    """How many rows of these shards have each error type."""
    found: Counter[str] = Counter()
    for (_, kind, _), num_rows in failures(folder, run, wanted).items():
        found[kind] += num_rows
    return found


def test_errors_are_those_of_the_shards_asked_for(finished: tuple[OutputFolder, RunFile]) -> None:
    folder, run = finished  # rows 3, 10, 17, 24 failed: in shards 0, 2, 4, 6
    for _ in range(2):
        assert errors(folder, run, range(NUM_SHARDS)) == {"decode": 4}
        assert errors(folder, run, {0, 1, 2}) == {"decode": 2}
        assert errors(folder, run, {1, 5}) == {}
        compact(folder, target_rows=12)


def test_shards_to_retry_are_those_with_rows_to_answer_again(
    finished: tuple[OutputFolder, RunFile],
) -> None:
    folder, run = finished
    found = failures(folder, run, range(NUM_SHARDS))
    assert found == {(index, "decode", 1): 1 for index in (0, 2, 4, 6)}
    for policy, wanted, expected in (
        (RetryConfig(errors=["decode"]), range(NUM_SHARDS), {0, 2, 4, 6}),
        (RetryConfig(errors=["decode"]), range(4), {0, 2}),
        (RetryConfig(errors=["decode"], max_attempts=1), range(NUM_SHARDS), set()),
        (RetryConfig(errors=["oom"]), range(NUM_SHARDS), set()),
    ):
        assert shards_to_retry(folder, found, wanted, policy) == expected


def test_only_footers_are_read_where_no_row_failed(
    finished: tuple[OutputFolder, RunFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = finished
    read: list[object] = []
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self, **options: read.append(self))
    assert errors(folder, run, {1, 3, 5}) == {} and read == []


def test_of_the_plan_only_the_shards_of_each_part_are_read(
    finished: tuple[OutputFolder, RunFile],
) -> None:
    """With 100,000 parts, the whole plan for each of them would take an hour."""
    folder, run = finished
    num_read = 0

    class Counted(tuple[Shard, ...]):
        def __getitem__(self, place: Any) -> Any:
            nonlocal num_read
            found = super().__getitem__(place)
            num_read += len(found) if isinstance(place, slice) else 1
            return found

        def __iter__(self) -> Iterator[Shard]:
            raise AssertionError("all shards for one part")

    run = replace(run, plan=Counted(run.plan))
    assert errors(folder, run, range(NUM_SHARDS)) == {"decode": 4}
    assert NUM_SHARDS <= num_read <= 2 * NUM_SHARDS


def test_few_shards_are_looked_up_by_name(
    finished: tuple[OutputFolder, RunFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of an array does not list the parts of all the others."""
    folder, run = finished
    monkeypatch.setattr(folder_module, "_NAMES_PER_LISTING", 3)
    monkeypatch.setattr(folder, "_names", None)
    assert errors(folder, run, {0, 1}) == {"decode": 1}
    assert errors(folder, run, set()) == {}


def test_a_copy_under_another_name(finished: tuple[OutputFolder, RunFile]) -> None:
    folder, run = finished
    one, other = folder.part(1, NUM_SHARDS), folder.part(4, NUM_SHARDS)
    other.write_bytes(one.read_bytes())
    assert errors(folder, run, {0, 1, 2, 3}) == {"decode": 2}
    with pytest.raises(OutputError, match=r"part-00004-of-00007.parquet holds shard 1, which is"):
        errors(folder, run, {4})


def test_damage_and_other_runs(finished: tuple[OutputFolder, RunFile], tmp_path: Path) -> None:
    folder, run = finished
    part = folder.part(0, NUM_SHARDS)
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"part-00000.* cannot be read.*delete it"):
        errors(folder, run, {0})
    run_job(tmp_path / "other", "theirs")
    part.write_bytes(OutputFolder(tmp_path / "other").part(0, 2).read_bytes())
    with pytest.raises(OutputError, match=r"part-00000-of-00007.parquet is of another run"):
        errors(folder, run, {0})
    pq.write_table(pq.read_table(part).replace_schema_metadata(), part)
    with pytest.raises(OutputError, match=r"part-00000-of-00007.parquet is of another run"):
        errors(folder, run, {0})


def test_parts_that_are_merged_meanwhile_are_not_missed(
    finished: tuple[OutputFolder, RunFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = finished
    listed = folder.parts(NUM_SHARDS)
    compact(folder, target_rows=80)
    monkeypatch.setattr(OutputFolder, "parts", lambda self, *shards: listed)
    assert errors(folder, run, range(NUM_SHARDS)) == {}
