"""When a process reads on: neither far ahead of its engine nor past the deadline."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from batchvlm.pipeline.work import Work
from batchvlm.records import Shard
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.walltime import Deadline

PLAN = [
    Shard(index=i, source_file="in", first_row=10 * i, num_rows=10, first_row_index=10 * i)
    for i in range(4)
]


class FakePeers:
    """Claims all shards in order, and notes how many."""

    def __init__(self) -> None:
        self.num_claimed = 0

    def claim(self, num_shards: int) -> Iterator[int]:
        for place in range(num_shards):
            self.num_claimed += 1
            yield place


def work_of(peers: Any, deadline: Deadline, todo: list[Shard] = PLAN) -> Work:
    job: Any = None
    work = Work(job=job, mine=PLAN, todo=todo, metrics=Metrics(), engine=None, followers=None)
    work.peers, work.deadline = peers, deadline
    return work


@pytest.fixture
def never() -> Deadline:
    return Deadline(0.0)


def test_a_rank_claims_a_shard_once_the_engine_has_half_of_the_one_before(never: Deadline) -> None:
    """What it holds without need is lost to ranks that start later."""
    peers = FakePeers()
    work = work_of(peers, never)
    shards = work.shards()
    assert next(shards) is PLAN[0]
    work.num_read += 10
    for _ in range(5):
        assert next(shards) is None and peers.num_claimed == 1
        work.num_taken += 1
    assert next(shards) is PLAN[1]
    work.num_read += 10
    assert next(shards) is None and peers.num_claimed == 2


def test_a_shard_that_is_finished_already_holds_nothing_up(never: Deadline) -> None:
    peers = FakePeers()
    shards = work_of(peers, never, todo=PLAN[2:]).shards()
    assert list(islice(shards, 2)) == PLAN[2:]


def test_a_process_without_peers_reads_ahead(never: Deadline) -> None:
    work = work_of(None, never)
    work.num_read += 1000
    assert list(work.shards()) == PLAN


def test_at_the_deadline_neither_a_shard_nor_a_row_is_begun() -> None:
    now = [0.0]
    deadline = Deadline(10.0, environ={"SLURM_JOB_END_TIME": "100"}, clock=lambda: now[0])
    work = work_of(None, deadline)
    waiting: Any = ["a", "b"]
    shards, rows = work.shards(), work.take(waiting)
    assert (next(shards), next(rows), work.num_taken) == (PLAN[0], "a", 1)
    now[0] = 90.0
    assert (list(shards), list(rows), work.num_taken) == ([], [], 1)
    assert deadline.has_come
