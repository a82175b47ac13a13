"""The devices of this process, and the shards of its task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from batchvlm.config import EngineConfig, JobConfig, ModelConfig, RuntimeConfig
from batchvlm.errors import ConfigError
from batchvlm.records import Shard
from batchvlm.runtime.launch import Launch, find_launch, num_allocated_gpus

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices on which a process runs its model."""

    first: str
    num_gpus: int | None = None
    """Number of GPUs, starting at `first`, over which the model is spread. None if it is on one
    device, or spread over all GPUs that the process sees."""


def find_devices(
    launch: Launch,
    engine: EngineConfig,
    runtime: RuntimeConfig,
    model: ModelConfig | None = None,
) -> Devices:
    """Select the device of this process, or several, and set the first as current.

    Also applies `runtime.num_threads`.

    Args:
        model: says whether the model is spread over several GPUs; None if it is not.

    Raises:
        ConfigError: `engine.device` names a missing device, or this machine has too few GPUs for
            its ranks.
    """
    import torch

    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    device, num_gpus = engine.device, None
    kind, _, number = device.partition(":")
    if kind != "cpu":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        count = torch.accelerator.device_count() if accelerator is not None else 0
        available = accelerator.type if accelerator is not None else "cpu"
        if kind == "auto":
            kind = available
        if kind != "cpu" and (kind != available or int(number or 0) >= count):
            found = f"{count} of type {available}" if count else "none"
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
            # SLURM may show each task only its own GPU, which then has index 0.
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
    return Devices(first=device, num_gpus=num_gpus)


def find_device(cfg: JobConfig) -> str:
    """Select the device for a model that this process loads alone.

    Raises:
        ConfigError: as for `find_devices`.
    """
    return find_devices(find_launch(), cfg.engine, cfg.runtime).first


def _is_one_of_several(launch: Launch, model: ModelConfig) -> bool:
    """Whether the model is spread over some of this machine's GPUs, not simply over all of them."""
    is_divided = launch.world_size > 1 or model.gpus_per_replica is not None
    return model.device_map is not None and is_divided


def _check_one_each(launch: Launch, num_visible: int) -> None:
    is_own = num_allocated_gpus() > num_visible
    if not is_own and launch.local_world_size > num_visible:
        raise ConfigError(
            f"model.tp_plan needs a GPU for each of the {launch.local_world_size} processes of "
            f"this machine, and {num_visible} are here",
            hint=f"start {num_visible}",
        )


def gpus_of(launch: Launch, num_visible: int, model: ModelConfig, *, num_allocated: int) -> range:
    """Return the GPUs over which a rank spreads its model: contiguous, and not shared.

    Args:
        num_visible: GPUs that this process sees.
        num_allocated: GPUs of this machine over all its ranks; 0 if unknown.

    Returns:
        Device indices as this process sees them.

    Raises:
        ConfigError: there are too few GPUs, or they do not divide evenly among the ranks.
    """
    asked, num_ranks = model.gpus_per_replica, launch.local_world_size
    if num_allocated > num_visible:
        # SLURM shows each task only its own GPUs, with indices from 0.
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
            "model.device_map=balanced_low_0 works only if the first GPU of a process is GPU 0",
            hint="in a launch of several processes, set model.device_map=balanced",
        )
    if left := num_visible - size * num_ranks:
        log.warning("%d of the %d GPUs here are not used by any process", left, num_visible)
    first = launch.local_rank * size if num_ranks > 1 else 0
    return range(first, first + size)


def memory_of(device: str) -> tuple[int, int] | None:
    """Return the used bytes of a CUDA device, by all processes, and its total bytes; else None."""
    import torch

    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


def shards_of_task(plan: Sequence[Shard], runtime: RuntimeConfig) -> list[Shard]:
    """Return the shards of this task, which its ranks divide among themselves."""
    return [s for s in plan if s.index % runtime.num_tasks == runtime.task_id]
