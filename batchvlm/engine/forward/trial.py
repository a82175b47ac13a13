"""Finds the fastest of several implementations on this machine by timing them.

The result depends on the processor's vendor, its matrix units and its caches, so no table of them
would be right on the next machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

CPU = torch.device("cpu")

_ROUNDS = 5
_ROUND_S = 2e-3
_CALLS = 20
_CLEARLY = 0.95
"""The first way wins unless another takes less than this share of its time. Otherwise near ties
would be decided differently from one process to the next."""


def fastest(ways: Sequence[Callable[[], object]], device: torch.device = CPU) -> int:
    """Time several ways to compute the same in turns; takes about 20 ms for each.

    Args:
        ways: the first is the default, which wins unless another is clearly faster. A way that
            raises cannot win.
        device: the device that they run on.

    Returns:
        Index of the way that is clearly the fastest; else 0.
    """
    measure = _least_seconds if device.type == "cpu" else partial(_seconds_on, device)
    best_s = [_warm_up(way, measure) for way in ways]
    for _ in range(_ROUNDS):
        for i, way in enumerate(ways):
            if best_s[i] < float("inf"):
                best_s[i] = min(best_s[i], measure(way))
    best = min(range(len(ways)), key=best_s.__getitem__)
    return best if best_s[best] < _CLEARLY * best_s[0] else 0


def _warm_up(way: Callable[[], object], measure: Callable[[Callable[[], object]], float]) -> float:
    try:
        way()
    except (RuntimeError, NotImplementedError, AttributeError):
        return float("inf")
    return measure(way)


def _least_seconds(way: Callable[[], object]) -> float:
    """The minimum over several calls: other processes can only make a call slower."""
    least_s = float("inf")
    end_s = time.perf_counter() + _ROUND_S
    while (start_s := time.perf_counter()) < end_s or least_s == float("inf"):
        way()
        least_s = min(least_s, time.perf_counter() - start_s)
    return least_s


def _seconds_on(device: torch.device, way: Callable[[], object]) -> float:
    """Seconds of a call on a GPU, averaged over queued calls so that launches do not count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        way()
        start.record()
        for _ in range(_CALLS):
            way()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / _CALLS / 1e3
