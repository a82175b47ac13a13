"""Allocation of the slot cache: sized for the rows in the engine, and resized as they change."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from batchvlm.engine.faults import failure_of, free_memory, is_oom
from batchvlm.engine.forward.cache import RowCache, SlotCache
from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.slots.memory import MemoryPlan
from batchvlm.engine.slots.rows import Row
from batchvlm.records import Failure

log = logging.getLogger(__name__)

_LENGTH_STEP = {"cpu": 64, "cuda": 256}
_MIN_SLOTS = {"cpu": 8, "cuda": 64}
"""Larger on a GPU: resizing the cache there also discards the CUDA graphs captured over it."""


class SlotPool:
    """Allocates slots of one length, as many as memory allows and the rows need.

    Args:
        plan: limits on the memory of the slots.
        decoder: discards what it captured over slots that are freed.
    """

    def __init__(self, plan: MemoryPlan, decoder: Decoder) -> None:
        self._plan, self._decoder = plan, decoder
        kind = "cuda" if decoder.device.type == "cuda" else "cpu"
        self._length_step, self._min_slots = _LENGTH_STEP[kind], _MIN_SLOTS[kind]
        self.cache: SlotCache | None = None
        """None before the first row, which tells the bytes of a token's keys and values."""

    def free(self) -> None:
        """Free the slots."""
        self._decoder.forget_slots()
        self.cache = None

    def num_slots(self, num_rows: int) -> int:
        """The number of slots that are allocated, or that the cache could be resized to.

        Args:
            num_rows: rows in the engine, in slots or waiting.
        """
        if self.cache is None:
            return 1
        could_be = self._plan.num_slots(self.cache.bytes_per_token, self.cache.length)
        return max(self.cache.num_slots, min(could_be, self._num_wanted(num_rows)))

    def _num_wanted(self, num_rows: int) -> int:
        """Enough slots for all rows, as a power of two: a short job takes little memory."""
        return max(self._min_slots, 1 << (num_rows - 1).bit_length())

    def provide_slot(
        self, row: Row, rows: Sequence[Row], *, max_tokens: int, num_rows: int
    ) -> bool | Failure:
        """Provide a free slot for one more row, resizing the cache if necessary.

        Args:
            row: the row.
            rows: the rows in the first slots, in slot order.
            max_tokens: the slot length that the longest row in a slot or waiting for one needs.
            num_rows: rows in the engine, in slots or waiting.

        Returns:
            True if there is a slot; False if the row must wait until others end; a failure if
            memory was short. After a failure `rows` are in their slots as before, or have lost them
            if `cache` is None.
        """
        length = -(-max_tokens // self._length_step) * self._length_step
        cache, num_used = self.cache, len(rows)
        num_slots = self._plan.num_slots(row.prefilled.bytes_per_token, length)
        num_slots = min(num_slots, self._num_wanted(num_rows))
        if cache is not None and length <= cache.length:
            if num_used < cache.num_slots:
                return True
            # Copying the rows pays only for twice the slots, or for slots of half the length.
            if 2 * length > cache.length and num_slots < 2 * cache.num_slots:
                return False
            num_used = cache.num_slots
        if num_slots <= num_used:
            return False
        # A reference here would keep the old slots alive while the new ones are allocated.
        cache = None
        failure = self._resize(row.prefilled.pieces[0], rows, num_slots, length)
        if failure is not None:
            return failure
        assert self.cache is not None
        return len(rows) < self.cache.num_slots

    def _resize(
        self, like: RowCache, rows: Sequence[Row], num_slots: int, length: int
    ) -> Failure | None:
        """Allocate slots of another number or length and copy the rows into them."""
        before = self.cache
        kept: list[RowCache] = []
        if before is not None:
            # Rows are copied out and the old slots freed first: memory may not hold both caches.
            try:
                kept = [before.row(i, row.num_cached) for i, row in enumerate(rows)]
            except Exception as error:
                if not is_oom(error):
                    raise
                return failure_of(error)
            like = before.row(0, 0)
        shape_before = (before.num_slots, before.length) if before is not None else None
        before = None
        self.free()
        failure: Failure | None = None
        while num_slots > len(kept):
            failure = self._make(like, num_slots, length)
            if failure is None:
                break
            num_slots //= 2
        if failure is not None and shape_before is not None:
            for shape in (shape_before, (len(kept), shape_before[1])):
                if shape[0] and self._make(like, *shape) is None:
                    break
        if self.cache is not None:
            for slot, piece in enumerate(kept):
                self.cache.put(slot, [piece])
        return failure

    def _make(self, like: RowCache, num_slots: int, length: int) -> Failure | None:
        """Allocate the slots; return the failure if memory is short."""
        try:
            self.cache = SlotCache(like, num_slots=num_slots, length=length)
            return None
        except Exception as error:
            if not is_oom(error):
                raise
            failure = failure_of(error)
        free_memory(self._decoder.device)
        log.warning("no memory for %d slots of %d tokens", num_slots, length)
        self._plan.lower_cache(num_slots * length * like.bytes_per_token)
        return failure
