"""Fetch the remote images of records, many at once and ahead of the workers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Self

from batchvlm.errors import ErrorType, RowError
from batchvlm.fetch.addresses import Allowed
from batchvlm.fetch.client import Client, FetchLimits
from batchvlm.fetch.gate import Gate, Pass
from batchvlm.records import Failure, Record, size_of_value

_PATIENCE_S = 1.0
"""A row whose images take longer than this is overtaken by rows that are ready."""
_ROWS_PER_CONNECTION = 4
_MAX_BYTES = 256 << 20
"""Limit for fetched bytes that no worker has yet; above it, only the oldest row is read from."""
_CACHE_BYTES = 256 << 20

Fetched = bytes | Failure


@dataclass(eq=False)
class _Row:
    record: Record
    start_s: float
    gate: Pass
    result: Future[dict[str, Fetched]]


def _size_of(record: Record) -> int:
    return size_of_value(record.values) + size_of_value(record.kept)


@dataclass
class _State:
    """State that only the thread of the event loop uses."""

    client: Client
    gate: Gate
    under_way: dict[str, asyncio.Task[Fetched]] = field(default_factory=dict)
    cache: OrderedDict[str, bytes] = field(default_factory=OrderedDict)
    cached_bytes: int = 0


class Fetcher:
    """Fetches the images of records in a separate thread; a context manager.

    Order is kept, except that rows whose server is slow are overtaken. Memory is bounded by
    `max_bytes` of rows, `max_bytes` of fetched images, one more row, and `cache_bytes`.

    Args:
        allowed: addresses that are allowed in addition to the public web.
        limits: limits of time, size and attempts.
        addresses_of: returns every address among a record's images.
    """

    def __init__(
        self,
        allowed: Allowed,
        limits: FetchLimits,
        addresses_of: Callable[[Record], Sequence[str]],
        *,
        max_bytes: int = _MAX_BYTES,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._allowed, self._limits = allowed, limits
        self._addresses_of = addresses_of
        self._max_bytes, self._cache_bytes = max_bytes, cache_bytes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="fetch", daemon=True)
        self._state: _State

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ahead(self, records: Iterable[Record | None]) -> Iterator[Record | None]:
        """Yield every record once, with `fetched`; read ahead while images are being fetched.

        A None in `records` means that no record is available yet; it is yielded if no row is
        waiting.
        """
        waiting: deque[_Row] = deque()
        # Counts rows without addresses too: they wait to keep the order, and may hold images.
        size_bytes = 0
        max_rows = _ROWS_PER_CONNECTION * self._limits.concurrency
        for record in records:
            if record is None:
                if waiting:
                    ready = self._next(waiting)
                    size_bytes -= _size_of(ready)
                    yield ready
                else:
                    yield None
                continue
            addresses = [] if record.failure else self._addresses_of(record)
            if not addresses and not waiting:
                yield record
                continue
            waiting.append(self._start(record, addresses))
            size_bytes += _size_of(record)
            self._mark_oldest(waiting)
            while waiting and (
                len(waiting) >= max_rows or size_bytes > self._max_bytes or waiting[0].result.done()
            ):
                ready = self._next(waiting)
                size_bytes -= _size_of(ready)
                yield ready
        while waiting:
            yield self._next(waiting)

    def _next(self, waiting: deque[_Row]) -> Record:
        """Wait for the oldest row; if that takes longer than `_PATIENCE_S`, for any row."""
        self._mark_oldest(waiting)
        oldest = waiting[0]
        left_s = _PATIENCE_S - (time.monotonic() - oldest.start_s)
        if left_s > 0:
            wait([oldest.result], timeout=left_s)
        if not oldest.result.done():
            wait([row.result for row in waiting], return_when=FIRST_COMPLETED)
        row = next(row for row in waiting if row.result.done())
        waiting.remove(row)
        self._loop.call_soon_threadsafe(lambda: row.gate.give_back(row.gate.held_bytes))
        return replace(row.record, fetched=row.result.result())

    def _mark_oldest(self, waiting: deque[_Row]) -> None:
        if not waiting[0].gate.is_oldest:
            waiting[0].gate.is_oldest = True
            self._loop.call_soon_threadsafe(self._state.gate.changed)

    def _start(self, record: Record, addresses: Sequence[str]) -> _Row:
        row = _Row(record, time.monotonic(), Pass(self._state.gate), Future())
        if addresses:
            made = asyncio.run_coroutine_threadsafe(self._fetch_all(row, addresses), self._loop)
            row.result = made
        else:
            row.result.set_result({})
        return row

    # All methods below run in the thread of the event loop.

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _open(self) -> None:
        gate = Gate(self._limits.concurrency, self._max_bytes)
        self._state = _State(Client(self._allowed, self._limits), gate)
        await self._state.client.__aenter__()

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._state.client.__aexit__()

    async def _fetch_all(self, row: _Row, addresses: Sequence[str]) -> dict[str, Fetched]:
        distinct = list(dict.fromkeys(addresses))
        outcomes = await asyncio.gather(*(self._fetch(row, address) for address in distinct))
        return dict(zip(distinct, outcomes, strict=True))

    async def _fetch(self, row: _Row, address: str) -> Fetched:
        state = self._state
        if address in state.cache:
            state.cache.move_to_end(address)
            return state.cache[address]
        task = state.under_way.get(address)
        if task is None:
            # Concurrent rows with the same address share one request.
            task = state.under_way[address] = asyncio.create_task(self._fetch_new(row, address))
            task.add_done_callback(lambda _: state.under_way.pop(address, None))
        return await asyncio.shield(task)

    async def _fetch_new(self, row: _Row, address: str) -> Fetched:
        try:
            data = await self._state.client.fetch(address, row.gate)
        except RowError as error:
            return Failure.of(error)
        except Exception as error:  # a malformed response can make the client raise anything
            message = f"the image could not be fetched: {type(error).__name__}"
            return Failure(error_type=ErrorType.FETCH, message=message)
        self._remember(address, data)
        return data

    def _remember(self, address: str, data: bytes) -> None:
        state = self._state
        if len(data) > self._cache_bytes:
            return
        state.cache[address] = data
        state.cached_bytes += len(data)
        while state.cached_bytes > self._cache_bytes:
            _, gone = state.cache.popitem(last=False)
            state.cached_bytes -= len(gone)
