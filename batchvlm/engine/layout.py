"""How rows lie in a forward of the decoder, which attention follows.

- `Packed`: several prompts behind one another in one row. Each attends to itself alone, so there
  is no padding and no dense mask over all of them.
- `Slots`: one new token for each of B slots, whose keys and values lie in static buffers; where a
  grammar leaves no choice, several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from batchvlm.engine import flash

# Shape legend: as in attention.py; N slots of the cache.

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one row in one layer, each [K, T_i, D]."""


@dataclass(slots=True)
class Packed:
    """Prompts behind one another: row i is tokens `bounds[i]` to `bounds[i + 1]`."""

    bounds: tuple[int, ...]
    past: tuple[Sequence[KeysValues] | None, ...]
    """For each row, by layer, what was computed of its prompt before; None: it starts here."""
    last_E: Tensor | None = None
    """int64 [E]: the tokens whose logits are asked for; None: all count."""
    sees_ahead: bool = False
    """Set by a forward in which some token attends to a later one, as in PaliGemma's prompts."""
    trees: tuple[Tensor, ...] | None = None
    """Of tokens that go on from a prompt in several ways: for each row, which of its tokens each
    attends to besides the prompt, bool [T_i, T_i]; one lies as far behind the prompt as it attends
    to others."""
    _flash: flash.Bounds | None = None
    _tree_masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    @property
    def spans(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds, self.bounds[1:], strict=False))

    def flash_bounds(self, device: torch.device) -> flash.Bounds:
        """Where each row's queries and, what was computed before included, its keys lie."""
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

    def tree_mask(self, row: int, num_before: int, window: int | None) -> Tensor:
        """What the tokens of one row's tree attend to: bool [T_i, P_i + T_i]."""
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
    """Positions that the longest of them attends to, the new token's among them."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest token of each of N slots, which a step computes: int64 [N] each."""

    ids_N: Tensor
    positions_N: Tensor
    """Where it lies."""
    deltas_N: Tensor
    """What its rotary position is ahead of that."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Several new tokens for some slots: the T tokens of a forward, behind one another.

    First come the B tokens that each slot gets, then those behind them. Attention takes the rows of
    a span with as many tokens as the longest has; a shorter row's first one is there again.
    """

    tokens_M: Tensor
    """int64 [M]: these tokens of all spans."""
    places_T: Tensor
    """int64 [T]: where each token is among them."""
    widths: tuple[int, ...]
    """Tokens of a row, by span."""

    @classmethod
    def behind(cls, spans: Sequence[Span], num_more: Mapping[int, int]) -> Runs:
        """Lay out so many tokens more for these slots, on the host.

        Args:
            spans: the slots, the first of them slot 0.
            num_more: by slot; these tokens lie in this order.
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
        """The same where `move` brings tensors."""
        return Runs(move(self.tokens_M), move(self.places_T), self.widths)


@dataclass(frozen=True, slots=True)
class Slots:
    """One new token for each slot, or several for some."""

    positions_B: Tensor
    """int64 [B]: where each row's new token lies; with runs [T], of each token."""
    spans: tuple[Span, ...]
    runs: Runs | None = None
    last_E: Tensor | None = None
    """int64 [E]: the tokens whose logits are asked for; None: all."""
    has_kernel: bool = False
    """Whether `slot_kernel` attends where flash attention could."""
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    _flash: dict[tuple[int, int], flash.Bounds] = field(default_factory=dict)

    def by_span(self, tensor_M: Tensor) -> Iterator[Tensor]:
        """What belongs to the tokens of each span, [rows, tokens of each, ...]."""
        start = 0
        for place, span in enumerate(self.spans):
            width = 1 if self.runs is None else self.runs.widths[place]
            stop = start + (span.stop - span.start) * width
            yield tensor_M[start:stop].view(-1, width, *tensor_M.shape[1:])
            start = stop

    def mask(self, span: Span, window: int | None) -> Tensor:
        """What the tokens of a span attend to: bool [rows, 1, tokens of each, length]."""
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
        """The mask as what is added to scores, made once for all layers, of the same shape."""
        key = (span.start, window, dtype)
        if key not in self._biases:
            mask = self.mask(span, window)
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            self._biases[key] = zeros.masked_fill_(~mask, -torch.inf)
        return self._biases[key]

    def flash_bounds(self, slot_length: int, *, num_queries: int) -> flash.Bounds:
        """So many queries a row, at its position, over slots of one length behind one another."""
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
