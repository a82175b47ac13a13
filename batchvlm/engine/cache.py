"""Keys and values: of packed prompts as they are computed, and of slots as they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from batchvlm.engine.attention import KeysValues

# Shape legend: as in attention.py; N slots of the cache, B <= N of them in use.


class _PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Takes one layer's keys and values of packed prompts and hands them on unchanged."""

    packed: KeysValues

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> KeysValues:
        # Still not `is_initialized`: families that ask whether this is a prompt ask for that.
        self.packed = key_states, value_states
        return self.packed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class PackedCache(Cache):
    """Keys and values of several prompts behind one another, layer by layer."""

    def __init__(self, num_layers: int) -> None:
        self._packed = [_PackedLayer() for _ in range(num_layers)]  # type: ignore[no-untyped-call]
        super().__init__(layers=list(self._packed))

    def row(self, start: int, stop: int) -> RowCache:
        """The part that belongs to tokens `start` to `stop`; a view."""
        pairs = [layer.packed for layer in self._packed]
        return RowCache([(k[0, :, start:stop], v[0, :, start:stop]) for k, v in pairs])


class RowCache:
    """Keys and values of one row, or of a piece of one, by layer each [K, T_i, D]."""

    def __init__(self, layers: Sequence[KeysValues]) -> None:
        self.layers = layers

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers."""
        return sum(
            x.shape[0] * x.shape[2] * x.element_size() for layer in self.layers for x in layer
        )

    def joined(self, after: RowCache) -> RowCache:
        """This piece and the one behind it as one."""
        return RowCache(
            [
                (torch.cat([k, more_k], dim=1), torch.cat([v, more_v], dim=1))
                for (k, v), (more_k, more_v) in zip(self.layers, after.layers, strict=True)
            ]
        )


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values of all slots, [N, K, S, D] each; a row writes at its place."""

    is_compileable = True

    def __init__(self, like: KeysValues, num_slots: int, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        key, value = (x.new_zeros(num_slots, x.shape[0], length, x.shape[2]) for x in like)
        self.slots: KeysValues = key, value
        self.used = slice(0, num_slots)
        self.slots_B = self.positions_B = torch.arange(num_slots, device=key.device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> KeysValues:
        keys, values = self.slots
        keys[self.slots_B, :, self.positions_B] = key_states[:, :, 0]
        values[self.slots_B, :, self.positions_B] = value_states[:, :, 0]
        return keys[self.used], values[self.used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots[0].shape[2], 0

    def get_seq_length(self) -> int:
        # Asked at every step, for a mask that needs it and to know whether this is a prompt. Ours
        # does not, and to look at the positions would wait for the device.
        return 1

    def get_max_length(self) -> int:
        return self.slots[0].shape[2]


class SlotCache(Cache):
    """Static keys and values of N slots of equal length.

    Args:
        like: a row whose layers say heads, sizes, dtype and device.
        num_slots: N.
        length: S, tokens of prompt and answer that fit into a slot.
    """

    def __init__(self, like: RowCache, *, num_slots: int, length: int) -> None:
        self.num_slots, self.length = num_slots, length
        self.bytes_per_token = like.bytes_per_token
        self._slotted = [_SlotLayer(layer, num_slots, length) for layer in like.layers]
        super().__init__(layers=list(self._slotted))

    def use(self, start: int, stop: int, positions_N: Tensor) -> None:
        """Let the next forward write for slots `start` to `stop`, each at its position.

        Args:
            start: first slot.
            stop: behind the last one.
            positions_N: int64 [N] of all slots.
        """
        slots_B = torch.arange(start, stop, device=positions_N.device)
        for layer in self._slotted:
            layer.used = slice(start, stop)
            layer.slots_B, layer.positions_B = slots_B, positions_N[start:stop]

    def put(self, slot: int, pieces: Sequence[RowCache]) -> None:
        """Copy a row, in one or several pieces behind one another, into a slot.

        The rest of the slot is zeros: attention weighs what lies ahead of a row with zero, but NaN
        or infinity that another row has left there would still be NaN.
        """
        start = 0
        for piece in pieces:
            stop = start + piece.length
            for layer, row in zip(self._slotted, piece.layers, strict=True):
                for mine, its in zip(layer.slots, row, strict=True):
                    mine[slot, :, start:stop] = its
            start = stop
        for layer in self._slotted:
            for mine in layer.slots:
                mine[slot, :, start:] = 0

    def row(self, slot: int, length: int) -> RowCache:
        """A copy of the first `length` tokens of a slot."""
        pairs = [layer.slots for layer in self._slotted]
        return RowCache(
            [(k[slot, :, :length].clone(), v[slot, :, :length].clone()) for k, v in pairs]
        )

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another; the rest is zeros, as above."""
        for layer in self._slotted:
            for values in layer.slots:
                values[target, :, :length] = values[source, :, :length]
                values[target, :, length:] = 0
