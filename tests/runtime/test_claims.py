"""Each shard to one rank, whoever comes late, dies, or loses the store."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.records import Shard
from batchvlm.runtime import claims
from batchvlm.runtime.claims import Peers, claim_shards
from batchvlm.runtime.clock import RunningClock
from batchvlm.runtime.launch import Launch
from batchvlm.runtime.metrics import Metrics


class Mortal:
    """A store that is lost after a number of calls."""

    def __init__(self, store: Any, calls_left: int = 1_000_000) -> None:
        self.store = store
        self.calls_left = calls_left

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if self.calls_left <= 0:
                raise RuntimeError("Connection reset by peer")
            self.calls_left -= 1
            return getattr(self.store, name)(*args)

        return call


def make_ranks(world_size: int, store: Any, **options: Any) -> list[Peers]:
    return [
        Peers(Launch(rank=r, world_size=world_size), "job", connect=lambda _: store, **options)
        for r in range(world_size)
    ]


def in_turns(ranks: list[Iterator[int]], draw: random.Random) -> list[list[int]]:
    """What each rank claims when they ask in an order that is drawn."""
    taken: list[list[int]] = [[] for _ in ranks]
    live = list(range(len(ranks)))
    while live:
        rank = draw.choice(live)
        place = next(ranks[rank], None)
        if place is None:
            live.remove(rank)
        else:
            taken[rank].append(place)
    return taken


@settings(max_examples=25)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(0, 99))
def test_every_shard_goes_to_exactly_one_rank(num: int, world_size: int, seed: int) -> None:
    ranks = make_ranks(world_size, dist.HashStore())
    taken = in_turns([rank.claim(num) for rank in ranks], random.Random(seed))
    assert sorted(chain(*taken)) == list(range(num))
    assert not any(rank.is_lost for rank in ranks)


def test_without_a_host_the_shards_are_divided_and_nobody_is_lost() -> None:
    ranks = [Peers(Launch(rank=r, world_size=2), "job") for r in range(2)]
    assert [list(rank.claim(5)) for rank in ranks] == [[0, 2, 4], [1, 3]]
    ranks[0].wait_for_others(lambda: pytest.fail("there is nobody to wait for"))
    assert not any(rank.is_lost for rank in ranks)


def test_a_rank_that_dies_keeps_only_what_it_had_claimed() -> None:
    first, second = make_ranks(2, dist.HashStore())
    dead = list(islice(first.claim(10), 3))
    assert dead == [0, 1, 2]
    assert list(second.claim(10)) == [3, 4, 5, 6, 7, 8, 9]


def test_a_rank_that_comes_late_finds_the_rest() -> None:
    first, second, late = make_ranks(3, dist.HashStore())
    early = in_turns([first.claim(8), islice(second.claim(8), 2)], random.Random(0))
    assert sorted(chain(*early)) == list(range(8))
    assert list(late.claim(8)) == []


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 12), st.integers(0, 99))
def test_without_the_store_every_shard_is_still_somebodys(
    num: int, world_size: int, calls: int, seed: int
) -> None:
    """All ranks live, the store dies at some time: shards may be done twice, none is left out."""
    store = Mortal(dist.HashStore(), calls)
    ranks = make_ranks(world_size, store)
    taken = in_turns([rank.claim(num) for rank in ranks], random.Random(seed))
    assert set(chain(*taken)) == set(range(num))
    assert all(len(places) == len(set(places)) for places in taken)
    if calls < num + world_size:
        assert any(rank.is_lost for rank in ranks)


def test_a_store_that_never_was_divides_the_shards() -> None:
    def refuse(launch: Launch) -> Any:
        raise RuntimeError("nobody is there")

    ranks = [Peers(Launch(rank=r, world_size=3), "job", connect=refuse) for r in range(3)]
    assert [list(rank.claim(7)) for rank in ranks] == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(claims, "_REQUEST_TIMEOUT_S", 0.05)
    is_over = threading.Event()

    class Hanging:
        def add(self, key: str, amount: int) -> int:
            is_over.wait(60)
            return 1

    # Connected beforehand: connecting has a time limit of its own.
    (rank,) = make_ranks(1, Hanging())
    rank._store = Hanging()
    assert list(rank.claim(3)) == [0, 1, 2] and rank.is_lost
    is_over.set()


def test_a_store_that_a_heartbeat_lost_is_asked_for_no_more_shards() -> None:
    store = Mortal(dist.HashStore())
    (rank, _) = make_ranks(2, store)
    claimed = rank.claim(6)
    assert next(claimed) == 0
    store.calls_left = 0
    rank.send_heartbeat(Metrics())
    store.calls_left = 1_000_000
    assert rank.is_lost and list(claimed) == [2, 4]


def test_ranks_find_the_store_of_their_launch_and_of_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claims, "_REQUEST_TIMEOUT_S", 0.2)
    opened = claims.open_store.__wrapped__
    ours = Launch(world_size=2, id="ours", host="127.0.0.1")
    first = opened(ours)
    ours = replace(ours, port=first.port)
    assert [opened(replace(ours, rank=1)).add("shard", 1), first.add("shard", 1)] == [1, 2]
    # As after a rank 0 that could not bind the port.
    with pytest.raises(RuntimeError):
        opened(replace(ours, rank=1, id="theirs"))
    # A launcher's store is there before every rank.
    assert opened(replace(ours, id="theirs", has_store=True)).add("shard", 1) == 3


def test_jobs_and_launches_do_not_share_a_counter() -> None:
    store = dist.HashStore()
    for launch_id, key in (("a", "x"), ("a", "y"), ("b", "x")):
        peers = Peers(Launch(world_size=2, id=launch_id), key, connect=lambda _: store)
        assert list(peers.claim(2)) == [0, 1]


def test_finished_shards_are_passed_over() -> None:
    plan = [
        Shard(index=i, source_file="f", first_row=i, num_rows=1, first_row_index=i)
        for i in range(6)
    ]
    (peers,) = make_ranks(1, dist.HashStore())
    for others in (None, peers):
        found = claim_shards(plan, lambda shard: shard.index % 2 == 1, others)
        assert [shard.index for shard in found] == [1, 3, 5]


def test_rank_0_hears_the_others_and_stays_until_they_are_over() -> None:
    now = 0.0
    first, second, third = make_ranks(3, dist.HashStore(), clock=lambda: now)
    for rank in (first, second, third):
        list(rank.claim(0))
    second.send_heartbeat(Metrics(num_rows=4, num_found=1))
    third.send_heartbeat(Metrics(num_rows=7))
    waits = 0

    def wait() -> None:
        nonlocal now, waits
        now += 1.0
        waits += 1
        if waits == 3:
            with second.exchange(Metrics(num_rows=9)):
                pass

    first.wait_for_others(wait)
    # The second said that it is over, the third has been silent for half a minute.
    assert 30 <= waits <= 32
    assert sorted(counts.num_rows for counts in first.others()) == [7, 9]
    assert [counts.is_over for counts in first.others()] == [True, False]


def test_a_rank_at_a_long_row_is_alive() -> None:
    now = 0.0
    first, second = make_ranks(2, dist.HashStore(), clock=lambda: now)
    for rank in (first, second):
        list(rank.claim(0))
    second.send_heartbeat(Metrics())

    def wait() -> None:
        nonlocal now
        now += 20.0
        if now < 200:
            second.send_heartbeat(Metrics())

    first.wait_for_others(wait)
    assert 200 <= now <= 260


def test_a_rank_that_never_came_is_not_waited_for() -> None:
    first, _ = make_ranks(2, dist.HashStore())
    list(first.claim(0))
    first.wait_for_others(lambda: pytest.fail("nobody is there"))
    assert not first.is_lost


def test_rank_0_waits_for_nobody_once_it_has_lost_the_store() -> None:
    store = Mortal(dist.HashStore())
    first, second = make_ranks(2, store)
    for rank in (first, second):
        list(rank.claim(0))
    second.send_heartbeat(Metrics())
    first.read_heartbeats()
    store.calls_left = 0
    first.read_heartbeats()
    first.wait_for_others(lambda: pytest.fail("it cannot hear them"))


def test_a_rank_that_died_long_ago_is_not_waited_for() -> None:
    """By the clock that counts no more than some seconds between two readings."""
    now = 0.0
    first, dead = make_ranks(2, dist.HashStore(), clock=RunningClock(lambda: now))
    for rank in (first, dead):
        list(rank.claim(0))
    dead.send_heartbeat(Metrics())
    for _ in range(100):
        first.read_heartbeats()
        now += 1.0
    first.wait_for_others(lambda: pytest.fail("it has been silent for more than a minute"))


def test_only_rank_0_waits() -> None:
    first, second = make_ranks(2, dist.HashStore())
    for rank in (first, second):
        list(rank.claim(0))
    first.send_heartbeat(Metrics(num_rows=1))
    second.wait_for_others(lambda: pytest.fail("it may go"))
