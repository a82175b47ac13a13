"""Which process this is among those of one launch, and the device it computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchvlm.config import EngineConfig, RuntimeConfig
from batchvlm.errors import ConfigError
from batchvlm.records import Shard


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of a launch (`accelerate launch`, torchrun, or alone)."""

    index: int = 0
    world_size: int = 1
    device: str = "cpu"


def find_rank(engine: EngineConfig, runtime: RuntimeConfig) -> Rank:
    """Ask accelerate which rank this is and which device belongs to it.

    Raises:
        ConfigError: `engine.device` names a device that is not here.
    """
    import torch
    from accelerate import PartialState

    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    state = PartialState(cpu=engine.device == "cpu")
    device = str(state.device) if engine.device in ("auto", "cuda") else engine.device
    kind, _, number = device.partition(":")
    if engine.device == "cuda" and kind != "cuda":
        kind = device = "cuda"
    if kind != "cpu":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        count = torch.accelerator.device_count() if accelerator is not None else 0
        if accelerator is None or accelerator.type != kind or int(number or 0) >= count:
            there = f"{count} of type {accelerator.type}" if accelerator else "none"
            raise ConfigError(
                f"engine.device={engine.device} is not on this machine (accelerators: {there})",
                hint="set engine.device=auto or engine.device=cpu",
            )
    return Rank(index=state.process_index, world_size=state.num_processes, device=device)


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
