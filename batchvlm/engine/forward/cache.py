"""KV caches: of packed prompts during prefill, and of slots during decoding."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from batchvlm.engine.faults import is_oom
from batchvlm.engine.forward.layout import KeysValues

# Shape legend: as in attention.py; N slots of the cache, B <= N of them in use.


class Heads(NamedTuple):
    """The attention heads of one layer."""

    num_heads: int
    """Query heads."""
    num_keys: int
    """Key-value heads."""
    size: int
    """Elements of a head."""
    is_latent: bool = False
    """Whether the one key head holds latents, which are keys and values at once."""

    @property
    def num_cached(self) -> int:
        """Elements of a token's keys and values."""
        return self.num_keys * self.size * (1 if self.is_latent else 2)


def cached_layers(config: Any) -> list[Heads]:
    """Return the heads of each layer that has keys and values of its own.

    In Gemma 3n and 4 the last layers use those of an earlier layer, and layers with a sliding
    window have other heads than the rest.

    Args:
        config: the config of a decoder.
    """
    num_layers = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    # Where layers differ, transformers refuses to read a single number.
    apart = getattr(config, "is_heterogeneous", False)
    return [_heads_of(config.per_layer_config[i] if apart else config) for i in range(num_layers)]


def _heads_of(config: Any) -> Heads:
    num_heads = config.num_attention_heads
    if latent_size := getattr(config, "kv_lora_rank", None):
        return Heads(num_heads, 1, latent_size + config.qk_rope_head_dim, is_latent=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return Heads(num_heads, getattr(config, "num_key_value_heads", None) or num_heads, size)


class _PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Stores one layer's keys and values of packed prompts and returns them unchanged."""

    packed: KeysValues
    """[1, K, T, D] each."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> KeysValues:
        # `is_initialized` stays false: some model families take that to mean a prompt.
        self.packed = key_states, value_states
        return self.packed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _ContinuationLayer(_PackedLayer):
    """The same for tokens after prompts: it reports to the model that these are no prompt."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return 1


class PackedCache(Cache):
    """Keys and values of concatenated prompts, layer by layer.

    Args:
        num_layers: of the model, without those that use another layer's keys and values.
        latent_layers: see `RowCache`.
        is_prompt: False for tokens that continue prompts computed before.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        latent_layers: Collection[int] = (),
        is_prompt: bool = True,
    ) -> None:
        self._latent_layers = latent_layers
        layer = _PackedLayer if is_prompt else _ContinuationLayer
        self._packed = [layer() for _ in range(num_layers)]
        super().__init__(layers=list(self._packed))

    def row(self, start: int, stop: int) -> RowCache:
        """A view of the keys and values of tokens `start` to `stop`."""
        pairs = [layer.packed for layer in self._packed]
        return RowCache(
            [(k[0, :, start:stop], v[0, :, start:stop]) for k, v in pairs], self._latent_layers
        )


class RowCache:
    """Keys and values of one row or of a piece of it.

    Args:
        layers: for each layer a pair of [K, T_i, D].
        latent_layers: indices of the layers whose pairs are latents [1, T_i, R] and the rotary
            parts of their keys [1, T_i, P].
    """

    def __init__(self, layers: Sequence[KeysValues], latent_layers: Collection[int] = ()) -> None:
        self.layers, self.latent_layers = layers, latent_layers

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[1]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return sum(
            x.shape[0] * x.shape[2] * x.element_size() for layer in self.layers for x in layer
        )

    def joined(self, after: RowCache) -> RowCache:
        """A copy of this piece concatenated with the one after it."""
        return RowCache(
            [
                (torch.cat([k, more_k], dim=1), torch.cat([v, more_v], dim=1))
                for (k, v), (more_k, more_v) in zip(self.layers, after.layers, strict=True)
            ],
            self.latent_layers,
        )


@dataclass(frozen=True, slots=True)
class _Use:
    """The slots and positions that the next forward of a thread writes to."""

    slots: slice
    slots_B: Tensor
    positions_B: Tensor


_use: ContextVar[_Use | None] = ContextVar("use", default=None)


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values of all slots, written at given positions.

    Args:
        slots: what the layer writes, [N, K, S, D] each.
        attended: what it attends to, in the same memory.
    """

    is_compileable = True

    def __init__(self, slots: KeysValues, attended: KeysValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = slots
        self._attended = attended
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> KeysValues:
        keys, values = self.slots
        if len(key_states) == 1:  # one sequence of tokens
            key_states, value_states = (x.transpose(0, 2) for x in (key_states, value_states))
        use = _use.get()
        assert use is not None
        keys[use.slots_B, :, use.positions_B] = key_states[:, :, 0]
        values[use.slots_B, :, use.positions_B] = value_states[:, :, 0]
        keys, values = self._attended
        return keys[use.slots], values[use.slots]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots[0].shape[2], 0

    def get_seq_length(self) -> int:
        # Models ask at every step, to build a mask and to tell a prompt from a decode step. Our
        # masks do not depend on it, and reading the true length would synchronize with the device.
        return 1

    def get_max_length(self) -> int:
        return self.slots[0].shape[2]


class SlotCache(Cache):
    """A static KV cache of N slots of equal length.

    A layer's attention is given the keys and values of its B slots, [B, K, S, D] each. For layers
    with latents the keys are [B, 1, S, R + P], each latent with its rotary part after it, and the
    values are the latents among them, [B, 1, S, R].

    Args:
        like: a row with the same layers, heads, head sizes, dtype and device.
        num_slots: N.
        length: S, the tokens of prompt and answer that fit into a slot.
    """

    def __init__(self, like: RowCache, *, num_slots: int, length: int) -> None:
        self.num_slots, self.length = num_slots, length
        self.bytes_per_token = like.bytes_per_token
        # Layers of one shape share one tensor, so that one copy moves a row in all of them. On a
        # GPU tokens come before heads, [N, S, K, D]: a slot's tokens are contiguous, as torch's
        # flash attention expects them. On a CPU heads come first, so each head is contiguous.
        groups: dict[tuple[int, int], int] = {}
        self._places: list[list[tuple[tuple[int, int], int]]] = []
        self._sizes = [(key.shape[2], value.shape[2]) for key, value in like.layers]
        for layer, sizes in enumerate(self._sizes):
            heads = like.layers[layer][0].shape[0]
            self._places.append([])
            # One tensor for a pair of latents, so that they need not be joined in each step.
            for size in [sum(sizes)] if layer in like.latent_layers else sizes:
                shape = (heads, size)
                self._places[-1].append((shape, groups.setdefault(shape, 0)))
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
        # Then a row takes two kernel launches instead of two for each layer.
        is_uniform = len(self._stacks) == 1 and not like.latent_layers
        self._is_put_whole = first.is_cuda and is_uniform
        self._latent_layers = like.latent_layers
        self._slotted = []
        for layer, pair in enumerate(self._pairs(self._stacks)):
            attended = pair
            if layer in like.latent_layers:
                ((shape, index),) = self._places[layer]
                attended = self._stacks[shape][index], pair[0]
            self._slotted.append(_SlotLayer(pair, attended))
        super().__init__(layers=list(self._slotted))

    def use(
        self, start: int, stop: int, positions_B: Tensor, slots_B: Tensor | None = None
    ) -> None:
        """Set where this thread's next forward writes: in slots `start` to `stop`.

        Args:
            start: the first slot.
            stop: the end of the slots, exclusive.
            positions_B: int64 [B], the position of each slot's token; of each token if slots have
                several.
            slots_B: the slot of each token; None: one token for each slot, in order.
        """
        if slots_B is None:
            slots_B = torch.arange(start, stop, device=positions_B.device)
        _use.set(_Use(slice(start, stop), slots_B, positions_B))

    def put(self, slot: int, pieces: Sequence[RowCache]) -> None:
        """Copy a row, given in one or several consecutive pieces, into a slot.

        The rest of the slot is set to 0. Attention gives weight 0 to positions past the row's end,
        but 0 times a NaN or infinity that an earlier row left there would be NaN.
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
        return RowCache(self._pairs(copies), self._latent_layers)

    def _pairs(self, stacks: Mapping[tuple[int, int], Tensor]) -> list[KeysValues]:
        """Each layer's keys and values, as views of tensors that hold them for all layers."""
        pairs = []
        for place, (key_size, _) in zip(self._places, self._sizes, strict=True):
            first, *others = (stacks[shape][index] for shape, index in place)
            if others:
                pairs.append((first, others[0]))
            else:
                pairs.append((first[..., :key_size], first[..., key_size:]))
        return pairs

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot into another; set the rest to 0, as in `put`."""
        for stack in self._stacks.values():
            stack[:, target, :, :length] = stack[:, source, :, :length]
            stack[:, target, :, length:] = 0


def _whole(piece: RowCache) -> Tensor | None:
    """Stack the keys and values of all layers; None if memory is short."""
    try:
        return torch.stack([x for layer in piece.layers for x in layer])
    except Exception as error:
        if not is_oom(error):
            raise
        return None
