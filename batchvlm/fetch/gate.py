"""Limit concurrent connections and bytes in memory without ever blocking the oldest row."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Gate:
    """Counts that all rows share; used in one event loop.

    Args:
        concurrency: concurrent connections; at most half of them go to one host.
        max_bytes: limit for bytes that were fetched and not yet given back.
    """

    def __init__(self, concurrency: int, max_bytes: int) -> None:
        self.concurrency, self.max_bytes = concurrency, max_bytes
        self.by_host: Counter[str] = Counter()
        self.held_bytes = 0
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Wake the waiting tasks, so that they check their conditions again."""
        self._changed.set()

    async def until(self, is_free: Callable[[], bool]) -> float:
        """Wait for a condition; return the seconds waited."""
        if is_free():
            return 0.0
        start_s = time.monotonic()
        while not is_free():
            self._changed.clear()
            await self._changed.wait()
        return time.monotonic() - start_s


class Pass:
    """One row's share of the gate.

    Rows that wait for room wait for older rows to finish, so the oldest row never waits: otherwise
    there could be a deadlock.
    """

    def __init__(self, gate: Gate) -> None:
        self.is_oldest = False
        self.held_bytes = 0
        self._gate = gate

    @asynccontextmanager
    async def connection(self, host: str) -> AsyncIterator[None]:
        """Hold a connection to a host; wait until one is free."""
        gate, busy = self._gate, self._gate.by_host
        most_of_host = max(1, gate.concurrency // 2)
        await gate.until(
            lambda: (
                self.is_oldest or (busy.total() < gate.concurrency and busy[host] < most_of_host)
            )
        )
        busy[host] += 1
        try:
            yield
        finally:
            busy[host] -= 1
            if not busy[host]:
                del busy[host]
            gate.changed()

    async def take(self, num_bytes: int) -> float:
        """Reserve bytes; wait until there is room. Return the seconds waited."""
        gate = self._gate
        waited_s = await gate.until(
            lambda: self.is_oldest or gate.held_bytes + num_bytes <= gate.max_bytes
        )
        gate.held_bytes += num_bytes
        self.held_bytes += num_bytes
        return waited_s

    def give_back(self, num_bytes: int) -> None:
        """Release reserved bytes."""
        self._gate.held_bytes -= num_bytes
        self.held_bytes -= num_bytes
        self._gate.changed()
