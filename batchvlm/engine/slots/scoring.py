"""Scoring of choices by the slot engine: tree attention after prefill, without decode steps.

The choices of a row form a token tree after its prompt. The trees of several rows run in one packed
forward pass: each token attends to its prompt and its ancestors.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from batchvlm.engine.choices import AT_PROMPT, Choices, ChoiceTree, RowChoices
from batchvlm.engine.faults import device_error, failure_of, free_memory
from batchvlm.engine.forward.cache import RowCache
from batchvlm.engine.forward.decoder import Branches, Decoder
from batchvlm.engine.protocol import Outcome
from batchvlm.engine.slots.clock import Clock
from batchvlm.engine.slots.memory import MemoryPlan
from batchvlm.engine.slots.rows import ToHost
from batchvlm.engine.slots.waiting import PrefilledRow
from batchvlm.engine.stops import not_finite
from batchvlm.errors import ErrorType, RowError
from batchvlm.records import Completion, Failure

log = logging.getLogger(__name__)

# Shape legend: R trees of a pack, M tokens of all of them, V vocabulary.


@dataclass(slots=True, eq=False)
class _Row:
    """A row whose choices are being scored."""

    prefilled: PrefilledRow
    choices: RowChoices
    logprobs: list[list[float]]
    """By choice: log-probabilities of its tokens and of EOS; empty until it is scored."""
    num_left: int
    """Number of choices that are not scored yet."""
    failure: Failure | None = None

    @property
    def past(self) -> RowCache:
        """KV cache of the prompt, in one piece."""
        pieces = self.prefilled.pieces
        if len(pieces) > 1:
            self.prefilled.pieces = [reduce(RowCache.joined, pieces)]
        return self.prefilled.pieces[0]


_Part = tuple[_Row, ChoiceTree]


class Scoring:
    """Scores the choices of prefilled rows.

    Args:
        choices: tokenizes the choices of each row.
        decoder: runs the model.
        plan: limits the tokens of a pack.
        clock: measures the time.
        suppress_ids: ids that get probability 0.
    """

    def __init__(
        self,
        choices: Choices,
        decoder: Decoder,
        plan: MemoryPlan,
        clock: Clock,
        *,
        suppress_ids: Sequence[int] = (),
    ) -> None:
        self._choices = choices
        self._decoder = decoder
        self._plan = plan
        self._clock = clock
        self._suppress_ids = torch.tensor(suppress_ids, dtype=torch.long, device=decoder.device)
        self._eos_ids = torch.tensor(choices.eos_ids, dtype=torch.long, device=decoder.device)
        self._in_flight: deque[tuple[list[_Part], ToHost]] = deque()
        self._failed: list[Outcome] = []

    @property
    def is_busy(self) -> bool:
        """Whether `take` has rows left to return."""
        return bool(self._in_flight or self._failed)

    def score(self, rows: Sequence[PrefilledRow]) -> None:
        """Begin to score the choices of these rows."""
        parts: list[_Part] = []
        for prefilled in rows:
            try:
                choices = self._choices.of(prefilled.sample)
            except RowError as error:
                self._failed.append((prefilled.sample, Failure.of(error)))
                continue
            num = len(choices.texts)
            row = _Row(prefilled, choices, logprobs=[[] for _ in range(num)], num_left=num)
            max_nodes = self._plan.num_scored(prefilled.logits_V.shape[-1])
            parts += [(row, tree) for tree in choices.trees(max_nodes)]
        with self._clock.measure("decode_s"):
            for pack in self._packs(parts):
                self._launch_or_split(pack)

    def take(self, *, num_left: int = 0) -> Iterator[Outcome]:
        """Rows whose choices are scored, waiting for the device.

        Args:
            num_left: number of packs that may stay in flight.
        """
        failed, self._failed = self._failed, []
        yield from failed
        while len(self._in_flight) > num_left:
            yield from self._read(*self._in_flight.popleft())

    def _packs(self, parts: Sequence[_Part]) -> Iterator[list[_Part]]:
        pack: list[_Part] = []
        num_tokens = 0
        for row, tree in parts:
            max_tokens = self._plan.num_scored(row.prefilled.logits_V.shape[-1])
            # +1 for the end of the prompt, whose logits are processed with those of the tree.
            if pack and num_tokens + len(tree) + 1 > max_tokens:
                yield pack
                pack, num_tokens = [], 0
            pack.append((row, tree))
            num_tokens += len(tree) + 1
        if pack:
            yield pack

    def _launch_or_split(self, pack: list[_Part]) -> None:
        pack = [(row, tree) for row, tree in pack if row.failure is None]
        if not pack:
            return
        halves = self._halves(pack)
        num_tokens = sum(len(tree) for _, tree in pack)
        # The limit may have been lowered after an OOM, since the pack was formed.
        if halves and num_tokens > self._plan.num_scored(pack[0][0].prefilled.logits_V.shape[-1]):
            for half in halves:
                self._launch_or_split(half)
            return
        try:
            self._in_flight.append((pack, ToHost([self._launch(pack)])))
            self._plan.count_good_scored()
            return
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except Exception as error:
            failure = failure_of(error)
        free_memory(self._decoder.device)
        is_oom = failure.error_type is ErrorType.OOM
        if is_oom:
            self._plan.lower_scored(num_tokens)
        if len(pack) == 1 and not (is_oom and halves):
            row, _ = pack[0]
            row.failure = failure
            self._failed.append((row.prefilled.sample, failure))
            return
        log.warning("scoring %d tokens failed (%s); halving them", num_tokens, failure.message)
        for half in halves:
            self._launch_or_split(half)

    def _halves(self, pack: list[_Part]) -> list[list[_Part]]:
        """Split a pack into two, or its only tree by choices; empty if that is impossible."""
        if len(pack) > 1:
            middle = len(pack) // 2
            return [pack[:middle], pack[middle:]]
        ((row, tree),) = pack
        return [[(row, half)] for half in tree.halves()] if len(tree.places) > 1 else []

    @torch.inference_mode()
    def _launch(self, pack: Sequence[_Part]) -> Tensor:
        """Run a pack through the model.

        Returns:
            float32 [3, M + R], for the nodes of all trees and then the end of each prompt: the
            log-probability of the token after its parent (0 at a prompt), that of EOS after the
            node, and the logsumexp of the logits after it, which is finite if they are.
        """
        branches, tokens, before, start = [], [], [], 0
        num_tokens = sum(len(tree) for _, tree in pack)
        for place, (row, tree) in enumerate(pack):
            if len(tree):
                branches.append(Branches(row.prefilled.prompt, row.past, tree.ids, tree.sees))
            tokens.append(tree.ids)
            at_prompt = num_tokens + place
            before.append(np.where(tree.parents == AT_PROMPT, at_prompt, tree.parents + start))
            start += len(tree)
        logits_NV = torch.stack([row.prefilled.logits_V for row, _ in pack])
        if branches:
            logits_NV = torch.cat([self._decoder.branch(branches), logits_NV])
        logits_NV = logits_NV.float()
        if len(self._suppress_ids):
            logits_NV = logits_NV.index_fill(-1, self._suppress_ids, -torch.inf)
        total_N = logits_NV.logsumexp(-1)
        ids_M = self._decoder.to_device(torch.from_numpy(np.concatenate(tokens)))
        before_M = self._decoder.to_device(torch.from_numpy(np.concatenate(before)))
        token_N = torch.zeros_like(total_N)
        token_N[:num_tokens] = logits_NV[before_M, ids_M] - total_N[before_M]
        # Without EOS ids, ends are not scored.
        end_N = torch.zeros_like(total_N)
        if len(self._eos_ids):
            end_N = logits_NV[:, self._eos_ids].logsumexp(-1) - total_N
        return torch.stack([token_N, end_N, total_N])

    def _read(self, pack: Sequence[_Part], in_flight: ToHost) -> Iterator[Outcome]:
        ((tokens, ends, totals),) = in_flight.lists()
        has_end = bool(len(self._eos_ids))
        start, at_prompt = 0, sum(len(tree) for _, tree in pack)
        for row, tree in pack:
            places = range(start, start + len(tree))
            start += len(tree)
            if row.failure is None:
                used = [*places, at_prompt]
                if not np.isfinite([totals[place] for place in used]).all():
                    row.failure = not_finite(0)
                    yield row.prefilled.sample, row.failure
                else:
                    for choice, path in zip(tree.places, tree.paths, strict=True):
                        last = places[path[-1]] if path else at_prompt
                        end = [ends[last]] if has_end else []
                        row.logprobs[choice] = [*(tokens[places[node]] for node in path), *end]
                    row.num_left -= len(tree.places)
                    if row.num_left == 0:
                        yield row.prefilled.sample, self._answer(row)
            at_prompt += 1

    def _answer(self, row: _Row) -> Completion | Failure:
        latency_s = time.perf_counter() - row.prefilled.start_s
        return self._choices.answer(
            row.prefilled.sample, row.choices, row.logprobs, latency_s=latency_s
        )
