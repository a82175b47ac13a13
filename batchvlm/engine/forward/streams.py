"""Several forwards at once on a CPU, each on a share of the threads.

In a single forward all threads synchronize after every operation, and only one is busy while Python
launches the next one or while an operation is too small to be divided. Concurrent forwards do not
wait for one another, and share the weights. OpenVINO calls them streams. Prompts and images are
computed in several streams; decode steps in one beside them, or divided among all.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch

from batchvlm.config import EngineConfig
from batchvlm.engine.forward.layout import Span
from batchvlm.engine.forward.replacements import PackedLinear

_MAX_STREAMS = 8
"""More would not help: Python launches the operations of all streams one at a time."""
_OPERATIONS = 1 << 39
"""Floating-point operations of a stream between two decode steps: some seconds of prefill."""
_PACKS = 4
"""Packs of a stream between two decode steps: enough for all streams to end at about one time."""
_PART_ROWS = 8
"""The fewest rows of a step in one stream: fewer take as long as twice as many."""
_SMALL_WEIGHTS = 1 << 28
"""The largest decoder, in weights, whose steps are divided: each stream reads all weights."""
_LOOK_UP_S = 0.5
_CHANGING_ROPES = frozenset({"dynamic", "longrope"})
"""RoPE types whose modules store the angles of the latest forward, which is not thread-safe."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Streams:
    """Calls a function with different arguments, several at once if there are several streams.

    Args:
        num: the number of streams.
        num_weights: the number of weights of the decoder.
        share: the share of the process's threads that these streams have.
        num_threads: how many that are; None: as many as the calling thread has.
    """

    def __init__(
        self,
        num: int = 1,
        num_weights: int = 0,
        *,
        share: float = 1.0,
        num_threads: int | None = None,
    ) -> None:
        self.num = num
        self.share = share
        self._num_weights = num_weights
        self._num_threads = num_threads

    def map(
        self,
        function: Callable[[_Item], _Result],
        items: Sequence[_Item],
        *,
        again: Callable[[_Result], bool] = lambda _: False,
    ) -> Iterator[_Result]:
        """Call a function with each item and yield the results in the order of the items.

        As many items as divide evenly among the streams are computed at once. The others would
        leave streams idle, so they follow one by one with all threads. An error is raised once all
        calls have ended.

        Args:
            function: called in the streams' threads, or in this thread if there is one stream.
            items: the longest first.
            again: whether a result of a concurrent call is to be replaced by that of a new call,
                made alone.
        """
        num = len(items) - len(items) % self.num if self.num > 1 else 0
        if num:
            for item, result in zip(items, self._map_at_once(function, items[:num]), strict=False):
                yield function(item) if again(result) else result
        yield from map(function, items[num:])

    def _map_at_once(
        self, function: Callable[[_Item], _Result], items: Sequence[_Item]
    ) -> list[_Result]:
        with _calls(self.num, self._num_threads or torch.get_num_threads()) as submit:
            futures = [submit(function, item) for item in items]
        return [future.result() for future in futures]

    @contextmanager
    def beside(
        self, function: Callable[[Streams], _Result]
    ) -> Iterator[tuple[Streams, Future[_Result]]]:
        """Call a function with all streams but one, while this thread works with that one.

        At the end of the context the call has ended too; if an error leaves it, the call is
        stopped.

        Args:
            function: called in another thread, with the streams left to it.

        Yields:
            This thread's stream, and the future of the call.
        """
        num_threads = torch.get_num_threads()
        own_threads = max(1, num_threads // self.num)
        own = Streams(share=1 / self.num)
        others = Streams(
            self.num - 1,
            self._num_weights,
            share=1 - own.share,
            num_threads=max(1, num_threads - own_threads),
        )
        with _calls(self.num, num_threads) as submit:
            future = submit(function, others)
            torch.set_num_threads(own_threads)
            try:
                yield own, future
            finally:
                torch.set_num_threads(num_threads)

    def num_packs(self, pack_tokens: int) -> int:
        """The number of packs to compute between decode steps; 1 if a pack takes long enough."""
        if self.num == 1:
            return 1
        num = self.num * _OPERATIONS // max(1, 2 * self._num_weights * pack_tokens)
        return max(1, min(num, self.num * _PACKS))

    def parts(self, spans: Sequence[Span]) -> list[Sequence[Span]]:
        """Divide the slots of a step among the streams if that is faster, else return one part."""
        start, stop = spans[0].start, spans[-1].stop
        is_small = self._num_weights <= _SMALL_WEIGHTS
        if self.num == 1 or not is_small or stop - start < _PART_ROWS * self.num:
            return [spans]
        bounds = [start + (stop - start) * i // self.num for i in range(self.num + 1)]
        return [
            [
                Span(max(first, span.start), min(end, span.stop), span.length)
                for span in spans
                if span.start < end and span.stop > first
            ]
            for first, end in pairwise(bounds)
        ]


@contextmanager
def _calls(num: int, num_threads: int) -> Iterator[Callable[..., Future[Any]]]:
    """Yield a function that submits calls to the streams' threads; wait for all at the end.

    If an error leaves the context, the calls are stopped.
    """
    pool = _pool(num, num_threads)
    futures: list[Future[Any]] = []
    threads: set[int] = set()

    def call(function: Callable[..., Any], *args: Any) -> Any:
        threads.add(threading.get_ident())
        try:
            return function(*args)
        finally:
            threads.discard(threading.get_ident())

    def submit(function: Callable[..., Any], *args: Any) -> Future[Any]:
        futures.append(pool.submit(call, function, *args))
        return futures[-1]

    try:
        yield submit
        # With a timeout: a signal delivered to another thread would not wake this one.
        while wait(futures, timeout=_LOOK_UP_S).not_done:
            pass
    except BaseException:
        # Such as a signal's. The other threads must end too, or the process cannot.
        for future in futures:
            future.cancel()
        for thread in tuple(threads):
            _raise_in(thread)
        raise


class SharedContext:
    """A context that several threads share: the first thread enters it, the last one exits it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_within = 0
        self._context: AbstractContextManager[Any] | None = None

    @contextmanager
    def within(self, open_context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Run within the shared context; any thread may call this.

        Args:
            open_context: returns a new context. Not kept: a method of the owner's would keep the
                owner, and with it a model, until the garbage is collected.
        """
        with self._lock:
            if not self._num_within:
                self._context = open_context()
                self._context.__enter__()
            self._num_within += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_within -= 1
                if not self._num_within and self._context is not None:
                    self._context.__exit__(None, None, None)
                    self._context = None


def open_streams(model: Any, cfg: EngineConfig) -> Streams:
    """Open as many streams as the device, the model and the settings allow."""
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
    # Quantized layers may keep state between forwards, which need not be thread-safe.
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
    """Raised in a thread to end a call whose result is no longer needed."""


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))


@cache
def _pool(num: int, num_threads: int) -> ThreadPoolExecutor:
    """The thread pool of `num` streams, shared by all engines of a process."""

    def share_threads() -> None:
        # Read first: otherwise torch resets this thread's number at its first operation.
        torch.get_num_threads()
        torch.set_num_threads(max(1, num_threads // num))

    own_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(num, "batchvlm-stream", share_threads)
    barrier = threading.Barrier(num)
    list(pool.map(lambda _: barrier.wait(), range(num)))
    # New threads start with the number that any thread has set last, so set this one's back.
    torch.set_num_threads(own_threads)
    return pool
