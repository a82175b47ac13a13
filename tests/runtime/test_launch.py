"""Which rank a process is, by what each launcher leaves in the environment."""

from __future__ import annotations

import os

import pytest

from batchvlm.runtime.launch import Launch, find_launch, first_host, num_cores

TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "node7", "MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "none"},
    **{"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"},
}
SRUN = {
    **{"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[2-3]"},
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_a_process_that_nobody_launched_is_alone() -> None:
    assert find_launch({"PATH": "/bin"}) == Launch()


def test_torchrun_and_accelerate() -> None:
    launch = find_launch(TORCHRUN)
    assert (launch.rank, launch.world_size) == (5, 8)
    assert (launch.local_rank, launch.local_world_size) == (1, 4)
    assert (launch.host, launch.port, launch.has_store) == ("node7", 29511, True)
    assert find_launch(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"}).id != launch.id


def test_variables_set_by_hand_leave_the_store_to_rank_0() -> None:
    launch = find_launch({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"})
    assert not launch.has_store and launch.world_size == 2


def test_one_srun_task_a_rank() -> None:
    launch = find_launch(SRUN)
    assert (launch.rank, launch.world_size) == (3, 4)
    assert (launch.local_rank, launch.local_world_size) == (1, 2)
    assert launch.host == "n2"
    # The ranks of a step agree on a port; another step, or the job after a requeue, has another.
    assert find_launch(SRUN | {"SLURM_PROCID": "0"}).port == launch.port
    for other in ({"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}):
        assert find_launch(SRUN | other).port != launch.port
        assert find_launch(SRUN | other).id != launch.id
    assert find_launch(SRUN | {"MASTER_ADDR": "x", "MASTER_PORT": "5"}).host == "x"


def test_torchrun_within_a_step_comes_first() -> None:
    assert find_launch(SRUN | TORCHRUN).rank == 5


def test_a_batch_script_is_no_rank_of_the_tasks_it_has_room_for() -> None:
    batch = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert find_launch(batch) == Launch()


MPIRUN = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    "PMIX_NAMESPACE": "2032402433",
}


def test_mpirun() -> None:
    launch = find_launch(MPIRUN)
    assert (launch.rank, launch.world_size) == (3, 4)
    assert (launch.local_rank, launch.local_world_size) == (1, 2)
    assert launch.host is None
    other = find_launch(MPIRUN | {"PMIX_NAMESPACE": "2032402434"})
    assert (other.port, other.id) != (launch.port, launch.id)
    assert find_launch(MPIRUN | {"MASTER_ADDR": "x", "MASTER_PORT": "5"}).port == 5
    # All on one machine need nobody to tell them where rank 0 is.
    assert find_launch(MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).host == "127.0.0.1"


def test_mpirun_within_a_job_starts_a_step_that_is_not_its_ranks() -> None:
    step = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert find_launch(step | MPIRUN) == find_launch(MPIRUN)
    hydra = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    launch = find_launch(step | hydra)
    assert (launch.rank, launch.world_size, launch.local_rank) == (3, 4, 1)
    assert launch.host is None
    # srun --mpi=pmi2 sets some of them, and the tasks are the ranks.
    assert find_launch(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}) == find_launch(SRUN)


def test_other_launchers_with_pmi() -> None:
    alone = {"PMI_RANK": "3", "PMI_SIZE": "8"}
    launch = find_launch(alone)
    assert (launch.rank, launch.world_size, launch.local_rank) == (3, 8, 0)
    pals = alone | {"PMI_LOCAL_RANK": "3", "PMI_LOCAL_SIZE": "4"}
    launch = find_launch(pals)
    assert (launch.rank, launch.local_rank, launch.local_world_size) == (3, 3, 4)
    assert find_launch(SRUN | pals) == find_launch(SRUN)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("rack[2,7-9]n[01-04],login", "rack2n01"),
        ("a,b[1-2]", "a"),
        ("gpu[007,009]", "gpu007"),
        ("", None),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str | None) -> None:
    assert first_host(nodes) == host


def test_ranks_share_the_cores_of_their_machine() -> None:
    cores = len(os.sched_getaffinity(0))
    assert num_cores({}) == cores
    assert num_cores(TORCHRUN) == max(1, cores // 4)
    assert num_cores(SRUN | {"SLURM_CPUS_PER_TASK": "1"}) == 1
