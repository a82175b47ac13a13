"""Replicas: groups of processes on one machine that share one model by tensor parallelism.

The leader claims shards, prepares rows and writes. The followers run the same model steps. They are
connected by Unix sockets, so each process learns at once when another one ends.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self

from batchvlm.config import ModelConfig
from batchvlm.errors import ConfigError, ExitCode, ReplicaError
from batchvlm.runtime.claims import open_store
from batchvlm.runtime.launch import Launch
from batchvlm.runtime.signals import interrupted_at_s
from batchvlm.words import one_line

_CONNECT_TIMEOUT_S = 150.0
"""Libraries load slowly from a busy disk."""
_NOTICE_S = 10.0
"""A process in a model step this long after another one ended is considered stuck."""

_meetings = itertools.count()
"""Number of the job, in its store key. All processes of a launch run the same jobs in order."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """The replica of this process: `size` consecutive ranks of one machine."""

    launch: Launch
    """The whole launch, with all its ranks."""
    size: int

    @property
    def index(self) -> int:
        """Index of this replica in the launch."""
        return self.launch.rank // self.size

    @property
    def rank(self) -> int:
        """Rank within the replica; 0 is the leader."""
        return self.launch.rank % self.size

    @property
    def num_replicas(self) -> int:
        return self.launch.world_size // self.size

    @property
    def leaders(self) -> Launch:
        """A launch that consists of the leaders only."""
        return replace(
            self.launch,
            rank=self.index,
            world_size=self.num_replicas,
            local_rank=self.launch.local_rank // self.size,
            local_world_size=self.launch.local_world_size // self.size,
        )

    def open_store(self, _: Launch | None = None) -> Any:
        """Return the store of the whole launch."""
        return open_store(self.launch)


def find_replica(launch: Launch, model: ModelConfig) -> Replica | None:
    """Return the replica of this process; None if `model.tp_plan` is not set.

    Raises:
        ConfigError: the processes of the launch do not form replicas.
    """
    if model.tp_plan is None:
        return None
    num_ranks = launch.local_world_size
    size = model.gpus_per_replica or num_ranks
    if launch.world_size == 1 or size == 1:
        raise ConfigError(
            f"model.tp_plan={model.tp_plan} divides the model among several processes of a launch, "
            "and a replica has one",
            hint="start one for each GPU, as torchrun --nproc-per-node 4 jobs/caption.py does",
        )
    if num_ranks % size or launch.world_size % num_ranks:
        raise ConfigError(
            f"model.gpus_per_replica={size}: the {num_ranks} processes of this machine, of "
            f"{launch.world_size}, do not divide into replicas",
            hint="start a multiple of it on each machine, as many on each",
        )
    if launch.rank % num_ranks != launch.local_rank:
        raise ConfigError(
            "model.tp_plan needs consecutive ranks on each machine",
            hint="srun --distribution=block numbers them so",
        )
    if launch.host is None:
        raise ConfigError(
            "model.tp_plan: the launcher does not say where rank 0 is", hint="set MASTER_ADDR"
        )
    return Replica(launch=launch, size=size)


@dataclass(eq=False)
class _Received:
    """A message from another process, or the end of its connection."""

    message: Any = None
    is_end: bool = False
    """Whether the connection has ended."""
    is_noticed: threading.Event = field(default_factory=threading.Event)
    """Set when the main thread has taken the message."""


class Followers:
    """The leader's connections to its followers; a context manager.

    Entering waits for all followers to connect. Exiting tells them that the job is done.

    Args:
        replica: the replica that this process leads.
    """

    def __init__(self, replica: Replica) -> None:
        self.rank, self.size = replica.rank, replica.size
        self.on_loss: Callable[[str], object] = _exit_interrupted
        """Called if this process is stuck waiting for a follower that ended or failed."""
        self.replica = replica
        # A socket's path must be short. Only this user has access to the folder.
        self.folder = Path(tempfile.mkdtemp(prefix="batchvlm-", dir="/tmp"))
        self._connections: dict[int, Connection] = {}
        self._received: dict[int, SimpleQueue[_Received]] = {}
        self._is_left = False

    def __enter__(self) -> Self:
        try:
            self._accept_followers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._is_left = True
        for connection in self._connections.values():
            with suppress(OSError):
                connection.send(None)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _accept_followers(self) -> None:
        end_s = time.monotonic() + _CONNECT_TIMEOUT_S
        with socket.socket(socket.AF_UNIX) as server:
            address = str(self.folder / "s")
            server.bind(address)
            server.listen(self.size)
            try:
                self.replica.open_store().set(_key(self.replica), address)
            except RuntimeError as error:  # includes torch.distributed's errors
                reason = one_line(error)
                raise ReplicaError(f"cannot connect to the launch's store: {reason}") from error
            while len(self._connections) < self.size - 1:
                server.settimeout(max(0.1, end_s - time.monotonic()))
                try:
                    peer, _ = server.accept()
                except TimeoutError as error:
                    raise ReplicaError(
                        f"{self.size - 1 - len(self._connections)} of the {self.size} processes "
                        f"that hold the model together did not connect in {_CONNECT_TIMEOUT_S:g} s"
                    ) from error
                peer.setblocking(True)
                connection = Connection(peer.detach())
                rank = connection.recv()
                self._connections[rank], self._received[rank] = connection, SimpleQueue()
        for rank, connection in self._connections.items():
            listen = threading.Thread(
                target=self._listen, args=(rank, connection), name="followers", daemon=True
            )
            listen.start()

    def _listen(self, rank: int, connection: Connection) -> None:
        is_end = False
        while not is_end:
            received = _receive(connection)
            is_end = received.is_end
            self._received[rank].put(received)
            if not (is_end or received.message is not None) or received.is_noticed.wait(_NOTICE_S):
                continue
            # After a signal, this process is already stopping.
            if not self._is_left and interrupted_at_s() is None:
                shutil.rmtree(self.folder, ignore_errors=True)  # `on_loss` exits without clean-up
                self.on_loss(_loss_message(rank, received))

    def send(self, message: object) -> None:
        """Send a message to all followers.

        Raises:
            ReplicaError: a follower has ended.
        """
        for rank, connection in self._connections.items():
            try:
                connection.send(message)
            except OSError as error:
                raise ReplicaError(_loss_message(rank, _Received(is_end=True))) from error

    def gather(self, limit_s: float) -> str | None:
        """Wait for every follower's answer; return the first error message, or None.

        Raises:
            ReplicaError: a follower has ended, or did not answer within `limit_s` seconds.
        """
        end_s = time.monotonic() + limit_s
        texts = []
        for rank, queue in self._received.items():
            try:
                received = queue.get(timeout=max(0.0, end_s - time.monotonic()))
            except Empty:
                raise ReplicaError(
                    f"process {rank} of the {self.size} that hold the model together did not "
                    f"answer within {limit_s:g} s"
                ) from None
            received.is_noticed.set()
            if received.is_end:
                raise ReplicaError(_loss_message(rank, received))
            texts.append(received.message)
        return next((text for text in texts if text is not None), None)


class Leader:
    """A follower's connection to its leader; a context manager."""

    def __init__(self, replica: Replica) -> None:
        self.rank, self.size = replica.rank, replica.size
        self._replica = replica
        self._peer = socket.socket(socket.AF_UNIX)
        self._received: SimpleQueue[_Received] = SimpleQueue()

    def __enter__(self) -> Self:
        store = self._replica.open_store()
        key = _key(self._replica)
        try:
            store.wait([key], timedelta(seconds=_CONNECT_TIMEOUT_S))
            address = store.get(key).decode()
            self._peer.connect(address)
        except (RuntimeError, OSError) as error:
            raise ReplicaError("cannot connect to the process that leads this replica") from error
        self.folder = Path(address).parent
        self._connection = Connection(os.dup(self._peer.fileno()))
        self._connection.send(self.rank)
        threading.Thread(target=self._listen, name="leader", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # The leader sees this at once, however long this process takes to exit.
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        is_end = False
        while not is_end:
            received = _receive(self._connection)
            is_end = received.is_end or received.message is None
            self._received.put(received)
        if received.is_end:
            shutil.rmtree(self.folder, ignore_errors=True)  # the leader can no longer do it
        if not received.is_noticed.wait(_NOTICE_S) and interrupted_at_s() is None:
            # The main thread is stuck in a model step whose peer is gone.
            if received.is_end:
                _exit_interrupted("the process that leads this replica has ended")
            os._exit(ExitCode.DONE)

    def receive(self) -> Any:
        """Wait for the leader's next message; None means that the job is done.

        Raises:
            ReplicaError: the leader has ended.
        """
        received = self._received.get()
        received.is_noticed.set()
        if received.is_end:
            raise ReplicaError("the process that leads this replica has ended")
        return received.message

    def answer(self, text: str | None) -> None:
        """Send the outcome of the last message: None for success, else the error message."""
        with suppress(OSError):  # the next `receive` raises if the leader is gone
            self._connection.send(text)


def _key(replica: Replica) -> str:
    return f"batchvlm/{replica.launch.id}/replica/{replica.index}/{next(_meetings)}"


def _receive(connection: Connection) -> _Received:
    try:
        return _Received(connection.recv())
    except (EOFError, OSError):
        return _Received(is_end=True)


def _loss_message(rank: int, received: _Received) -> str:
    what = "has ended" if received.is_end else f"failed: {received.message}"
    return f"process {rank} of those that hold the model together {what}"


def _exit_interrupted(reason: str) -> None:
    print(f"batchvlm: error: {reason}; run the same command again", file=sys.stderr, flush=True)
    os._exit(ExitCode.INTERRUPTED)
