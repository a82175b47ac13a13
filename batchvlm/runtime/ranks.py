"""The device that is this rank's, and the shards that are its task's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchvlm.config import EngineConfig, RuntimeConfig
from batchvlm.errors import ConfigError
from batchvlm.records import Shard
from batchvlm.runtime.launch import Launch


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of a launch (`accelerate launch`, torchrun, srun, or alone)."""

    index: int = 0
    world_size: int = 1
    device: str = "cpu"


def find_rank(launch: Launch, engine: EngineConfig, runtime: RuntimeConfig) -> Rank:
    """Find the device that belongs to this rank.

    Raises:
        ConfigError: `engine.device` names a device that is not here.
    """
    import torch

    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    device = engine.device
    kind, _, number = device.partition(":")
    if kind != "cpu":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        count = torch.accelerator.device_count() if accelerator is not None else 0
        there = accelerator.type if accelerator is not None else "cpu"
        if kind == "auto":
            kind = there
        if kind != "cpu" and (kind != there or int(number or 0) >= count):
            found = f"{count} of type {there}" if count else "none"
            raise ConfigError(
                f"engine.device={engine.device} is not on this machine (accelerators: {found})",
                hint="set engine.device=auto or engine.device=cpu",
            )
        device = f"{kind}:{number}" if number else kind
        if count and not number and kind != "mps":
            # SLURM may show each task its own GPU alone, which is number 0 to it.
            device = f"{kind}:{launch.local_rank % count}"
            torch.accelerator.set_device_index(launch.local_rank % count)
    return Rank(index=launch.rank, world_size=launch.world_size, device=device)


def memory_of(device: str) -> tuple[int, int] | None:
    """Bytes in use on an accelerator, by whomever, and bytes there are; None of a CPU."""
    import torch

    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


def shards_of_task(plan: Sequence[Shard], runtime: RuntimeConfig) -> list[Shard]:
    """The shards of one slice of the job, which its ranks divide among themselves."""
    return [s for s in plan if s.index % runtime.num_tasks == runtime.task_id]
