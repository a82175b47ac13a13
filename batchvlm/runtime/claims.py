"""What the ranks of a launch share: the number of the next shard, and how far each of them is.

Both live in a store of torch.distributed: the launcher's own (torchrun, accelerate), else one that
rank 0 serves. There is no process group, so nobody waits for anybody: a rank that dies leaves the
shards that it had claimed to the next run, a rank that comes late claims what is left.

Where nobody says on which machine rank 0 is, there is no store, and each rank takes every
`world_size`-th shard. A store that does not answer is given up: from then on each rank takes every
`world_size`-th of the shards behind its last one, whoever else had claimed them. Two writers of one
shard waste work and nothing else.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import cache
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from batchvlm.records import Shard
from batchvlm.runtime.clock import RunningClock
from batchvlm.runtime.launch import Launch
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.watchdog import Ticker

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_S = 120.0
"""How long a rank waits for rank 0 to serve the store: libraries load slowly on a busy disk."""
_ANSWER_S = 30.0
"""A store that takes longer is not there any more: its machine may have gone without a word."""
_SILENT_S = 30.0
"""A rank that has said nothing for so long is dead, or cut off."""
TALK_EVERY_S = 1.0
"""How often ranks say how far they are."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How far one rank is."""

    num_rows: int = 0
    num_found: int = 0
    """Rows that earlier runs had finished, in shards that were not."""
    num_errors: int = 0
    completion_tokens: int = 0
    num_told: int = 0
    """How often it has said so: a rank at a long row, or loading its model, is alive as well."""
    is_over: bool = False


class StoreLost(Exception):
    """The store does not answer; the reason as text."""


class Peers:
    """The other ranks of a launch, as far as this one knows them. For any thread.

    Args:
        launch: which of them this process is.
        key: names the job within the launch, the same on all ranks.
        connect: gives the store. Called once, in the thread that needs it first.
        clock: seconds; by default those for which this process runs.
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
        self._heard: dict[int, tuple[Counts, float]] = {}
        self._num_told = 0
        self._is_over = False
        self.is_lost = False
        """Whether shards are taken without the store, and some may be left to the next run."""

    def claim(self, num_shards: int) -> Iterator[int]:
        """Yield places among `num_shards`, each to one rank alone as long as the store answers."""
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
            while (place := self._next_place()) < num_shards:
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
        """Say every second how far this rank is, and hear it of the others; in the end, say so."""

        def talk() -> None:
            self.tell(metrics)
            self.hear()

        with Ticker(talk, every_s=TALK_EVERY_S, name="peers"):
            try:
                yield
            finally:
                self._is_over = True
                self.tell(metrics)

    def tell(self, metrics: Metrics) -> None:
        """Say how far this rank is."""
        self._num_told += 1
        counts = Counts(
            num_told=self._num_told,
            num_rows=metrics.num_rows,
            num_found=metrics.num_found,
            num_errors=metrics.num_errors,
            completion_tokens=metrics.completion_tokens,
            is_over=self._is_over,
        )
        key = f"{self._prefix}/{self._launch.rank}"
        self._mention(lambda store: store.set(key, json.dumps(asdict(counts))))

    def hear(self) -> None:
        """As rank 0, hear how far the others are."""
        if self._launch.rank == 0:
            self._mention(self._hear_all)

    def heard(self) -> list[Counts]:
        """How far each other rank was when it last said so, dead ones included."""
        with self._lock:
            return [counts for counts, _ in self._heard.values()]

    def see_off(self, wait: Callable[[], object]) -> None:
        """As rank 0, stay until the others are done: they need the store, and a bar to be seen in.

        One that has said nothing for half a minute is not waited for.

        Args:
            wait: called again and again; takes a while.
        """
        while self._launch.rank == 0 and not self.is_lost:
            self.hear()
            now = self._clock()
            with self._lock:
                heard = list(self._heard.values())
            if all(counts.is_over or now - at_s > _SILENT_S for counts, at_s in heard):
                return
            wait()

    def _next_place(self) -> int:
        return self._ask(lambda: int(self._open().add(f"{self._prefix}/next", 1)) - 1)

    def _open(self) -> Any:
        if self._store is None:
            store = self._connect(self._launch)
            with self._lock:
                self._store = store
        return self._store

    def _hear_all(self, store: Any) -> None:
        for rank in range(1, self._launch.world_size):
            key = f"{self._prefix}/{rank}"
            if not store.check([key]):
                continue
            said = json.loads(store.get(key))
            counts = Counts(**{field.name: said[field.name] for field in fields(Counts)})
            with self._lock:
                if rank not in self._heard or self._heard[rank][0] != counts:
                    self._heard[rank] = (counts, self._clock())

    def _mention(self, call: Callable[[Any], object]) -> None:
        """Ask for what the run can do without, of a store that is there already."""
        # Not the one to connect: that may take long.
        with self._lock:
            store = None if self.is_lost else self._store
        if store is not None:
            with suppress(StoreLost):
                self._ask(lambda: call(store))

    def _ask(self, call: Callable[[], T]) -> T:
        limit_s = _ANSWER_S if self._store is not None else _CONNECT_S + _ANSWER_S
        if self.is_lost:
            raise StoreLost("it did not answer before")
        try:
            return _Answer(call).within(limit_s)
        except Exception as error:  # torch's own, the network's, a JSON that is none
            self.is_lost = True
            raise StoreLost(" ".join(str(error).split())[:200]) from error


class _Answer(Generic[T]):
    """A call in a thread of its own, which may never come back."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._queue: SimpleQueue[tuple[T | None, Exception | None]] = SimpleQueue()
        threading.Thread(target=self._run, name="store", daemon=True).start()

    def within(self, limit_s: float) -> T:
        try:
            value, error = self._queue.get(timeout=limit_s)
        except Empty:
            raise TimeoutError(f"no answer for {limit_s:g} s") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._queue.put((self._call(), None))
        except Exception as error:
            self._queue.put((None, error))


def claim_shards(
    mine: Sequence[Shard], is_todo: Callable[[Shard], bool], peers: Peers | None
) -> Iterator[Shard]:
    """The shards that this rank computes, each claimed when it is asked for.

    Args:
        mine: the shards of this task, the same list on all of its ranks.
        is_todo: whether a shard has rows to compute.
        peers: None: there are no other ranks.
    """
    places = range(len(mine)) if peers is None else peers.claim(len(mine))
    return (mine[place] for place in places if is_todo(mine[place]))


@cache
def open_store(launch: Launch) -> Any:
    """The store of a launch, for as long as this process lives.

    Raises:
        RuntimeError: nobody serves it.
    """
    assert launch.host is not None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    is_server = launch.rank == 0 and not launch.has_store
    store = TCPStore(
        launch.host,
        launch.port,
        is_master=is_server,
        wait_for_workers=False,
        timeout=timedelta(seconds=_CONNECT_S),
    )
    # Somebody else's store may listen there, where rank 0 could not: then nobody is our host.
    key = f"batchvlm/{launch.id}/host"
    if is_server or launch.has_store:
        store.set(key, "here")
    else:
        store.wait([key], timedelta(seconds=_ANSWER_S))
    return store
