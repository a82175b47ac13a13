"""Rank and world size of this process, from the variables of torchrun, accelerate, srun or MPI.

Nothing here waits for another process, so a rank that never starts does not block the others.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

_MPIRUN_NAMES = (
    # Open MPI, then MPICH and Intel MPI: rank, world size, local rank, local world size.
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_PMI_NAMES = ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")
"""Other launchers with PMI, such as Cray's PALS; some set the first two alone."""
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
"""Below the range of ephemeral ports on Linux."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process among those that a launcher started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""
    local_world_size: int = 1
    id: str = ""
    """The same for all ranks of a launch; a restart has a new one."""
    host: str | None = None
    """Host of the launch's store; None if unknown."""
    port: int = 0
    has_store: bool = False
    """Whether the launcher serves the store; otherwise rank 0 does."""


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read this process's rank from the environment variables that the launcher sets.

    The variables of torchrun (accelerate launch sets the same) and mpirun take precedence over
    those of a SLURM step: both may run within one, and mpirun starts its own step with one task per
    node. Without a launcher, the process is rank 0 of 1.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torch(environ)
    for names in _MPIRUN_NAMES:
        if all(name in environ for name in names):
            return _mpi(environ, *(_number(environ, name, 0) for name in names))
    # Only srun sets the step. In a batch script, SLURM_NTASKS counts tasks that were not started.
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _slurm(environ)
    if "PMI_RANK" in environ and "PMI_SIZE" in environ:
        defaults = (0, 1, 0, 1)
        return _mpi(environ, *map(_number, repeat(environ), _PMI_NAMES, defaults))
    return Launch()


def num_cores(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of cores for this rank.

    Ranks of one machine share its cores evenly, unless SLURM binds each task to its own.
    """
    all_cores = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_cores
    launch = find_launch(environ)
    per_task = _number(environ, "SLURM_CPUS_PER_TASK", 0)
    if per_task and launch.world_size > 1:
        return max(1, min(mine, per_task))
    is_bound = mine < all_cores and "SLURM_STEP_ID" in environ
    return mine if is_bound else max(1, mine // launch.local_world_size)


def num_allocated_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs of this machine the SLURM step has, over all its tasks; 0 if unknown.

    A task may see fewer of them: only its own.
    """
    return _number(environ, "SLURM_GPUS_ON_NODE", 0) if "SLURM_STEP_ID" in environ else 0


def this_place(environ: Mapping[str, str] = os.environ) -> str:
    """Return the host name of this process, followed by its SLURM job if it has one."""
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    job = slurm_job(environ)
    return f"{host}, job {job}" if job else host


def slurm_job(environ: Mapping[str, str] = os.environ) -> str:
    """Return the id of this process's job as SLURM's commands take it; empty without a job.

    For an array task it is ARRAY_INDEX, since the last task's SLURM_JOB_ID is the array's id.
    """
    array, element = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else environ.get("SLURM_JOB_ID", "")


def _torch(environ: Mapping[str, str]) -> Launch:
    rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", rank),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", 1),
        id="-".join(
            environ.get(name, "")
            for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID")
        ),
        host=environ.get("MASTER_ADDR"),
        port=_number(environ, "MASTER_PORT", 29_500),
        has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _slurm(environ: Mapping[str, str]) -> Launch:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    id = "-".join(environ.get(name, "0") for name in names)
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
    counts = [int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", tasks)]
    return Launch(
        rank=_number(environ, "SLURM_PROCID", 0),
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1)),
        local_rank=_number(environ, "SLURM_LOCALID", 0),
        local_world_size=max(counts, default=1),
        id=id,
        host=environ.get("MASTER_ADDR")
        or first_host(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))),
        port=_number(environ, "MASTER_PORT", 0) or _port_of(id),
    )


def _mpi(
    environ: Mapping[str, str], rank: int, size: int, local_rank: int, local_size: int
) -> Launch:
    id = environ.get("PMIX_NAMESPACE", "")
    return Launch(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        id=id,
        # Without an id, two launches on one machine would meet at one port.
        host=environ.get("MASTER_ADDR") or ("127.0.0.1" if id and local_size == size else None),
        port=_number(environ, "MASTER_PORT", 0) or _port_of(id),
    )


def _port_of(id: str) -> int:
    """Derive a port from the launch id, so that launches on one machine rarely share a port."""
    return _FIRST_PORT + zlib.crc32(id.encode()) % _NUM_PORTS


def first_host(nodes: str) -> str | None:
    """Return the first host of a SLURM node list: `rack[2,7-9]n[01-04],login` -> `rack2n01`."""
    name = re.sub(r"\[([^\]\-,]+)[^\]]*\]", r"\1", nodes)
    return name.partition(",")[0] or None


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else default
