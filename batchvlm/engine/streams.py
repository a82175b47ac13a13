"""Several forwards at once on a CPU, each by its share of the threads.

Within one forward all threads meet at the end of every operation, and while Python launches the
next one, or an operation is too small to be divided, one of them works alone. Forwards beside one
another wait for nobody, over the same weights. OpenVINO calls this streams.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch

from batchvlm.config import EngineConfig
from batchvlm.engine.kernels import PackedLinear
from batchvlm.engine.layout import Span

_MAX_STREAMS = 8
"""Python launches the operations of all of them, one at a time."""
_OPERATIONS = 1 << 39
"""Additions and multiplications of a stream before rows in slots go on: some seconds."""
_PACKS = 4
"""Packs of a stream likewise: enough for all to end at nearly the same time."""
_PART_ROWS = 8
"""Rows of a step in one stream at least: fewer take no less time than twice as many."""
_SMALL_WEIGHTS = 1 << 28
"""Weights of a decoder that may be read several times a step, by each stream for its rows."""
_LOOK_UP_S = 0.5
_CHANGING_ROPES = frozenset({"dynamic", "longrope"})
"""Their modules keep the angles of the latest forward."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Streams:
    """Calls of a function with different arguments, at once or one after another.

    Args:
        num: how many at once.
        num_weights: of the decoder.
    """

    def __init__(self, num: int = 1, num_weights: int = 0) -> None:
        self.num = num
        self._num_weights = num_weights

    def map(
        self,
        function: Callable[[_Item], _Result],
        items: Sequence[_Item],
        *,
        again: Callable[[_Result], bool] = lambda _: False,
    ) -> Iterator[_Result]:
        """Call a function with each item; results in the order of the items.

        Those that would leave a stream without work are called afterwards with all threads, one
        after another. Where a call raises, its error comes when all are over.

        Args:
            function: is called in threads; where there is one stream, in this one.
            items: the longest first.
            again: for which results of calls beside others the call is made anew, by itself.
        """
        num = len(items) - len(items) % self.num if self.num > 1 else 0
        if num:
            for item, result in zip(items, self._map_at_once(function, items[:num]), strict=False):
                yield function(item) if again(result) else result
        yield from map(function, items[num:])

    def _map_at_once(
        self, function: Callable[[_Item], _Result], items: Sequence[_Item]
    ) -> list[_Result]:
        threads: set[int] = set()

        def call(item: _Item) -> _Result:
            threads.add(threading.get_ident())
            try:
                return function(item)
            finally:
                threads.discard(threading.get_ident())

        pool = _pool(self.num, torch.get_num_threads())
        futures = [pool.submit(call, item) for item in items]
        try:
            # A signal may come to another thread, which does not wake this one.
            while wait(futures, timeout=_LOOK_UP_S).not_done:
                pass
        except BaseException:
            # A signal ends this thread at its next line. The process ends when the others have.
            for future in futures:
                future.cancel()
            for thread in tuple(threads):
                _raise_in(thread)
            raise
        return [future.result() for future in futures]

    def num_packs(self, pack_tokens: int) -> int:
        """Packs that are computed before rows in slots go on; 1 where one takes long enough."""
        if self.num == 1:
            return 1
        num = self.num * _OPERATIONS // max(1, 2 * self._num_weights * pack_tokens)
        return max(1, min(num, self.num * _PACKS))

    def parts(self, spans: Sequence[Span]) -> list[Sequence[Span]]:
        """Slots that are decoded at once, divided among the streams where that takes less time."""
        start, stop = spans[0].start, spans[-1].stop
        is_small = self._num_weights <= _SMALL_WEIGHTS
        if self.num == 1 or not is_small or stop - start < _PART_ROWS * self.num:
            return [spans]
        bounds = [start + (stop - start) * i // self.num for i in range(self.num + 1)]
        return [
            [
                Span(max(first, span.start), min(behind, span.stop), span.length)
                for span in spans
                if span.start < behind and span.stop > first
            ]
            for first, behind in pairwise(bounds)
        ]


class Together:
    """A context that several threads are in at once: the first enters it, the last leaves it.

    Args:
        open_context: makes it.
    """

    def __init__(self, open_context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._open = open_context
        self._lock = threading.Lock()
        self._num_within = 0
        self._context: AbstractContextManager[Any] | None = None

    @contextmanager
    def within(self) -> Iterator[None]:
        """Be in the context, from any thread."""
        with self._lock:
            if not self._num_within:
                self._context = self._open()
                self._context.__enter__()
            self._num_within += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_within -= 1
                if not self._num_within and self._context is not None:
                    self._context.__exit__(None, None, None)


def open_streams(model: Any, cfg: EngineConfig) -> Streams:
    """As many streams as a model's forwards may go on in at once."""
    decoder = model.get_decoder()
    num_weights = sum(weight.numel() for weight in decoder.parameters()) + sum(
        module.weight.numel() for module in decoder.modules() if isinstance(module, PackedLinear)
    )
    return Streams(_num_streams(model, cfg), num_weights)


def _num_streams(model: Any, cfg: EngineConfig) -> int:
    if model.device.type != "cpu":
        return 1
    if cfg.cpu_streams is not None:
        return cfg.cpu_streams
    # What quantized layers keep between forwards is their library's affair.
    if cfg.compile or getattr(model, "is_quantized", False) or _has_changing_rope(model):
        return 1
    return min(torch.get_num_threads(), _MAX_STREAMS)


def _has_changing_rope(model: Any) -> bool:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if not _CHANGING_ROPES.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds]):
            return True
    return False


class _Stopped(BaseException):
    """What ends a call that nobody waits for any more."""


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))


@cache
def _pool(num: int, num_threads: int) -> ThreadPoolExecutor:
    """One for all engines of a process."""

    def share_threads() -> None:
        # Asked for once: else torch would set this thread's number anew at its first operation.
        torch.get_num_threads()
        torch.set_num_threads(max(1, num_threads // num))

    pool = ThreadPoolExecutor(num, "batchvlm-stream", share_threads)
    barrier = threading.Barrier(num)
    list(pool.map(lambda _: barrier.wait(), range(num)))
    # Threads that start later begin with the number that was set last, anywhere.
    torch.set_num_threads(num_threads)
    return pool
