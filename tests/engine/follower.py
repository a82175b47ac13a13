"""The second process of a replica, for the tests of the first: it follows again and again."""

from __future__ import annotations

import os

import torch

from batchvlm.engine import generate
from batchvlm.engine.select import follow_leader
from batchvlm.errors import ReplicaError
from batchvlm.runtime.launch import Launch
from batchvlm.runtime.replicas import Leader, Replica

TOLD_TO_FAIL = 13
"""A batch with room for so many tokens makes the follower raise at its second step."""


def replica_of(rank: int, port: int) -> Replica:
    """One of two processes, which meet at a port."""
    return Replica(
        launch=Launch(
            rank=rank,
            world_size=2,
            local_rank=rank,
            local_world_size=2,
            id="test",
            host="127.0.0.1",
            port=port,
        ),
        size=2,
    )


def main(port: int) -> None:
    torch.set_num_threads(1)
    run = generate.GenerateEngine.generate

    def failing(self, batch, max_new_tokens, processor, criterion):  # type: ignore[no-untyped-def]
        if max_new_tokens == TOLD_TO_FAIL:
            raise ValueError("this process alone fails")
        return run(self, batch, max_new_tokens, processor, criterion)

    generate.GenerateEngine.generate = failing  # type: ignore[method-assign]
    replica = replica_of(1, port)
    while True:
        try:
            with Leader(replica) as leader:
                follow_leader(leader, device="cpu")
        except ReplicaError:
            os._exit(75)
