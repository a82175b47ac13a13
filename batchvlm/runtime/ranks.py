"""The device that is this rank's, and the shards that are its task's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from batchvlm.config import EngineConfig, ModelConfig, RuntimeConfig
from batchvlm.errors import ConfigError
from batchvlm.records import Shard
from batchvlm.runtime.launch import Launch, num_allocated_gpus

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of a launch (`accelerate launch`, torchrun, srun, or alone)."""

    index: int = 0
    world_size: int = 1
    device: str = "cpu"
    num_gpus: int | None = None
    """GPUs, from `device` on, over which it spreads its model; None: it sees to that itself."""


def find_rank(
    launch: Launch,
    engine: EngineConfig,
    runtime: RuntimeConfig,
    model: ModelConfig | None = None,
) -> Rank:
    """Find the device that belongs to this rank, or the first of several.

    Args:
        model: whether it is spread over several GPUs; None: it is not.

    Raises:
        ConfigError: `engine.device` names a device that is not here, or the GPUs do not suffice for
            the ranks of this machine.
    """
    import torch

    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    device, num_gpus = engine.device, None
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
        if count and kind != "mps":
            first = int(number) if number else launch.local_rank % count
            if model is not None and _is_one_of_several(launch, model):
                if number:
                    raise ConfigError(
                        f"engine.device={engine.device} is one GPU, and model.device_map asks "
                        "for several",
                        hint="leave engine.device out",
                    )
                gpus = gpus_of(launch, count, model, num_allocated=num_allocated_gpus())
                first, num_gpus = gpus[0], len(gpus)
            # SLURM may show each task its own GPU alone, which is number 0 to it.
            device = f"{kind}:{first}"
            if not number:
                torch.accelerator.set_device_index(first)
            if model is not None and model.tp_plan is not None:
                _check_one_each(launch, count)
    asked = model.gpus_per_replica if model is not None and model.tp_plan is None else None
    if asked is not None and num_gpus is None:
        raise ConfigError(
            f"model.gpus_per_replica={asked}, and the model runs on {device}",
            hint="leave it out",
        )
    return Rank(index=launch.rank, world_size=launch.world_size, device=device, num_gpus=num_gpus)


def _is_one_of_several(launch: Launch, model: ModelConfig) -> bool:
    """Whether a model is spread over some of the GPUs here, and others may be another rank's."""
    is_told = launch.world_size > 1 or model.gpus_per_replica is not None
    return model.device_map is not None and is_told


def _check_one_each(launch: Launch, num_visible: int) -> None:
    is_own = num_allocated_gpus() > num_visible
    if not is_own and launch.local_world_size > num_visible:
        raise ConfigError(
            f"model.tp_plan needs a GPU for each of the {launch.local_world_size} processes of "
            f"this machine, and {num_visible} are here",
            hint=f"start {num_visible}",
        )


def gpus_of(launch: Launch, num_visible: int, model: ModelConfig, *, num_allocated: int) -> range:
    """The GPUs over which a rank spreads its model: neighbours, and no other rank's.

    Args:
        num_visible: GPUs that this process sees.
        num_allocated: GPUs of this machine that its ranks have together; 0: not known.

    Returns:
        Their numbers, as this process counts them.

    Raises:
        ConfigError: they are too few, or do not divide.
    """
    asked, num_ranks = model.gpus_per_replica, launch.local_world_size
    if num_allocated > num_visible:
        # SLURM has given each task its own, which the task counts from 0.
        num_ranks = 1
    if asked is None and num_visible % num_ranks:
        divisors = [str(n) for n in range(1, num_visible + 1) if num_visible % n == 0]
        raise ConfigError(
            f"model.device_map: {num_visible} GPUs do not divide among the {num_ranks} processes "
            "of this machine",
            hint=f"start {' or '.join(divisors)}, or set model.gpus_per_replica",
        )
    size = num_visible // num_ranks if asked is None else asked
    if size * num_ranks > num_visible:
        most = num_visible // size
        raise ConfigError(
            f"model.gpus_per_replica={size}: the processes of this machine need "
            f"{size * num_ranks} GPUs, and {num_visible} are here",
            hint=f"start {most} at most" if most else "ask for more GPUs of the machine",
        )
    if model.device_map == "balanced_low_0" and num_ranks > 1:
        raise ConfigError(
            "model.device_map=balanced_low_0 knows no other first GPU than number 0",
            hint="in a launch of several processes, set model.device_map=balanced",
        )
    if left := num_visible - size * num_ranks:
        log.warning("%d of the %d GPUs here are nobody's", left, num_visible)
    first = launch.local_rank * size if num_ranks > 1 else 0
    return range(first, first + size)


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
