"""Which process of a launch this is, by the variables of torchrun, accelerate, srun or MPI.

Nothing here waits for another process: a rank that never comes holds nobody up.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

_MPIRUN_NAMES = (
    # Open MPI, then MPICH and Intel MPI: rank, ranks, and both on this machine.
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
"""Below the range from which Linux gives ports to outgoing connections."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A process among those that one command started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Place among the ranks of this machine."""
    local_world_size: int = 1
    id: str = ""
    """The same for all ranks of a launch, another one after a restart."""
    host: str | None = None
    """Where the launch's store is; None: nobody said."""
    port: int = 0
    has_store: bool = False
    """Whether the launcher itself serves the store; else rank 0 does."""


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read which rank this is from what the launcher left in the environment.

    torchrun's variables (accelerate launch sets the same) and mpirun's come before those of a SLURM
    step: both are started in one, and mpirun starts a step of its own with a task a node. A process
    that nobody launched is alone.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torch(environ)
    for names in _MPIRUN_NAMES:
        if all(name in environ for name in names):
            return _mpi(environ, *(_number(environ, name, 0) for name in names))
    # Only srun sets the step: in a batch script SLURM_NTASKS counts tasks that nobody started.
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _slurm(environ)
    return Launch()


def num_cores(environ: Mapping[str, str] = os.environ) -> int:
    """Cores that are this rank's: ranks of one machine share them, unless each has its own."""
    all_cores = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_cores
    launch = find_launch(environ)
    per_task = _number(environ, "SLURM_CPUS_PER_TASK", 0)
    if per_task and launch.world_size > 1:
        return max(1, min(mine, per_task))
    is_bound = mine < all_cores and "SLURM_STEP_ID" in environ
    return mine if is_bound else max(1, mine // launch.local_world_size)


def num_allocated_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs of this machine that are the SLURM step's, all its tasks together; 0: it does not say.

    A task may see its own alone.
    """
    return _number(environ, "SLURM_GPUS_ON_NODE", 0) if "SLURM_STEP_ID" in environ else 0


def this_place(environ: Mapping[str, str] = os.environ) -> str:
    """Where somebody has to look for this process: its machine, and its SLURM job if it has one."""
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    job = slurm_job(environ)
    return f"{host}, job {job}" if job else host


def slurm_job(environ: Mapping[str, str] = os.environ) -> str:
    """What SLURM's commands call the job that this process is of; empty: of none.

    The last element of an array has the number of the whole array as its SLURM_JOB_ID.
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
        host=environ.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else None),
        port=_number(environ, "MASTER_PORT", 0) or _port_of(id),
    )


def _port_of(id: str) -> int:
    """Two launches on one machine shall not want the same port."""
    return _FIRST_PORT + zlib.crc32(id.encode()) % _NUM_PORTS


def first_host(nodes: str) -> str | None:
    """The first name of a SLURM node list: `rack[2,7-9]n[01-04],login` -> `rack2n01`."""
    name = re.sub(r"\[([^\]\-,]+)[^\]]*\]", r"\1", nodes)
    return name.partition(",")[0] or None


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else default
