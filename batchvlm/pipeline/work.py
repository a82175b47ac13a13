"""What this process has to do of a job: the shards that it claims, until its time is up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from batchvlm.config import TaskName
from batchvlm.engine import Engine
from batchvlm.pipeline.collector import Prepared
from batchvlm.pipeline.job import Job
from batchvlm.pipeline.turns import Turns
from batchvlm.records import Shard
from batchvlm.runtime.claims import Peers, claim_shards
from batchvlm.runtime.launch import Launch, find_launch
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.replicas import Followers
from batchvlm.runtime.walltime import Deadline


@dataclass(kw_only=True)
class Work:
    """The shards to compute, the processes that share them, and the deadline."""

    job: Job
    mine: Sequence[Shard]
    """The task's shards, the same on all of its ranks."""
    todo: Sequence[Shard]
    """The shards of these that were not finished at the start."""
    metrics: Metrics
    engine: Engine | None
    """Used in place of the model that the configuration names."""
    followers: Followers | None
    """The processes that hold the other parts of the model; None if this process holds all."""
    num_read: int = 0
    """Rows read from the source."""
    num_taken: int = 0
    """Rows that the engine took, or that failed before it."""

    @cached_property
    def launch(self) -> Launch:
        """The processes that share the shards: all of the launch, or the leaders of replicas."""
        return find_launch() if self.followers is None else self.followers.replica.leaders

    @cached_property
    def peers(self) -> Peers | None:
        """Claims shards among these processes; None if there is no other."""
        if self.launch.world_size == 1:
            return None
        connect = None if self.followers is None else self.followers.replica.open_store
        return Peers(self.launch, self.job.key, connect=connect)

    @cached_property
    def deadline(self) -> Deadline:
        """When to begin no further row; found out on the first use, which may take seconds."""
        return Deadline(self.job.cfg.runtime.walltime_margin_s)

    @cached_property
    def turns(self) -> Turns | None:
        """Takes the rows of dialogs back for their next turn; None with other tasks."""
        return Turns() if self.job.cfg.task.name is TaskName.dialog else None

    def shards(self) -> Iterator[Shard | None]:
        """Claim and yield shards for this rank until there is no time to begin another.

        Yields None as long as it is too early to claim the next shard. A rank that claims far ahead
        leaves nothing to ranks that start later, so it waits until the engine has taken half of the
        rows of its latest shard.
        """
        todo = {shard.index for shard in self.todo}
        shards = claim_shards(self.mine, lambda shard: shard.index in todo, self.peers)
        enough = 0
        while True:
            if self.peers is not None and self.num_read - self.num_taken > enough:
                yield None
                continue
            shard = next(shards, None)
            if shard is None or self.deadline.is_near():
                return
            enough = shard.num_rows // 2
            yield shard

    def take(self, items: Iterable[Prepared]) -> Iterator[Prepared]:
        """Pass rows on to the engine until there is no time to begin another."""
        for item in items:
            if self.deadline.is_near():
                return
            self.num_taken += 1
            yield item
