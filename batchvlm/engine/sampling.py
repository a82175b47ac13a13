"""Sampling of the next token of each row, with its own settings and random generator.

A row samples by inverse transform: it draws one uniform number per step from its own generator, and
takes the token at which the cumulative probability exceeds it. The result does not depend on the
batch, and needs one random number for any size of vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchvlm.constraints.masks import apply_mask
from batchvlm.records import Generation

_MIN_TEMPERATURE = 1e-5

# Shape legend: B slots of one call, V vocabulary (width of the logits), S all slots.


@dataclass(frozen=True, slots=True)
class NextTokens:
    """One token for each of B slots, on the device of the logits."""

    ids_B: Tensor
    """int64 [B]."""
    logprobs_B: Tensor | None
    """float32 [B]: log-probability of each token at temperature 1, before penalties, masks, top-k,
    top-p and min-p, with suppressed ids excluded; None if no row asks."""
    is_finite_B: Tensor
    """bool [B]: False if the row's logits contain NaN or infinity that affected its token."""


@dataclass(slots=True)
class _Row:
    settings: Generation
    rng: np.random.Generator
    num_tokens: int = 0
    uniform: float | None = None
    """Uniform number for the next token; kept for a retry after an OOM."""

    @property
    def is_drawn(self) -> bool:
        # Below this, logits divided by the temperature overflow; the row is greedy instead.
        return self.settings.temperature >= _MIN_TEMPERATURE

    @property
    def num_without_eos(self) -> int:
        return 0 if self.settings.ignore_eos else self.settings.min_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """The rows of one call and their settings; valid until a row is admitted or moved."""

    slots: Sequence[int]
    rows: Sequence[_Row]
    has_logprobs: bool
    has_penalty: bool
    has_count_penalty: bool
    has_least: bool
    has_drawn: bool
    has_sorted_cut: bool
    has_min_p: bool
    slots_B: Tensor
    drawn_B: Tensor
    temperature_B1: Tensor
    penalty_B1: Tensor
    top_k_B1: Tensor
    top_p_B1: Tensor
    min_p_B1: Tensor
    frequency_B1: Tensor
    presence_B1: Tensor


class RowSampler:
    """Samples tokens for slots, which rows enter and leave.

    Nothing here synchronizes with the device, so the host may run ahead of it.

    Args:
        num_slots: number of slots, which are numbered from 0.
        eos_ids: ids that end a sequence.
        device: device of the logits.
        suppress_ids: ids that are never sampled.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        eos_ids: Sequence[int],
        device: torch.device,
        suppress_ids: Sequence[int] = (),
    ) -> None:
        self._eos_ids = tuple(eos_ids)
        self._suppress_ids = tuple(suppress_ids)
        self._device = device
        self._rows: list[_Row | None] = [None] * num_slots
        self._batch: tuple[Sequence[int] | slice, _Batch] | None = None
        # For repetition penalties: the ids seen by each slot's row, and prompts not yet included.
        self._seen_SV: Tensor | None = None
        self._prompts: dict[int, npt.NDArray[np.int64]] = {}
        # For frequency and presence penalties: count of each id in the row's completion.
        self._counts_SV: Tensor | None = None
        self._uncounted: set[int] = set()
        self._columns: dict[tuple[int, ...], Tensor] = {}

    def admit(self, slot: int, row: Generation, prompt_ids: npt.NDArray[np.int64]) -> None:
        """Assign a slot to a new row, and discard the slot's previous state.

        Args:
            slot: in 0..num_slots-1.
            row: generation settings of the row.
            prompt_ids: all ids of its prompt, in any shape; the repetition penalty covers them.
        """
        self._batch = None
        self._rows[slot] = _Row(row, np.random.Generator(np.random.PCG64(row.seed)))
        self._prompts.pop(slot, None)
        self._uncounted.discard(slot)
        if row.repetition_penalty != 1.0:
            self._prompts[slot] = np.unique(prompt_ids)
        if _has_count_penalty(row):
            self._uncounted.add(slot)

    def skip(self, slot: int, num_tokens: int) -> None:
        """Advance a row without penalties past tokens that were not sampled here.

        Its generator advances too, so later tokens are as if it had sampled these one by one.
        """
        row = self._rows[slot]
        assert row is not None and not row.settings.has_penalty
        row.num_tokens += num_tokens
        if row.is_drawn:
            row.rng.random(num_tokens)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Move the row in slot `source` to slot `target`, which frees `source`."""
        row = self._rows[source]
        assert row is not None, f"slot {source} is free"
        if source == target:
            return
        self._batch = None
        self._rows[target], self._rows[source] = row, None
        self._prompts.pop(target, None)
        if source in self._prompts:
            self._prompts[target] = self._prompts.pop(source)
        elif self._seen_SV is not None and row.settings.repetition_penalty != 1.0:
            self._seen_SV[target].copy_(self._seen_SV[source])
        self._uncounted.discard(target)
        if source in self._uncounted:
            self._uncounted.remove(source)
            self._uncounted.add(target)
        elif self._counts_SV is not None and _has_count_penalty(row.settings):
            self._counts_SV[target].copy_(self._counts_SV[source])

    @torch.inference_mode()
    def choose(
        self,
        logits_BV: Tensor,
        slots: Sequence[int] | slice,
        *,
        mask_BW: Tensor | None = None,
    ) -> NextTokens:
        """Choose the next token of the rows in these slots.

        Args:
            logits_BV: [B, V] of the last position, in the order of `slots`; not modified.
            slots: B distinct slots, each with a row.
            mask_BW: bitmask of the allowed tokens, int32 [B, V / 32]; None allows all.
        """
        batch = self._batch_of(slots)
        assert len(logits_BV) == len(batch.rows), "one row of logits for each slot"
        if self._suppress_ids:
            logits_BV = self._without(logits_BV, self._suppress_ids)
        scores_BV = logits_BV
        has_any_penalty = batch.has_penalty or batch.has_count_penalty
        if batch.has_drawn or has_any_penalty or batch.has_logprobs:
            scores_BV = logits_BV = logits_BV.float()
        if batch.has_penalty:
            scores_BV = self._penalise(scores_BV, batch)
        if batch.has_count_penalty:
            scores_BV = self._penalise_counts(scores_BV, batch)
        if mask_BW is not None:
            scores_BV = apply_mask(scores_BV, mask_BW)
        if batch.has_least:
            too_early = [row.num_tokens < row.num_without_eos for row in batch.rows]
            if any(too_early):
                held_BV = self._without(scores_BV, self._eos_ids)
                early_B = self._to_device(too_early, torch.bool)
                scores_BV = torch.where(early_B[:, None], held_BV, scores_BV)
        ids_B = scores_BV.argmax(-1)
        is_sound_B = None
        if batch.has_drawn:
            drawn_B, is_sound_B = self._draw(
                _cut(scores_BV / batch.temperature_B1, batch), batch.rows
            )
            ids_B = torch.where(batch.drawn_B, drawn_B, ids_B)
        chosen_B = logits_BV.gather(-1, ids_B[:, None])[:, 0]
        is_finite_B = chosen_B.isfinite()
        if is_sound_B is not None:
            is_finite_B &= is_sound_B | ~batch.drawn_B
        logprobs_B = chosen_B - logits_BV.logsumexp(-1) if batch.has_logprobs else None
        is_seen_B = torch.ones_like(is_finite_B) if batch.has_penalty else None
        counts_B = None
        if batch.has_count_penalty:
            assert self._counts_SV is not None
            places_B = batch.slots_B * self._counts_SV.shape[1] + ids_B
            counts_B = self._counts_SV.view(-1).index_select(0, places_B) + 1
        # All allocations are done; the state of rows changes only below. If a call raises before,
        # it can be repeated, also for a part of the rows, with the same result.
        if is_seen_B is not None:
            assert self._seen_SV is not None
            self._seen_SV.index_put_((batch.slots_B, ids_B), is_seen_B)
        if counts_B is not None:
            assert self._counts_SV is not None
            self._counts_SV.index_put_((batch.slots_B, ids_B), counts_B)
        for row in batch.rows:
            row.num_tokens += 1
            row.uniform = None
        return NextTokens(ids_B=ids_B, logprobs_B=logprobs_B, is_finite_B=is_finite_B)

    def _batch_of(self, slots: Sequence[int] | slice) -> _Batch:
        key = slots if isinstance(slots, slice) else tuple(slots)
        if self._batch is not None and self._batch[0] == key:
            return self._batch[1]
        numbers = range(len(self._rows))[key] if isinstance(key, slice) else key
        rows = []
        for slot in numbers:
            row = self._rows[slot]
            assert row is not None, f"slot {slot} is free"
            rows.append(row)
        every = [row.settings for row in rows]
        drawn = [row.settings for row in rows if row.is_drawn]
        columns = self._to_device(
            [
                [max(r.temperature, _MIN_TEMPERATURE) for r in every],
                [r.repetition_penalty for r in every],
                [r.top_p for r in every],
                [r.min_p for r in every],
                [r.frequency_penalty for r in every],
                [r.presence_penalty for r in every],
            ],
            torch.float32,
        )[:, :, None]
        batch = _Batch(
            slots=numbers,
            rows=rows,
            has_logprobs=any(r.logprobs for r in every),
            has_penalty=any(r.repetition_penalty != 1.0 for r in every),
            has_count_penalty=any(map(_has_count_penalty, every)),
            has_least=any(row.num_without_eos for row in rows),
            has_drawn=bool(drawn),
            has_sorted_cut=any(r.top_k > 0 or r.top_p < 1.0 for r in drawn),
            has_min_p=any(r.min_p > 0 for r in drawn),
            slots_B=self._to_device(list(numbers), torch.long),
            drawn_B=self._to_device([row.is_drawn for row in rows], torch.bool),
            temperature_B1=columns[0],
            penalty_B1=columns[1],
            top_k_B1=self._to_device([r.top_k for r in every], torch.long)[:, None],
            top_p_B1=columns[2],
            min_p_B1=columns[3],
            frequency_B1=columns[4],
            presence_B1=columns[5],
        )
        self._batch = (key, batch)
        return batch

    def _penalise(self, scores_BV: Tensor, batch: _Batch) -> Tensor:
        num_ids = scores_BV.shape[-1]
        if self._seen_SV is None:
            shape = (len(self._rows), num_ids)
            self._seen_SV = torch.zeros(shape, dtype=torch.bool, device=self._device)
        for slot in batch.slots:
            if slot in self._prompts:
                # The image placeholder of some models is beyond the width of the logits.
                ids = self._prompts[slot]
                ids_T = self._to_device(ids[(ids >= 0) & (ids < num_ids)], torch.long)
                self._seen_SV[slot].zero_().index_fill_(0, ids_T, True)
                del self._prompts[slot]
        # As in CTRL (Keskar et al. 2019) and transformers: divide scores > 0, multiply others.
        penalised_BV = torch.where(
            scores_BV > 0, scores_BV / batch.penalty_B1, scores_BV * batch.penalty_B1
        )
        seen_BV = self._seen_SV.index_select(0, batch.slots_B)
        return torch.where(seen_BV, penalised_BV, scores_BV)

    def _penalise_counts(self, scores_BV: Tensor, batch: _Batch) -> Tensor:
        if self._counts_SV is None:
            shape = (len(self._rows), scores_BV.shape[-1])
            self._counts_SV = torch.zeros(shape, dtype=torch.int32, device=self._device)
        for slot in batch.slots:
            if slot in self._uncounted:
                self._counts_SV[slot].zero_()
                self._uncounted.remove(slot)
        # As OpenAI's API defines them: counted over the completion, without the prompt.
        counts_BV = self._counts_SV.index_select(0, batch.slots_B)
        taken_BV = counts_BV * batch.frequency_B1 + (counts_BV > 0) * batch.presence_B1
        return scores_BV - taken_BV

    def _without(self, scores_BV: Tensor, ids: tuple[int, ...]) -> Tensor:
        """Return the scores with those of `ids` at -inf."""
        if ids not in self._columns:
            known = [i for i in ids if 0 <= i < scores_BV.shape[-1]]
            self._columns[ids] = self._to_device(known, torch.long)
        return scores_BV.index_fill(-1, self._columns[ids], -torch.inf)

    def _draw(self, scores_BV: Tensor, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Sample a token for each row.

        Returns:
            int64 [B] ids, and bool [B] whether the row's probabilities are finite.
        """
        cumulated_BV = scores_BV.softmax(-1).cumsum(-1)
        total_B1 = cumulated_BV[:, -1:]
        for row in rows:
            if row.is_drawn and row.uniform is None:
                row.uniform = row.rng.random()
        uniform = [row.uniform if row.uniform is not None else 0.0 for row in rows]
        uniform_B1 = self._to_device(uniform, torch.float32)[:, None]
        # Strictly below the total, even if the product rounds up to it: there is no token beyond
        # it. A token of probability 0 is never found.
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        target_B1 = torch.minimum(uniform_B1 * total_B1, below_B1)
        drawn_B = torch.searchsorted(cumulated_BV, target_B1, right=True)[:, 0]
        # With non-finite logits the search returns V, which would corrupt the CUDA context.
        return drawn_B.clamp(max=scores_BV.shape[-1] - 1), total_B1[:, 0].isfinite()

    def _to_device(
        self, values: Sequence[object] | npt.NDArray[np.int64], dtype: torch.dtype
    ) -> Tensor:
        host = torch.as_tensor(values, dtype=dtype)
        if self._device.type != "cuda":
            return host.to(self._device)
        # A copy from pageable memory would synchronize with the device.
        return host.pin_memory().to(self._device, non_blocking=True)


def _has_count_penalty(row: Generation) -> bool:
    return row.frequency_penalty != 0 or row.presence_penalty != 0


def _cut(scores_BV: Tensor, batch: _Batch) -> Tensor:
    if batch.has_min_p:
        top_B1 = scores_BV.max(-1, keepdim=True).values
        floor_B1 = top_B1 + batch.min_p_B1.log()
        scores_BV = scores_BV.masked_fill(scores_BV < floor_B1, -torch.inf)
    if batch.has_sorted_cut:
        sorted_BV, order_BV = scores_BV.sort(-1, descending=True)
        rank_V = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device)
        drop_BV = (rank_V >= batch.top_k_B1) & (batch.top_k_B1 > 0)
        # Probabilities are renormalized after top-k, as in transformers and vLLM.
        probs_BV = sorted_BV.masked_fill(drop_BV, -torch.inf).softmax(-1)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        drop_BV |= (before_BV >= batch.top_p_B1) & (batch.top_p_B1 < 1)
        drop_BV[:, 0] = False
        drop_BV = torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV)
        scores_BV = scores_BV.masked_fill(drop_BV, -torch.inf)
    return scores_BV
