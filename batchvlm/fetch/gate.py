"""How much is fetched at once, in connections and in bytes; the oldest row is never held up."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Gate:
    """Shared by all rows; used in one event loop.

    Args:
        concurrency: connections at the same time; at most half of them to one host.
        max_bytes: fetched and not yet let out.
    """

    def __init__(self, concurrency: int, max_bytes: int) -> None:
        self.concurrency, self.max_bytes = concurrency, max_bytes
        self.by_host: Counter[str] = Counter()
        self.held_bytes = 0
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Let those who wait look again."""
        self._changed.set()

    async def until(self, is_free: Callable[[], bool]) -> float:
        """Wait for a condition; gives the seconds that it took."""
        if is_free():
            return 0.0
        start_s = time.monotonic()
        while not is_free():
            self._changed.clear()
            await self._changed.wait()
        return time.monotonic() - start_s


class Pass:
    """One row's way through the gate.

    Whoever waits for room waits for older rows to be let out; so the oldest must wait for nobody,
    or all would wait for ever.
    """

    def __init__(self, gate: Gate) -> None:
        self.is_oldest = False
        self.held_bytes = 0
        self._gate = gate

    @asynccontextmanager
    async def connection(self, host: str) -> AsyncIterator[None]:
        """Hold a connection to a host."""
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
        """Count bytes in once there is room for them; gives the seconds that this took."""
        gate = self._gate
        waited_s = await gate.until(
            lambda: self.is_oldest or gate.held_bytes + num_bytes <= gate.max_bytes
        )
        gate.held_bytes += num_bytes
        self.held_bytes += num_bytes
        return waited_s

    def give_back(self, num_bytes: int) -> None:
        """Count bytes out."""
        self._gate.held_bytes -= num_bytes
        self.held_bytes -= num_bytes
        self._gate.changed()
