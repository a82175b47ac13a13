"""Decode steps as CUDA graphs: all kernels of a step are launched at once.

A step over slots launches about a thousand small kernels, which takes Python longer than it takes
the GPU to run them. Apart from the number of rows, the shapes of a step are static. So steps are
captured for a few batch sizes and replayed from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchvlm.engine.faults import failure_of, free_memory, is_oom
from batchvlm.engine.forward.cache import SlotCache

log = logging.getLogger(__name__)

# Shape legend: N slots of the cache, B rows in use, C >= B rows of a graph, V vocabulary.

_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Batch sizes that steps are captured for; above the last, its multiples."""
_LENGTH_STEP = 256
_MIN_USES = 2
"""Uses of a size before it is captured: at the end of a job most sizes are used once."""
_MIN_USES_BESIDE_LARGER = 16
"""Uses before a capture if a larger graph can serve: that costs some milliseconds a step, and a
capture costs 150."""
_TRY_AGAIN_STEPS = 256
"""Uses of a size between a capture for which memory was short and the next attempt."""

Forward = Callable[[int, int, Tensor], Tensor]
"""Takes C, the length that attention covers, and the tokens' positions, int64 [C]; returns the
logits [C, V] of the first C slots."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured step."""

    graph: torch.cuda.CUDAGraph
    logits_CV: Tensor
    """The output buffer that each replay overwrites."""


class StepGraphs:
    """Captures decode steps and replays them.

    Args:
        device: a CUDA device.
        is_by_length: whether the kernels depend on the length that attention covers, so that a
            graph serves one length only.
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
        """False once a capture has failed for a reason other than memory."""
        self.num_replays = 0

    def forget(self) -> None:
        """Drop all graphs, because the slots that they were captured over are about to be freed."""
        self._captured.clear()
        self._num_uses.clear()
        self._cache = None
        # A memory pool cannot be captured into again once its graphs are gone.
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
        """Replay one step for the first B slots.

        The graph may be of more than B rows. Its further slots that are in use compute their newest
        token, which their own step will compute again; unused slots compute position 0.

        Args:
            cache: keys and values of N slots.
            positions_N: int64 [N], the position of each slot's newest token.
            num_rows: B.
            length: positions that the longest row in use attends to.
            forward: the function to capture.
            num_used: slots in use; more than B if a step is computed in parts.

        Returns:
            logits_BV: [B, V], valid until the next step; None if there is no graph for it.
        """
        if not self.is_on:
            return None
        if cache is not self._cache:
            self.forget()
            self._cache = cache
            # Every replay reads this tensor, so it must live as long as the graphs.
            self._slots_N = torch.arange(cache.num_slots, device=self._device)
        self._num_used.fill_(num_used)
        captured = self._captured_for(self._key(num_rows, length), positions_N, forward)
        if captured is None:
            return None
        captured.graph.replay()
        self.num_replays += 1
        return captured.logits_CV[:num_rows]

    def _key(self, num_rows: int, length: int) -> tuple[int, int]:
        """The rows of a graph and the length that its attention covers; 0: each row's own."""
        assert self._cache is not None
        size = min(_size_of(num_rows), self._cache.num_slots)
        if not self._is_by_length:
            return size, 0
        return size, min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, self._cache.length)

    def _captured_for(
        self, key: tuple[int, int], positions_N: Tensor, forward: Forward
    ) -> Captured | None:
        """The graph to replay, captured now if that pays; None if there is none yet."""
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
            # A warm-up run, because libraries initialize at their first call. It writes the same
            # keys and values into the slots as the replay that follows.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()
            current.wait_stream(self._stream)
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                logits_CV = run()
        finally:
            # An aborted capture leaves its own stream as the current one.
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
