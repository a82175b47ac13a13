"""Scoring of choices for models that need transformers' `generate()`.

`generate()` prepares a batch as for its own decoding, and passes it to `ForcedChoices`. The prompts
are prefilled once. Their KV cache is then repeated for as many choices per row as fit into a batch,
and the tokens of these choices are teacher-forced step by step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchvlm.engine.choices import RowChoices

# Shape legend: B rows of the batch, E = B k choices in flight, k per row, T padded prompt length
# plus tokens forced so far, L tokens of the longest choice, V vocabulary.

_CACHES = ("cache", "past_key_values", "cache_params")
"""Names of the KV cache; from transformers 5.24 on, the first."""


class ForcedChoices:
    """Replaces the decoding loop of `generate()`, as its `custom_generate`.

    Args:
        rows: the choices of each row of the batch.
        eos_ids: ids that end an answer.
        max_answers: upper bound of E, but at least B.
    """

    def __init__(
        self, rows: Sequence[RowChoices], *, eos_ids: Sequence[int], max_answers: int
    ) -> None:
        self._rows = rows
        self._eos_ids = list(eos_ids)
        self._max_answers = max_answers
        self.logprobs: list[list[list[float]]] = [[] for _ in rows]
        """By row and choice: log-probability of each token, and of the EOS after them."""
        self.is_finite = [True] * len(rows)
        """By row: whether the logits were finite."""
        self.row_steps = 0

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Score all choices of all rows.

        Returns:
            The prompts' ids, unchanged; the results are in the attributes.
        """
        prompt_ids_BT = input_ids
        logits_BV, kwargs = _forward(model, input_ids, kwargs, is_first_iteration=True)
        forced = generation_config.forced_bos_token_id
        if model.config.is_encoder_decoder and forced is not None:
            # Completions of such a model always start with this token.
            first = input_ids.new_full((len(input_ids), 1), forced)
            input_ids = torch.cat([input_ids, first], dim=1)
            logits_BV, kwargs = _forward(model, input_ids, kwargs, next_sequence_length=1)
        # Image inputs are needed in prefill only.
        kwargs = {n: v for n, v in kwargs.items() if "pixel" not in n and n != "mm_encoder_outputs"}
        num_rows = len(self._rows)
        most = max(len(row.ids) for row in self._rows)
        width = max(1, min(most, self._max_answers // num_rows))
        for first_choice in range(0, most, width):
            is_last = first_choice + width >= most
            self._score(
                model,
                _Prefilled(input_ids, logits_BV, kwargs if is_last else _copy_kwargs(kwargs)),
                range(first_choice, min(first_choice + width, most)),
                logits_processor,
            )
        return prompt_ids_BT

    def _score(
        self, model: Any, prefilled: _Prefilled, places: range, logits_processor: Any
    ) -> None:
        """Score the choices at these indices of each row.

        A row with fewer choices repeats its last one, whose result is dropped.
        """
        device = prefilled.ids_BT.device
        # The choices of a row are adjacent, as generate() expands rows.
        ids = [row.ids[min(place, len(row.ids) - 1)] for row in self._rows for place in places]
        length = max(map(len, ids))
        tokens_EL = torch.tensor(
            [[*i, *[0] * (length - len(i))] for i in ids], device=device
        ).long()
        ids_ET, scores_EV, kwargs = prefilled.repeated(model, len(places))
        steps = []
        for step in range(length + 1):
            # As in generate(): suppressed ids of the repository.
            scores_EV = logits_processor(ids_ET, scores_EV.float())
            total_E = scores_EV.logsumexp(-1)
            token_E = end_E = torch.zeros_like(total_E)
            if step < length:
                chosen_E1 = tokens_EL[:, step : step + 1].to(scores_EV.device)
                token_E = scores_EV.gather(-1, chosen_E1)[:, 0] - total_E
            if self._eos_ids:
                end_E = scores_EV[:, self._eos_ids].logsumexp(-1) - total_E
            steps.append(torch.stack([token_E, end_E, total_E]))
            if step < length:
                ids_ET = torch.cat([ids_ET, tokens_EL[:, step : step + 1]], dim=1)
                scores_EV, kwargs = _forward(model, ids_ET, kwargs, next_sequence_length=1)
                self.row_steps += len(ids_ET)
        # Per choice: log-probabilities of tokens and ends, and logsumexp, of each step.
        by_answer = torch.stack(steps, dim=-1).transpose(0, 1).tolist()
        answers = iter(zip(ids, by_answer, strict=True))
        for i, row in enumerate(self._rows):
            for place in places:
                choice, (of_tokens, of_ends, totals) = next(answers)
                if place >= len(row.ids):
                    continue
                end = [of_ends[len(choice)]] if self._eos_ids else []
                self.logprobs[i].append([*of_tokens[: len(choice)], *end])
                is_finite = torch.tensor(totals[: len(choice) + 1]).isfinite().all()
                self.is_finite[i] &= bool(is_finite)


class _Prefilled:
    """Prefilled rows: ids, next-token logits, and the model kwargs of `generate()`."""

    def __init__(self, ids_BT: Tensor, logits_BV: Tensor, kwargs: dict[str, Any]) -> None:
        self.ids_BT = ids_BT
        self._logits_BV = logits_BV
        self._kwargs = kwargs

    def repeated(self, model: Any, num: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return ids, logits and kwargs with each row repeated `num` times. Call it once."""
        caches = {name: self._kwargs.pop(name) for name in _CACHES if name in self._kwargs}
        ids_ET, kwargs = model._expand_inputs_for_generation(
            expand_size=num,
            is_encoder_decoder=model.config.is_encoder_decoder,
            input_ids=self.ids_BT,
            **self._kwargs,
        )
        rows_E = torch.arange(len(self.ids_BT), device=self.ids_BT.device).repeat_interleave(num)
        if num > 1:
            for cache in caches.values():
                if cache is not None:
                    cache.reorder_cache(rows_E)
        logits_EV = self._logits_BV[rows_E.to(self._logits_BV.device)]
        return ids_ET, logits_EV, {**kwargs, **caches}


def _copy_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Copy the model kwargs of `generate()`, and deeply the caches."""
    return {n: copy.deepcopy(v) if n in _CACHES else copy.copy(v) for n, v in kwargs.items()}


def _forward(
    model: Any, ids: Tensor, kwargs: dict[str, Any], **how: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Run one forward pass as `generate()` does; return the last logits and updated kwargs."""
    outputs = model(**model.prepare_inputs_for_generation(ids, **how, **kwargs), return_dict=True)
    kwargs = model._update_model_kwargs_for_generation(
        outputs, kwargs, is_encoder_decoder=model.config.is_encoder_decoder
    )
    return outputs.logits[:, -1], kwargs
