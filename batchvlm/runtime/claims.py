"""State shared by the ranks of a launch: the next shard to claim, and each rank's progress.

Both are kept in a torch.distributed store. The launcher serves it (torchrun, accelerate), or else
rank 0 does. There is no process group, so no rank waits for another: the shards that a dead rank
had claimed are left to the next run, and a rank that starts late claims from what remains.

If the host of rank 0 is unknown, there is no store, and each rank takes every `world_size`-th
shard. If the store stops answering, a rank gives it up and takes every `world_size`-th of the
shards after its last one, even if another rank has claimed them. Two writers of one shard waste
work but do no other harm.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from batchvlm.records import Shard
from batchvlm.runtime.clock import RunningClock
from batchvlm.runtime.launch import Launch
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.watchdog import Ticker
from batchvlm.words import one_line

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 120.0
"""Rank 0 may be late to serve the store: libraries load slowly from a busy disk."""
_REQUEST_TIMEOUT_S = 30.0
"""A machine that fails may leave its connections open."""
_HEARTBEAT_TIMEOUT_S = 30.0
"""A rank without a heartbeat for this long is dead or unreachable."""
HEARTBEAT_EVERY_S = 1.0
"""Seconds between two heartbeats of a rank."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The progress of one rank, sent as its heartbeat."""

    num_rows: int = 0
    num_found: int = 0
    """Rows that earlier runs finished in shards that were still incomplete."""
    num_errors: int = 0
    completion_tokens: int = 0
    num_heartbeats: int = 0
    """Number of heartbeats; it changes even during a long row or while the model loads."""
    is_over: bool = False


class StoreLost(Exception):
    """The store does not answer. The message is the reason."""


class Peers:
    """Claims shards and exchanges progress with the other ranks of a launch. Thread-safe.

    Args:
        launch: the launch, and this process's rank in it.
        key: names the job within the launch; the same on all ranks.
        connect: opens the store. Called once, by the thread that makes the first claim.
        clock: seconds; by default a `RunningClock`.
    """

    def __init__(
        self,
        launch: Launch,
        key: str,
        *,
        connect: Callable[[Launch], Any] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._launch = launch
        self._prefix = f"batchvlm/{launch.id}/{key}"
        self._connect = connect or open_store
        self._has_store = connect is not None or launch.host is not None
        self._clock = clock or RunningClock()
        self._lock = threading.Lock()
        self._store: Any = None
        self._heartbeats: dict[int, tuple[Counts, float]] = {}
        self._num_heartbeats = 0
        self._is_over = False
        self.is_lost = False
        """Whether the store was given up. Some shards may then be left to the next run."""

    def claim(self, num_shards: int) -> Iterator[int]:
        """Yield shard indices; while the store answers, each index goes to one rank only."""
        last = -1
        rank, world_size = self._launch.rank, self._launch.world_size
        if not self._has_store:
            log.warning(
                "rank %d of %d takes as many shards as the others, however fast it is: "
                "MASTER_ADDR is not set",
                rank,
                world_size,
            )
            yield from range(rank, num_shards, world_size)
            return
        try:
            while (place := self._claim_next()) < num_shards:
                last = place
                yield place
            return
        except StoreLost as error:
            log.warning(
                "rank %d of %d goes on without the others' store: %s", rank, world_size, error
            )
        yield from (p for p in range(last + 1, num_shards) if p % world_size == rank)

    @contextmanager
    def exchange(self, metrics: Metrics) -> Iterator[None]:
        """Send and read heartbeats every second; on exit, send one that says the rank is done."""

        def exchange_once() -> None:
            self.send_heartbeat(metrics)
            self.read_heartbeats()

        with Ticker(exchange_once, every_s=HEARTBEAT_EVERY_S, name="peers"):
            try:
                yield
            finally:
                self._is_over = True
                self.send_heartbeat(metrics)

    def send_heartbeat(self, metrics: Metrics) -> None:
        """Write this rank's heartbeat to the store."""
        self._num_heartbeats += 1
        counts = Counts(
            num_heartbeats=self._num_heartbeats,
            num_rows=metrics.num_rows,
            num_found=metrics.num_found,
            num_errors=metrics.num_errors,
            completion_tokens=metrics.completion_tokens,
            is_over=self._is_over,
        )
        key = f"{self._prefix}/{self._launch.rank}"
        self._try_request(lambda store: store.set(key, json.dumps(asdict(counts))))

    def read_heartbeats(self) -> None:
        """On rank 0, read the heartbeats of the others; on other ranks, do nothing."""
        if self._launch.rank == 0:
            self._try_request(self._read_all)

    def others(self) -> list[Counts]:
        """Return the last counts of each other rank that was heard, dead ones included."""
        with self._lock:
            return [counts for counts, _ in self._heartbeats.values()]

    def wait_for_others(self, wait: Callable[[], object]) -> None:
        """On rank 0, wait until the others are done: it serves the store and shows their rows.

        A rank without a heartbeat for 30 seconds is not waited for.

        Args:
            wait: called between two checks; it should block for a moment.
        """
        while self._launch.rank == 0 and not self.is_lost:
            self.read_heartbeats()
            now = self._clock()
            with self._lock:
                latest = list(self._heartbeats.values())
            if all(counts.is_over or now - at_s > _HEARTBEAT_TIMEOUT_S for counts, at_s in latest):
                return
            wait()

    def _claim_next(self) -> int:
        return self._request(
            lambda: int(self._connected_store().add(f"{self._prefix}/next", 1)) - 1
        )

    def _connected_store(self) -> Any:
        if self._store is None:
            store = self._connect(self._launch)
            with self._lock:
                self._store = store
        return self._store

    def _read_all(self, store: Any) -> None:
        now = self._clock()
        for rank in range(1, self._launch.world_size):
            key = f"{self._prefix}/{rank}"
            if not store.check([key]):
                continue
            counts = Counts(**json.loads(store.get(key)))
            with self._lock:
                if rank not in self._heartbeats or self._heartbeats[rank][0] != counts:
                    self._heartbeats[rank] = (counts, now)

    def _try_request(self, call: Callable[[Any], object]) -> None:
        """Make an optional request, if the store is connected; ignore a failure."""
        # Does not connect, which may take long.
        with self._lock:
            store = None if self.is_lost else self._store
        if store is not None:
            with suppress(StoreLost):
                self._request(lambda: call(store))

    def _request(self, call: Callable[[], T]) -> T:
        limit_s = (
            _REQUEST_TIMEOUT_S
            if self._store is not None
            else _CONNECT_TIMEOUT_S + _REQUEST_TIMEOUT_S
        )
        if self.is_lost:
            raise StoreLost("it did not answer before")
        try:
            return _within(limit_s, call)
        except Exception as error:  # torch's exceptions, network errors, invalid JSON
            self.is_lost = True
            raise StoreLost(one_line(error)) from error


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """Run a call that may never return in a thread of its own, and wait for it.

    Raises:
        TimeoutError: it has not returned within `limit_s`.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not future.done():
        raise TimeoutError(f"no answer for {limit_s:g} s")
    return future.result()


def claim_shards(
    mine: Sequence[Shard], is_todo: Callable[[Shard], bool], peers: Peers | None
) -> Iterator[Shard]:
    """Iterate over the shards for this rank, each claimed when it is reached.

    Args:
        mine: the shards of this task; the same list on all of its ranks.
        is_todo: whether a shard has rows left to compute.
        peers: claims the shards; None if there are no other ranks.
    """
    places = range(len(mine)) if peers is None else peers.claim(len(mine))
    return (mine[place] for place in places if is_todo(mine[place]))


@cache
def open_store(launch: Launch) -> Any:
    """Connect to the store of a launch, or serve it. Cached for the life of the process.

    Raises:
        RuntimeError: no process serves the store.
    """
    assert launch.host is not None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    is_server = launch.rank == 0 and not launch.has_store
    store = TCPStore(
        launch.host,
        launch.port,
        is_master=is_server,
        wait_for_workers=False,
        timeout=timedelta(seconds=_CONNECT_TIMEOUT_S),
    )
    # If rank 0 could not bind the port, another job's store may listen there. It lacks this key.
    key = f"batchvlm/{launch.id}/host"
    if is_server or launch.has_store:
        store.set(key, "here")
    else:
        store.wait([key], timedelta(seconds=_REQUEST_TIMEOUT_S))
    return store
