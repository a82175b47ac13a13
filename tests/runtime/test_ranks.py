"""Which shards are whose, and which device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.config import EngineConfig, ModelConfig, RuntimeConfig
from batchvlm.errors import ConfigError
from batchvlm.records import Shard
from batchvlm.runtime.launch import Launch
from batchvlm.runtime.ranks import Devices, find_devices, gpus_of, shards_of_task


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
    assert find_devices(Launch(), EngineConfig(device="cpu"), RuntimeConfig()).first == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_here(device: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.device={device} is not on this machine"):
        find_devices(Launch(), EngineConfig(device=device), RuntimeConfig())


def spread(gpus_per_replica: int | None = None, device_map: str = "auto") -> ModelConfig:
    return ModelConfig(path="m", device_map=device_map, gpus_per_replica=gpus_per_replica)


def of_machine(num_ranks: int, local_rank: int = 0) -> Launch:
    """A rank of the second of two machines."""
    return Launch(
        rank=num_ranks + local_rank,
        world_size=2 * num_ranks,
        local_rank=local_rank,
        local_world_size=num_ranks,
    )


@given(st.integers(1, 9), st.integers(1, 9), st.none() | st.integers(0, 9))
def test_each_rank_of_a_machine_has_gpus_of_its_own(
    num_ranks: int, size: int, num_left: int | None
) -> None:
    """Without a number all of them are taken."""
    asked, num_gpus = None if num_left is None else size, num_ranks * size + (num_left or 0)
    groups = [
        gpus_of(of_machine(num_ranks, rank), num_gpus, spread(asked), num_allocated=num_gpus)
        for rank in range(num_ranks)
    ]
    assert [gpu for group in groups for gpu in group] == list(range(num_ranks * size))
    assert {len(group) for group in groups} == {size}


def test_a_task_that_sees_its_own_gpus_alone_takes_them_all() -> None:
    """As under `srun --gpus-per-task=2`, four tasks on a machine with eight."""
    for rank in range(4):
        for asked in (None, 2):
            own = gpus_of(of_machine(4, rank), 2, spread(asked), num_allocated=8)
            assert own == range(2)
    with pytest.raises(ConfigError, match="need 3 GPUs, and 2 are here"):
        gpus_of(of_machine(4), 2, spread(3), num_allocated=8)


@pytest.mark.parametrize(
    ("num_ranks", "num_gpus", "model", "message"),
    [
        (3, 8, spread(), "8 GPUs do not divide among the 3 processes of this machine; "
         "start 1 or 2 or 4 or 8, or set model.gpus_per_replica"),
        (4, 2, spread(), "2 GPUs do not divide among the 4 processes"),
        (3, 8, spread(4), "model.gpus_per_replica=4: the processes of this machine need 12 GPUs, "
         "and 8 are here; start 2 at most"),
        (1, 2, spread(4), "need 4 GPUs, and 2 are here; ask for more GPUs"),
        (2, 4, spread(device_map="balanced_low_0"), "works only if the first GPU of a process is"),
    ],
)  # fmt: skip
def test_gpus_that_do_not_suffice(
    num_ranks: int, num_gpus: int, model: ModelConfig, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        gpus_of(of_machine(num_ranks), num_gpus, model, num_allocated=0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_gpus_that_are_left_are_said(caplog: pytest.LogCaptureFixture) -> None:
    assert gpus_of(of_machine(2, 1), 8, spread(3), num_allocated=0) == range(3, 6)
    assert "2 of the 8 GPUs here are not used by any process" in caplog.text


class TestAMachineWithFourGpus:
    @pytest.fixture(autouse=True)
    def four(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Which of them was made the current one."""
        chosen: list[int] = []
        cuda = SimpleNamespace(type="cuda")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: cuda)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        return chosen

    def find(self, launch: Launch, model: ModelConfig | None, device: str = "auto") -> Devices:
        return find_devices(launch, EngineConfig(device=device), RuntimeConfig(), model)

    def test_two_ranks_have_two_each(self, four: list[int]) -> None:
        first, second = (self.find(of_machine(2, rank), spread()) for rank in (0, 1))
        assert [(d.first, d.num_gpus) for d in (first, second)] == [("cuda:0", 2), ("cuda:2", 2)]
        assert four == [0, 2]

    def test_slurm_says_whether_there_are_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_STEP_ID", "0")
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
        assert self.find(of_machine(2, 1), spread()).first == "cuda:0"

    def test_one_process_sees_to_it_itself(self) -> None:
        assert self.find(Launch(), spread()).num_gpus is None
        assert self.find(Launch(), spread(3)).num_gpus == 3
        assert self.find(of_machine(4, 3), None).first == "cuda:3"
        with pytest.raises(ConfigError, match="cuda:1 is one GPU, and model"):
            self.find(of_machine(2), spread(), device="cuda:1")
        with pytest.raises(ConfigError, match="gpus_per_replica=2, and the model runs on cpu"):
            self.find(Launch(), spread(2), device="cpu")
