"""The layouts of rows in a forward of the decoder, which attention follows.

- `Packed`: several prompts concatenated into one sequence. Each attends to itself alone, so there
  is no padding and no dense mask over all of them.
- `Slots`: one new token for each of B slots, whose keys and values are in static buffers. A slot
  has several new tokens if a grammar forces some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from batchvlm.engine.forward import flash

# Shape legend: as in attention.py; N slots of the cache.

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one row in one layer, each [K, T_i, D]."""


@dataclass(slots=True)
class Packed:
    """Concatenated prompts: row i is tokens `bounds[i]` to `bounds[i + 1]`."""

    bounds: tuple[int, ...]
    past: tuple[Sequence[KeysValues] | None, ...]
    """For each row, the keys and values of its earlier tokens by layer; None if it has none."""
    last_E: Tensor | None = None
    """int64 [E]: indices of the tokens whose logits are needed; None: all."""
    sees_ahead: bool = False
    """Set to True by a forward in which a token attends to a later one, as in PaliGemma."""
    trees: tuple[Tensor, ...] | None = None
    """For rows that are trees of tokens after a prompt: each row's mask, bool [T_i, T_i], true
    where a token attends to another of the row. All attend to the prompt. A token that attends to
    n tokens of its tree, itself included, is the n-th after the prompt."""
    _keys: list[tuple[int, Tensor]] = field(default_factory=list)
    _flash: flash.Bounds | None = None
    _tree_masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _causal_masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first token of each row and its end, exclusive."""
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def layer_of(self, index: int, key: Tensor) -> int:
        """The layer whose keys these are: `index`, or an earlier one that shares them (Gemma 4)."""
        for earlier, its in self._keys:
            if its is key:
                return earlier
        self._keys.append((index, key))
        return index

    def flash_bounds(self, device: torch.device) -> flash.Bounds:
        """Offsets of each row's queries and of its keys, which include the earlier tokens."""
        if self._flash is None:
            num_new = [stop - start for start, stop in self.spans]
            num_before = [0 if rows is None else rows[0][0].shape[1] for rows in self.past]
            num_keys = [new + before for new, before in zip(num_new, num_before, strict=True)]
            ends = torch.tensor([num_new, num_keys]).cumsum(1).to(torch.int32)
            both = F.pad(ends, (1, 0)).pin_memory().to(device, non_blocking=True)
            self._flash = flash.Bounds(
                query_B1=both[0],
                key_B1=both[1],
                max_queries=max(num_new),
                max_keys=max(num_keys),
            )
        return self._flash

    def causal_mask(
        self, num_new: int, num_before: int, window: int | None, device: torch.device
    ) -> Tensor:
        """The mask of a row's new tokens over all its tokens: bool [T_i, P_i + T_i].

        Shared by all layers, and by rows of the same length.
        """
        key = num_new, num_before, window
        if key not in self._causal_masks:
            places = torch.arange(num_before + num_new, device=device)
            newest = places[num_before:, None]
            mask = places <= newest
            if window is not None:
                mask &= places > newest - window
            self._causal_masks[key] = mask
        return self._causal_masks[key]

    def tree_mask(self, row: int, num_before: int, window: int | None) -> Tensor:
        """The attention mask of one row's tree over prompt and tree: bool [T_i, P_i + T_i]."""
        assert self.trees is not None
        key = row, window
        if key not in self._tree_masks:
            tree_TT = self.trees[row]
            mask = torch.cat([tree_TT.new_ones(len(tree_TT), num_before), tree_TT], dim=1)
            if window is not None:
                before = torch.arange(num_before, device=mask.device)
                own = num_before + tree_TT.sum(1) - 1
                mask &= torch.cat([before, own]) > own[:, None] - window
            self._tree_masks[key] = mask
        return self._tree_masks[key]


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring slots whose attention is computed together."""

    start: int
    stop: int
    length: int
    """Positions that the longest row attends to, including its new tokens."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest token of each of N slots, which is the input of a decode step: int64 [N] each."""

    ids_N: Tensor
    positions_N: Tensor
    """Its position in the slot."""
    deltas_N: Tensor
    """Its rotary position less its position."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The layout of a step with several new tokens for some slots.

    The forward has T tokens in one sequence: first one for each of B slots, then the further tokens
    slot by slot. Attention takes M tokens: within a span every row has as many as the longest, and
    a shorter row is padded with its first token.
    """

    tokens_M: Tensor
    """int64 [M]: for each token of attention, its index in the forward."""
    places_T: Tensor
    """int64 [T]: for each token of the forward, its index in attention."""
    widths: tuple[int, ...]
    """For each span, the tokens of a row in attention."""

    @classmethod
    def after(cls, spans: Sequence[Span], num_more: Mapping[int, int]) -> Runs:
        """Build the layout on the host.

        Args:
            spans: the slots, counted from 0.
            num_more: the number of further tokens of each slot that has some, in the order in which
                the forward has these slots.
        """
        starts = {}
        num_tokens = spans[-1].stop
        for slot, num in num_more.items():
            starts[slot] = num_tokens
            num_tokens += num
        tokens: list[int] = []
        places = [0] * num_tokens
        widths = []
        for span in spans:
            slots = range(span.start, span.stop)
            widths.append(1 + max(num_more.get(slot, 0) for slot in slots))
            for slot in slots:
                num = num_more.get(slot, 0)
                own = [slot, *range(starts.get(slot, 0), starts.get(slot, 0) + num)]
                for place, token in enumerate(own, len(tokens)):
                    places[token] = place
                tokens += [*own, *[slot] * (widths[-1] - len(own))]
        return cls(torch.tensor(tokens), torch.tensor(places), tuple(widths))

    def to(self, move: Callable[[Tensor], Tensor]) -> Runs:
        """Apply `move` to the tensors."""
        return Runs(move(self.tokens_M), move(self.places_T), self.widths)


@dataclass(frozen=True, slots=True)
class Slots:
    """One new token for each of B slots, or several for some."""

    positions_B: Tensor
    """int64 [B]: the position of each row's new token; with runs [T], of each token."""
    spans: tuple[Span, ...]
    runs: Runs | None = None
    last_E: Tensor | None = None
    """int64 [E]: indices of the tokens whose logits are needed; None: all."""
    has_kernel: bool = False
    """Whether attention uses `slot_kernel` in place of flash attention."""
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    _flash: dict[tuple[int, int], flash.Bounds] = field(default_factory=dict)

    def by_span(self, tensor_M: Tensor) -> Iterator[Tensor]:
        """Split a tensor over the tokens of attention by span: [rows, tokens of a row, ...]."""
        start = 0
        for place, span in enumerate(self.spans):
            width = 1 if self.runs is None else self.runs.widths[place]
            stop = start + (span.stop - span.start) * width
            yield tensor_M[start:stop].view(-1, width, *tensor_M.shape[1:])
            start = stop

    def mask(self, span: Span, window: int | None) -> Tensor:
        """The attention mask of a span: bool [rows, 1, tokens of a row, length]."""
        key = (span.start, window)
        if key not in self._masks:
            positions_M = self.positions_B
            if self.runs is not None:
                positions_M = positions_M[self.runs.tokens_M]
            for each, own_BM in zip(self.spans, self.by_span(positions_M), strict=True):
                places_S = torch.arange(each.length, device=own_BM.device)
                mask_BMS = places_S <= own_BM[..., None]
                if window is not None:
                    mask_BMS &= places_S > own_BM[..., None] - window
                self._masks[each.start, window] = mask_BMS[:, None]
        return self._masks[key]

    def bias(self, span: Span, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask as a bias on the scores, 0 or -inf, of the same shape; shared by all layers."""
        key = (span.start, window, dtype)
        if key not in self._biases:
            mask = self.mask(span, window)
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            self._biases[key] = zeros.masked_fill_(~mask, -torch.inf)
        return self._biases[key]

    def flash_bounds(self, slot_length: int, *, num_queries: int) -> flash.Bounds:
        """Offsets of `num_queries` queries a row over concatenated slots of `slot_length` keys.

        Only the keys up to each row's position are used.
        """
        key = slot_length, num_queries
        if key not in self._flash:
            count_B1 = torch.arange(
                len(self.positions_B) + 1, dtype=torch.int32, device=self.positions_B.device
            )
            self._flash[key] = flash.Bounds(
                query_B1=count_B1 * num_queries,
                key_B1=count_B1 * slot_length,
                max_queries=num_queries,
                max_keys=slot_length,
                used_B=(self.positions_B + 1).to(torch.int32),
            )
        return self._flash[key]
