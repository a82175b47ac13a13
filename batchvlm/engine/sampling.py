"""The next token of every row, each row under its own settings and its own random generator.

A row draws by inverse transform: one uniform number a step, from the row's own generator, picks the
token where the cumulated probabilities pass it. So what a row draws does not depend on its batch,
and costs one number however large the vocabulary is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from batchvlm.records import Generation

_MIN_TEMPERATURE = 1e-5

# Shape legend: B rows, V vocabulary (width of the logits), T tokens so far.


class RowSampler:
    """Chooses tokens for a fixed set of rows.

    Args:
        rows: the settings of B rows.
        eos_ids: ids that end a sequence.
        device: where the logits are.
    """

    def __init__(
        self, rows: Sequence[Generation], *, eos_ids: Sequence[int], device: torch.device
    ) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._eos_ids = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        self._min_new_tokens = [0 if r.ignore_eos else r.min_new_tokens for r in rows]
        # Below this, logits divided by it overflow: the likeliest token is what is meant.
        self._is_drawn = [r.temperature >= _MIN_TEMPERATURE for r in rows]
        self._rngs = [np.random.Generator(np.random.PCG64(r.seed)) for r in rows]
        self._drawn_B1 = torch.tensor(self._is_drawn, device=device)[:, None]
        drawn = [r for r, is_drawn in zip(rows, self._is_drawn, strict=True) if is_drawn]
        self._temperature_B1 = column([max(r.temperature, _MIN_TEMPERATURE) for r in rows])
        self._penalty_B1 = column([r.repetition_penalty for r in rows])
        self._top_k_B1 = column([r.top_k for r in rows]).long()
        self._top_p_B1 = column([r.top_p for r in rows])
        self._min_p_B1 = column([r.min_p for r in rows])
        self._has_penalty = any(r.repetition_penalty != 1.0 for r in rows)
        self._has_sorted_cut = any(r.top_k > 0 or r.top_p < 1.0 for r in drawn)
        self._has_min_p = any(r.min_p > 0 for r in drawn)

    @property
    def is_greedy(self) -> bool:
        """Whether every row just takes the likeliest token, so that nothing here is needed."""
        return not (any(self._is_drawn) or self._has_penalty or any(self._min_new_tokens))

    def choose(self, logits_BV: Tensor, ids_BT: Tensor, mask_BT: Tensor, step: int) -> Tensor:
        """Choose one token a row.

        Args:
            logits_BV: [B, V] of the last position.
            ids_BT: int64 [B, T] prompt and answer so far.
            mask_BT: [B, T] true where `ids_BT` is no padding.
            step: tokens generated so far.

        Returns:
            int64 [B].
        """
        scores_BV = logits_BV.float()
        if self._has_penalty:
            scores_BV = self._penalise(scores_BV, ids_BT, mask_BT)
        if any(step < least for least in self._min_new_tokens):
            too_early = [step < least for least in self._min_new_tokens]
            rows = torch.tensor(too_early, device=scores_BV.device).nonzero()
            scores_BV = scores_BV.clone()
            scores_BV[rows, self._eos_ids] = -torch.inf
        greedy_B = scores_BV.argmax(-1)
        if not any(self._is_drawn):
            return greedy_B
        drawn_B = self._draw(self._cut(scores_BV / self._temperature_B1))
        return torch.where(self._drawn_B1[:, 0], drawn_B, greedy_B)

    def _penalise(self, scores_BV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        # As in CTRL (Keskar et al. 2019) and transformers: divide what is above 0, multiply below.
        seen_BV = torch.zeros_like(scores_BV, dtype=torch.bool)
        # Some models keep their image placeholder above the ids that they can answer.
        is_answerable_BT = ids_BT < scores_BV.shape[-1]
        rows, columns = (mask_BT.bool() & is_answerable_BT).nonzero(as_tuple=True)
        seen_BV[rows, ids_BT[rows, columns]] = True
        penalised_BV = torch.where(
            scores_BV > 0, scores_BV / self._penalty_B1, scores_BV * self._penalty_B1
        )
        return torch.where(seen_BV, penalised_BV, scores_BV)

    def _cut(self, scores_BV: Tensor) -> Tensor:
        if self._has_min_p:
            top_B1 = scores_BV.max(-1, keepdim=True).values
            floor_B1 = top_B1 + self._min_p_B1.log()
            scores_BV = scores_BV.masked_fill(scores_BV < floor_B1, -torch.inf)
        if self._has_sorted_cut:
            sorted_BV, order_BV = scores_BV.sort(-1, descending=True)
            rank_V = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device)
            drop_BV = (rank_V >= self._top_k_B1) & (self._top_k_B1 > 0)
            # A row's probabilities are renormalised after top-k, as transformers and vLLM do.
            probs_BV = sorted_BV.masked_fill(drop_BV, -torch.inf).softmax(-1)
            before_BV = probs_BV.cumsum(-1) - probs_BV
            drop_BV |= (before_BV >= self._top_p_B1) & (self._top_p_B1 < 1)
            drop_BV[:, 0] = False
            drop_BV = torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV)
            scores_BV = scores_BV.masked_fill(drop_BV, -torch.inf)
        return scores_BV

    def _draw(self, scores_BV: Tensor) -> Tensor:
        cumulated_BV = scores_BV.softmax(-1).cumsum(-1)
        total_B1 = cumulated_BV[:, -1:]
        uniform = [
            rng.random() if is_drawn else 0.0
            for rng, is_drawn in zip(self._rngs, self._is_drawn, strict=True)
        ]
        uniform_B1 = torch.tensor(uniform, dtype=torch.float32, device=scores_BV.device)[:, None]
        # Below the total, also where rounding makes the product equal to it: beyond the last step
        # there is no token, and a step of height 0 is never found.
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        target_B1 = torch.minimum(uniform_B1 * total_B1, below_B1)
        drawn_B = torch.searchsorted(cumulated_BV, target_B1, right=True)[:, 0]
        # Where the logits are not finite nothing is found, and an id beyond the vocabulary would
        # poison a CUDA context.
        return drawn_B.clamp(max=scores_BV.shape[-1] - 1)
