"""Decode steps as CUDA graphs: a step's kernels are launched as one.

A step over slots launches a thousand small kernels, and Python takes longer to launch them than the
GPU to run them. The shapes of a step are static but for the number of rows, so that it is captured
for a few numbers of rows and played back from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchvlm.engine.cache import SlotCache
from batchvlm.engine.faults import failure_of, free_memory, is_oom

log = logging.getLogger(__name__)

# Shape legend: N slots of the cache, B rows in use, C >= B rows of a graph, V vocabulary.

_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
"""Numbers of rows that steps are captured for; above the last, its multiples."""
_LENGTH_STEP = 256
_MIN_USES = 2
"""A size is captured when it is asked for so often: at the end of a job most are asked for once."""

Forward = Callable[[int, int, Tensor], Tensor]
"""Logits [C, V] of one token for the first C slots: of C, of the length that attention goes, and of
the places of these tokens, int64 [C]."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits_CV: Tensor
    rows_C: Tensor
    """Made before the capture and read at each replay: it must not go before the graph does."""


class StepGraphs:
    """Runs decode steps by graphs where it can.

    Args:
        device: a CUDA device.
        is_by_length: whether what is computed depends on how far attention goes, so that a graph
            is good for one length alone.
    """

    def __init__(self, device: torch.device, *, is_by_length: bool) -> None:
        self._is_by_length = is_by_length
        self._num_rows = torch.zeros((), dtype=torch.long, device=device)
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._cache: SlotCache | None = None
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._num_uses: dict[tuple[int, int], int] = {}
        self.is_on = True
        """False once a capture has failed."""
        self.num_replays = 0

    def forget(self) -> None:
        """Give up all graphs: the slots that they were captured over are going away."""
        self._captured.clear()
        self._num_uses.clear()
        self._cache = None

    def step(
        self, cache: SlotCache, positions_N: Tensor, num_rows: int, length: int, forward: Forward
    ) -> Tensor | None:
        """Compute one token for the first slots.

        Args:
            cache: keys and values of N slots.
            positions_N: int64 [N], where each slot's newest token lies.
            num_rows: B.
            length: positions that the longest row attends to.
            forward: what is captured.

        Returns:
            logits_BV: [B, V], good until the next step; None where this one has no graph yet.
        """
        if not self.is_on:
            return None
        if cache is not self._cache:
            self.forget()
            self._cache = cache
        size = min(_size_of(num_rows), cache.num_slots)
        key = (size, 0)
        if self._is_by_length:
            key = (size, min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, cache.length))
        captured = self._captured.get(key)
        if captured is None:
            self._num_uses[key] = self._num_uses.get(key, 0) + 1
            if self._num_uses[key] < _MIN_USES:
                return None
            captured = self._capture(key, positions_N, num_rows, forward)
            if captured is None:
                return None
            self._captured[key] = captured
        self._num_rows.fill_(num_rows)
        captured.graph.replay()
        self.num_replays += 1
        return captured.logits_CV[:num_rows]

    def _capture(
        self, key: tuple[int, int], positions_N: Tensor, num_rows: int, forward: Forward
    ) -> _Captured | None:
        assert self._cache is not None
        size, length = key[0], key[1] or self._cache.length
        rows_C = torch.arange(size, device=self._device)

        def run() -> Tensor:
            # Slots beyond the rows in use compute the first place of nobody.
            places_C = torch.where(rows_C < self._num_rows, positions_N[:size], 0)
            return forward(size, length, places_C)

        graph = torch.cuda.CUDAGraph()
        try:
            # Once before: libraries prepare themselves at their first call. What it writes into
            # the slots is what the graph is about to write there again.
            self._num_rows.fill_(num_rows)
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()
            current.wait_stream(self._stream)
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                logits_CV = run()
        except Exception as error:
            self.is_on = False
            self.forget()
            if is_oom(error):
                free_memory(self._device)
            log.warning("decode steps run without CUDA graphs: %s", failure_of(error).message)
            return None
        return _Captured(graph, logits_CV, rows_C)


def _size_of(num_rows: int) -> int:
    largest = _SIZES[-1]
    if num_rows > largest:
        return -(-num_rows // largest) * largest
    return next(size for size in _SIZES if size >= num_rows)
