"""The job of a follower: a process that holds a shard of the model and serves a leader."""

from __future__ import annotations

from batchvlm.config import JobConfig
from batchvlm.runtime.launch import find_launch
from batchvlm.runtime.ranks import find_devices
from batchvlm.runtime.replicas import Leader, Replica, find_replica
from batchvlm.runtime.signals import ignore_signals
from batchvlm.runtime.trackers import prepare_trackers
from batchvlm.runtime.watchdog import Watchdog


def follower_of(cfg: JobConfig) -> Replica | None:
    """Return the replica in which this process is a follower; None if it leads or has no replica.

    Raises:
        ConfigError: as `find_replica`.
    """
    replica = find_replica(find_launch(), cfg.model)
    return replica if replica is not None and replica.rank else None


def follow_job(cfg: JobConfig, replica: Replica) -> None:
    """Run every model step together with the leader, until the job is done.

    Raises:
        ReplicaError: the leader has ended.
        ConfigError: `engine.device` names a missing device, or a setting that the leader refuses.
    """
    # The leader fails on a missing tracker before it connects, so the follower checks it too.
    prepare_trackers(cfg.tracking)
    # A follower finishes no rows of its own; the leader's watchdog detects stalls.
    watchdog = Watchdog(stall_timeout_s=None, grace_s=cfg.runtime.grace_s)
    with watchdog, Leader(replica) as leader:
        devices = find_devices(replica.launch, cfg.engine, cfg.runtime, cfg.model)
        from batchvlm.engine.select import follow_leader

        follow_leader(leader, device=devices.first)
    ignore_signals()
