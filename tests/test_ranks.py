"""Ranks of one launch, and the end of an allocation, through the whole pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from batchvlm.errors import BatchvlmError, ExitCode, UnfinishedError
from batchvlm.pipeline import work
from batchvlm.records import Completion, Failure, Sample
from batchvlm.runtime.walltime import Deadline
from tests.conftest import picture
from tests.pipeline.test_pipeline import FakeEngine, rows_of, run


def test_near_the_end_of_the_allocation_no_row_is_begun(
    tmp_path: Path, write_parquet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet([picture()] * 40, row_group_size=10)
    out = tmp_path / "out"
    end_s = 2_000_000_000
    now_s = float(end_s - 1000)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end_s))
    monkeypatch.setattr(work, "Deadline", partial(Deadline, clock=lambda: now_s))

    class Slow(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            nonlocal now_s
            for sample in samples:
                now_s += 100
                yield from super().run([sample])

    slow = Slow()
    with pytest.raises(UnfinishedError, match="time is nearly up") as caught:
        run(out, source, "runtime.walltime_margin_s=150", engine=slow)
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    # What was begun is answered and on disk, and a rerun takes up the rest and no more.
    assert 0 < len(slow.seen) <= 9
    rest = FakeEngine()
    now_s = float(end_s)
    with pytest.raises(UnfinishedError, match="time is nearly up"):
        run(out, source, "runtime.walltime_margin_s=150", engine=rest)
    assert rest.seen == []
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    run(out, source, engine=rest)
    assert sorted(slow.seen + rest.seen) == list(range(40))
    assert [row["row_index"] for row in rows_of(out)] == list(range(40))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_of_one_launch_compute_every_row_once(
    tmp_path: Path, write_parquet: Any, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """A rank that comes when the others have begun, and one that never comes."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    store = HashStore()
    monkeypatch.setattr("batchvlm.runtime.claims.open_store", lambda launch: store)
    monkeypatch.setattr("batchvlm.runtime.claims._HEARTBEAT_TIMEOUT_S", 0.0)
    source = write_parquet([picture()] * 60, row_group_size=10)
    out = tmp_path / "out"
    options = ["engine.device=cpu", f"runtime.num_workers={num_workers}"]
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("MASTER_ADDR", "here")):
        monkeypatch.setenv(name, value)

    class Dying(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            for sample in islice(samples, 4):
                yield from super().run([sample])
            raise BatchvlmError("this rank dies")

    dying, late, rerun = Dying(), FakeEngine(), FakeEngine()
    with pytest.raises(BatchvlmError, match="this rank dies"):
        run(out, source, *options, engine=dying)
    monkeypatch.setenv("RANK", "0")
    summary = run(out, source, *options, engine=late)
    # The shards that the dead rank had claimed are left; nothing else is, and nothing is double.
    assert summary.num_mine == len(late.seen) >= 30
    assert not set(dying.seen) & set(late.seen)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name)
    run(out, source, *options, engine=rerun)
    assert [row["row_index"] for row in rows_of(out)] == list(range(60))
    assert not set(rerun.seen) & set(late.seen)


def test_what_a_lost_store_leaves_open_is_said(
    tmp_path: Path, write_parquet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(launch: Any) -> Any:
        raise RuntimeError("nobody is there")

    monkeypatch.setattr("batchvlm.runtime.claims.open_store", refuse)
    source = write_parquet([picture()] * 40, row_group_size=10)
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "here")
    for rank, num_left in (("1", 2), ("0", 0)):
        monkeypatch.setenv("RANK", rank)
        engine = FakeEngine()
        if num_left:
            with pytest.raises(UnfinishedError, match=f"{num_left} shards are not finished"):
                run(out, source, "engine.device=cpu", engine=engine)
        else:
            run(out, source, "engine.device=cpu", engine=engine)
        assert len(engine.seen) == 20
    assert [row["row_index"] for row in rows_of(out)] == list(range(40))
