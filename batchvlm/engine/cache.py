"""Keys and values: of packed prompts as they are computed, and of slots as they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from batchvlm.engine.faults import is_oom
from batchvlm.engine.layout import KeysValues

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


class _BehindLayer(_PackedLayer):
    """The same of tokens behind prompts: a family that asks hears that these are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return 1


class PackedCache(Cache):
    """Keys and values of several prompts behind one another, layer by layer.

    Args:
        num_layers: of the model.
        is_prompt: false for tokens behind prompts that are computed.
    """

    def __init__(self, num_layers: int, *, is_prompt: bool = True) -> None:
        layer = _PackedLayer if is_prompt else _BehindLayer
        self._packed = [layer() for _ in range(num_layers)]
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


@dataclass(frozen=True, slots=True)
class _Use:
    """What the next forward of a thread writes to."""

    slots: slice
    slots_B: Tensor
    positions_B: Tensor


_use: ContextVar[_Use | None] = ContextVar("use", default=None)


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values of all slots, [N, K, S, D] each; a row writes at its place."""

    is_compileable = True

    def __init__(self, slots: KeysValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> KeysValues:
        keys, values = self.slots
        if len(key_states) == 1:  # tokens behind one another
            key_states, value_states = (x.transpose(0, 2) for x in (key_states, value_states))
        use = _use.get()
        assert use is not None
        keys[use.slots_B, :, use.positions_B] = key_states[:, :, 0]
        values[use.slots_B, :, use.positions_B] = value_states[:, :, 0]
        return keys[use.slots], values[use.slots]

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
        # Tensors of one shape lie in one stack, so that a row moves by one copy of them all. On a
        # GPU tokens come before heads, [N, S, K, D]: a row's are behind one another, as torch's
        # flash attention wants them. On a CPU heads come first, so that each is read in one go.
        groups: dict[tuple[int, int], int] = {}
        places: list[list[tuple[tuple[int, int], int]]] = []
        for layer in like.layers:
            places.append([])
            for x in layer:
                shape = (x.shape[0], x.shape[2])
                places[-1].append((shape, groups.setdefault(shape, 0)))
                groups[shape] += 1
        first = like.layers[0][0]
        self._stacks = {
            (heads, size): (
                first.new_zeros(num, num_slots, length, heads, size).transpose(2, 3)
                if first.is_cuda
                else first.new_zeros(num, num_slots, heads, length, size)
            )
            for (heads, size), num in groups.items()
        }
        # Two launches for a row instead of two for each layer.
        self._is_put_whole = first.is_cuda and len(self._stacks) == 1
        self._places = places
        self._slotted = []
        for pair in places:
            key, value = (self._stacks[shape][i] for shape, i in pair)
            self._slotted.append(_SlotLayer((key, value)))
        super().__init__(layers=list(self._slotted))

    def use(
        self, start: int, stop: int, positions_B: Tensor, slots_B: Tensor | None = None
    ) -> None:
        """Let this thread's next forward write for slots `start` to `stop`, each at its position.

        Args:
            start: first slot.
            stop: behind the last one.
            positions_B: int64 [B] of these slots; of each token where slots have several.
            slots_B: the slot of each token; None: one token for each slot, in order.
        """
        if slots_B is None:
            slots_B = torch.arange(start, stop, device=positions_B.device)
        _use.set(_Use(slice(start, stop), slots_B, positions_B))

    def put(self, slot: int, pieces: Sequence[RowCache]) -> None:
        """Copy a row, in one or several pieces behind one another, into a slot.

        The rest of the slot is zeros: attention weighs what lies ahead of a row with zero, but NaN
        or infinity that another row has left there would still be NaN.
        """
        start = 0
        for piece in pieces:
            stop = start + piece.length
            whole = _whole(piece) if self._is_put_whole else None
            if whole is not None:
                (stack,) = self._stacks.values()
                stack[:, slot, :, start:stop] = whole
            else:
                for layer, row in zip(self._slotted, piece.layers, strict=True):
                    for mine, its in zip(layer.slots, row, strict=True):
                        mine[slot, :, start:stop] = its
            start = stop
        for stack in self._stacks.values():
            stack[:, slot, :, start:] = 0

    def row(self, slot: int, length: int) -> RowCache:
        """A copy of the first `length` tokens of a slot."""
        copies = {s: stack[:, slot, :, :length].clone() for s, stack in self._stacks.items()}
        layers = []
        for pair in self._places:
            key, value = (copies[shape][i] for shape, i in pair)
            layers.append((key, value))
        return RowCache(layers)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another; the rest is zeros, as above."""
        for stack in self._stacks.values():
            stack[:, target, :, :length] = stack[:, source, :, :length]
            stack[:, target, :, length:] = 0


def _whole(piece: RowCache) -> Tensor | None:
    """Keys and values of all layers in one stack; None where there is no memory for that."""
    try:
        return torch.stack([x for layer in piece.layers for x in layer])
    except Exception as error:
        if not is_oom(error):
            raise
        return None
