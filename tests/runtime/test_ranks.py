"""Which shards are whose, and which device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.config import EngineConfig, RuntimeConfig
from batchvlm.errors import ConfigError
from batchvlm.records import Shard
from batchvlm.runtime.launch import Launch
from batchvlm.runtime.ranks import find_rank, shards_of_task


def plan(count: int) -> list[Shard]:
    return [
        Shard(index=i, source_file="f", first_row=i, num_rows=1, first_row_index=i)
        for i in range(count)
    ]


@given(st.integers(0, 60), st.integers(1, 7))
def test_every_shard_is_of_exactly_one_task(count: int, num_tasks: int) -> None:
    shards = plan(count)
    taken = [
        shard.index
        for task_id in range(num_tasks)
        for shard in shards_of_task(shards, RuntimeConfig(num_tasks=num_tasks, task_id=task_id))
    ]
    assert sorted(taken) == list(range(count))


def test_a_slice_is_a_function_of_the_shard_alone() -> None:
    mine = shards_of_task(plan(10), RuntimeConfig(num_tasks=4, task_id=2))
    assert [shard.index for shard in mine] == [2, 6]


def test_the_cpu_is_always_there() -> None:
    assert find_rank(Launch(), EngineConfig(device="cpu"), RuntimeConfig()).device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_here(device: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.device={device} is not on this machine"):
        find_rank(Launch(), EngineConfig(device=device), RuntimeConfig())
