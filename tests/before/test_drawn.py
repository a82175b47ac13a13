"""Rows that stand for the whole input: spread, never twice, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.before.drawn import draw_random, draw_spread, inspect_job, spread
from batchvlm.errors import ConfigError
from batchvlm.pipeline.job import Job, open_job
from batchvlm.records import Shard, shard_of
from batchvlm.settings.compose import compose


def plan_of(lengths: list[int]) -> list[Shard]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        Shard(index=i, source_file="f", first_row=start, num_rows=length, first_row_index=start)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 200))
def test_stretches_lie_in_their_shards_and_never_overlap(lengths: list[int], wanted: int) -> None:
    plan = plan_of(lengths)
    pieces = spread(plan, wanted)
    rows = [r for p in pieces for r in range(p.first_row_index, p.first_row_index + p.num_rows)]
    assert rows == sorted(set(rows)) and len(rows) > 0
    assert len(rows) <= max(wanted + 20, 1) or sum(lengths) <= wanted
    for piece in pieces:
        shard = shard_of(plan, piece.first_row_index)
        assert piece.index == shard.index
        assert piece.first_row - shard.first_row == piece.first_row_index - shard.first_row_index
        assert piece.first_row_index + piece.num_rows <= shard.first_row_index + shard.num_rows
    if sum(lengths) <= wanted:
        assert rows == list(range(sum(lengths)))


def test_many_shards_are_read_from_their_beginnings() -> None:
    pieces = spread(plan_of([1000] * 100), 200)
    assert len(pieces) == 20 and all(piece.first_row_index % 1000 == 0 for piece in pieces)
    assert {piece.num_rows for piece in pieces} == {10}
    assert pieces[-1].first_row_index >= 90_000


def demo_job(tmp_path: Path, *overrides: str) -> Job:
    return open_job(compose("run", [f"output.dir={tmp_path / 'out'}", *overrides]))


def test_the_same_seed_draws_the_same_rows(tmp_path: Path) -> None:
    job = demo_job(tmp_path)
    draws = [[record.row_index for record in draw_random(job, 5, seed=seed)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 5
    assert len(draw_random(job, 1000, seed=0)) == 29


def test_of_a_stream_only_the_beginning_is_read(tmp_path: Path) -> None:
    job = demo_job(tmp_path, "output.rows_per_shard=8")
    data = replace(job.cfg.data, streaming=True)
    job = replace(job, cfg=replace(job.cfg, data=data))
    drawn = draw_spread(job, 12)
    assert [record.row_index for record in drawn.records] == list(range(12))
    assert drawn.num_rows == 29 and not drawn.is_all
    assert len(draw_random(job, 1000, seed=0)) == 29


def test_reading_that_takes_long_ends_early_and_has_been_everywhere(tmp_path: Path) -> None:
    job = demo_job(tmp_path)
    ticks = iter([0.0, 1.0, 2.0, 3.0, 100.0])
    drawn = draw_spread(job, 20, clock=lambda: next(ticks))
    assert drawn.num_places == 4 and not drawn.is_all
    rows = [record.row_index for record in drawn.records]
    assert rows == sorted(rows) and rows[0] < 8 and rows[-1] >= 15


def test_a_model_behind_a_server_shows_no_processor() -> None:
    cfg = compose(
        "run",
        [
            *("engine=endpoint", "engine.endpoint.url=http://127.0.0.1:9/v1"),
            *("model=hub", "model.path=there"),
        ],
    )
    with pytest.raises(ConfigError, match="engine=endpoint leaves elsewhere"):
        inspect_job(cfg)
