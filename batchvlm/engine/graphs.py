"""Decode steps as CUDA graphs: a step's kernels are launched as one.

A step over slots launches a thousand small kernels, and Python takes longer to launch them than the
GPU to run them. The shapes of a step are static but for the number of rows, so that it is captured
for a few numbers of rows and played back from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchvlm.engine.cache import SlotCache
from batchvlm.engine.faults import failure_of, free_memory, is_oom

log = logging.getLogger(__name__)

# Shape legend: N slots of the cache, B rows in use, C >= B rows of a graph, V vocabulary.

_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows that steps are captured for; above the last, its multiples."""
_LENGTH_STEP = 256
_MIN_USES = 2
"""A size is captured when it is asked for so often: at the end of a job most are asked for once."""
_MIN_USES_BESIDE_LARGER = 16
"""The same where a graph of more rows is there: it takes some milliseconds more a step, and
capturing takes 150."""
_TRY_AGAIN_STEPS = 256
"""As often a size is asked for, after there was no memory to capture it, before the next try."""

Forward = Callable[[int, int, Tensor], Tensor]
"""Logits [C, V] of one token for the first C slots: of C, of the length that attention goes, and of
the places of these tokens, int64 [C]."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A step that can be played back."""

    graph: torch.cuda.CUDAGraph
    logits_CV: Tensor
    """What it writes at each replay."""


class StepGraphs:
    """Runs decode steps by graphs where it can.

    Args:
        device: a CUDA device.
        is_by_length: whether what is computed depends on how far attention goes, so that a graph
            is good for one length alone.
    """

    def __init__(self, device: torch.device, *, is_by_length: bool) -> None:
        self._is_by_length = is_by_length
        self._num_used = torch.zeros((), dtype=torch.long, device=device)
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._cache: SlotCache | None = None
        self._slots_N = torch.empty(0)
        self._captured: dict[tuple[int, int], Captured] = {}
        self._num_uses: dict[tuple[int, int], int] = {}
        self.is_on = True
        """False once a capture has failed for another reason than memory."""
        self.num_replays = 0

    def forget(self) -> None:
        """Give up all graphs: the slots that they were captured over are going away."""
        self._captured.clear()
        self._num_uses.clear()
        self._cache = None
        # A pool is not captured into again once the graphs in it are gone.
        self._pool = None

    def step(
        self,
        cache: SlotCache,
        positions_N: Tensor,
        num_rows: int,
        length: int,
        forward: Forward,
        *,
        num_used: int,
    ) -> Tensor | None:
        """Compute one token for the first slots.

        A graph may be of more rows. Slots in use among these compute what their own step will
        compute again, those in use by nobody their first place.

        Args:
            cache: keys and values of N slots.
            positions_N: int64 [N], where each slot's newest token lies.
            num_rows: B.
            length: positions that the longest row in use attends to.
            forward: what is captured.
            num_used: slots in use; more than B where a step is computed in parts.

        Returns:
            logits_BV: [B, V], good until the next step; None where this one has no graph yet.
        """
        if not self.is_on:
            return None
        if cache is not self._cache:
            self.forget()
            self._cache = cache
            # Read at each replay: it must not go before the graphs do.
            self._slots_N = torch.arange(cache.num_slots, device=self._device)
        self._num_used.fill_(num_used)
        captured = self._captured_for(self._key(num_rows, length), positions_N, forward)
        if captured is None:
            return None
        captured.graph.replay()
        self.num_replays += 1
        return captured.logits_CV[:num_rows]

    def _key(self, num_rows: int, length: int) -> tuple[int, int]:
        """Rows of a graph, and how far its attention goes; 0: as far as each row does."""
        assert self._cache is not None
        size = min(_size_of(num_rows), self._cache.num_slots)
        if not self._is_by_length:
            return size, 0
        return size, min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, self._cache.length)

    def _captured_for(
        self, key: tuple[int, int], positions_N: Tensor, forward: Forward
    ) -> Captured | None:
        """The graph to play, captured if it is worth it."""
        if key in self._captured:
            return self._captured[key]
        num_uses = self._num_uses[key] = self._num_uses.get(key, 0) + 1
        larger = [has for has in self._captured if has[0] >= key[0] and has[1] >= key[1]]
        if larger and num_uses < _MIN_USES_BESIDE_LARGER:
            return self._captured[min(larger)]
        if num_uses < _MIN_USES:
            return None
        assert self._cache is not None
        size, length = key[0], key[1] or self._cache.length

        def run() -> Tensor:
            is_used_C = self._slots_N[:size] < self._num_used
            return forward(size, length, torch.where(is_used_C, positions_N[:size], 0))

        try:
            self._captured[key] = self._capture(run)
        except Exception as error:
            self._note_failure(key, error)
            return self._captured[min(larger)] if larger and self.is_on else None
        return self._captured[key]

    def _capture(self, run: Callable[[], Tensor]) -> Captured:
        current = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Once before: libraries prepare themselves at their first call. What it writes into
            # the slots is what the graph is about to write there again.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()
            current.wait_stream(self._stream)
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                logits_CV = run()
        finally:
            # A capture that is broken off leaves its own stream behind as the current one.
            torch.cuda.set_stream(current)
        return Captured(graph, logits_CV)

    def _note_failure(self, key: tuple[int, int], error: Exception) -> None:
        if is_oom(error):
            # Memory may have been short for a moment.
            self._num_uses[key] = -_TRY_AGAIN_STEPS
            log.warning("no memory to capture a step of %d rows", key[0])
            free_memory(self._device)
            return
        self.is_on = False
        self.forget()
        log.warning("decode steps run without CUDA graphs: %s", failure_of(error).message)


def _size_of(num_rows: int) -> int:
    largest = _SIZES[-1]
    if num_rows > largest:
        return -(-num_rows // largest) * largest
    return next(size for size in _SIZES if size >= num_rows)
