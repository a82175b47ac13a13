"""Runs decode steps over slots: from each slot's newest token to the logits of the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from batchvlm.engine.forward.cache import SlotCache
from batchvlm.engine.forward.decoder import Decoder, Prompt
from batchvlm.engine.forward.layout import Newest, Span
from batchvlm.engine.forward.streams import Streams
from batchvlm.engine.slots.rows import Row

# Shape legend: N slots of the cache, B neighbouring slots, V vocabulary.

_NEIGHBOURS = 8
"""Slots per span on a CPU. A span is as long as its longest row, so narrow spans waste less."""


class StepRunner:
    """Holds the newest token of each slot on the device, and runs decode steps over them.

    Args:
        decoder: a model's decoder.
        num_slots: N.
    """

    def __init__(self, decoder: Decoder, num_slots: int) -> None:
        self._decoder = decoder
        self._newest = Newest(
            *(torch.zeros(num_slots, dtype=torch.long, device=decoder.device) for _ in range(3))
        )

    def admit(self, first: int, prompts: Sequence[Prompt]) -> None:
        """Set the positions of prompts put into neighbouring slots, before their first token."""
        slots = slice(first, first + len(prompts))
        # The first chosen token follows the prompt, and `push` advances the position by one.
        before_B = torch.tensor([len(prompt) - 1 for prompt in prompts])
        self._newest.positions_N[slots] = self._decoder.to_device(before_B)
        deltas_B = torch.tensor([prompt.rope_delta for prompt in prompts])
        self._newest.deltas_N[slots] = self._decoder.to_device(deltas_B)

    def push(self, start: int, stop: int, ids_B: Tensor) -> None:
        """Set the newest tokens of slots `start` to `stop`, one position further on."""
        self._newest.ids_N[start:stop] = ids_B
        self._newest.positions_N[start:stop] += 1

    def skip(self, slot: int, num_tokens: int) -> None:
        """Advance the position of a slot's newest token past `num_tokens` forced tokens."""
        self._newest.positions_N[slot] += num_tokens

    def move(self, source: int, target: int) -> None:
        """Copy the state of slot `source` to slot `target`."""
        newest = self._newest
        for values_N in (newest.ids_N, newest.positions_N, newest.deltas_N):
            values_N[target] = values_N[source]

    def step(
        self, cache: SlotCache, rows: Sequence[Row], start: int, streams: Streams, *, num_used: int
    ) -> Tensor:
        """Run one decode step: each slot's newest token, and the tokens forced after it.

        Args:
            cache: keys and values of N slots.
            rows: the rows in B neighbouring slots.
            start: the first of these slots.
            streams: compute parts of the step at once.
            num_used: slots in use, including these.

        Returns:
            logits_BV: [B, V], after each slot's last token; on a GPU valid until the next step.
        """
        runs = {slot: row.run for slot, row in enumerate(rows, start) if row.run}

        def compute(spans: Sequence[Span]) -> Tensor:
            own_runs = _within(spans, runs)
            return self._decoder.step(cache, self._newest, spans, own_runs, num_used=num_used)

        parts = list(streams.map(compute, streams.parts(self._spans(cache, rows, start))))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _spans(self, cache: SlotCache, rows: Sequence[Row], start: int) -> list[Span]:
        """Divide neighbouring slots from `start` on into spans, each as long as its longest row."""
        if self._decoder.is_varlen:
            return [Span(start, start + len(rows), cache.length)]
        width = _NEIGHBOURS if self._decoder.device.type == "cpu" else len(rows)
        spans = []
        for first in range(0, len(rows), width):
            group = rows[first : first + width]
            length = 1 + max(row.num_cached + len(row.run) for row in group)
            spans.append(Span(start + first, start + first + len(group), length))
        return spans


def _within(spans: Sequence[Span], runs: Mapping[int, Sequence[int]]) -> dict[int, Sequence[int]]:
    slots = range(spans[0].start, spans[-1].stop)
    return {slot: run for slot, run in runs.items() if slot in slots}
