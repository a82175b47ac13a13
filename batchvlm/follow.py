"""A process that holds a part of a model whose other parts, and the job, are another process's."""

from __future__ import annotations

from batchvlm.config import JobConfig
from batchvlm.runtime.launch import find_launch
from batchvlm.runtime.ranks import find_rank
from batchvlm.runtime.replicas import Leader, Replica, find_replica
from batchvlm.runtime.signals import ignore_signals
from batchvlm.runtime.trackers import prepare_trackers
from batchvlm.runtime.watchdog import Watchdog


def follower_of(cfg: JobConfig) -> Replica | None:
    """The replica in which this process follows another one; None: the job is its own.

    Raises:
        ConfigError: the processes of the launch do not divide into replicas.
    """
    replica = find_replica(find_launch(), cfg.model)
    return replica if replica is not None and replica.rank else None


def follow_job(cfg: JobConfig, replica: Replica) -> None:
    """Do each step of the model with the process that leads this one, until it is done.

    Raises:
        ReplicaError: it has ended.
        ConfigError: `engine.device` names a device that is not here, or what the leader refuses.
    """
    prepare_trackers(cfg.tracking)  # where the leader ends before it can be met
    # No row is its own, so a stall is the leader's to notice.
    watchdog = Watchdog(stall_timeout_s=None, grace_s=cfg.runtime.grace_s)
    with watchdog, Leader(replica) as leader:
        rank = find_rank(replica.launch, cfg.engine, cfg.runtime, cfg.model)
        from batchvlm.engine.select import follow_leader

        follow_leader(leader, device=rank.device)
    ignore_signals()
