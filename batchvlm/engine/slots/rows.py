"""Rows that are decoded, and the copies of their tokens from the device to the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from batchvlm.constraints.masks import RowMatcher
from batchvlm.engine.sampling import NextTokens
from batchvlm.engine.slots.waiting import PrefilledRow
from batchvlm.engine.stops import RowStop
from batchvlm.records import Completion, Generation, Sample


@dataclass(slots=True, eq=False)
class Row:
    """A prefilled row that is decoded in a slot, or waits for one."""

    prefilled: PrefilledRow
    stop: RowStop
    length: int
    """Tokens that its slot must hold: the prompt and `max_new_tokens`."""
    max_new_tokens: int
    matcher: RowMatcher | None = None
    """The state of the grammar that constrains its answer, if there is one."""
    num_chosen: int = 0
    """Tokens chosen so far, whether the host has read them or not."""
    run: tuple[int, ...] = ()
    """Tokens that its grammar forces after the newest chosen one. The next step computes them
    together with that one (jump-forward decoding)."""
    is_over: bool = False
    """Whether its last token is chosen, so that it needs no slot any more."""
    is_answered: bool = False
    """Whether its outcome has been produced."""

    @property
    def sample(self) -> Sample:
        return self.prefilled.sample

    @property
    def settings(self) -> Generation:
        """The sampling settings that apply to this row."""
        settings = self.sample.generation
        if self.matcher is None:
            return settings
        # The grammar decides when the answer is complete; then it may allow only the end.
        return replace(settings, min_new_tokens=0)

    def push(
        self, token: int, logprob: float | None, *, end_id: int | None, max_run: int = 0
    ) -> bool:
        """Append the next token; return whether the answer ends with it.

        Tokens to which the grammar leaves no alternative are appended here too, so that none takes
        a step of its own: up to `max_run` tokens, and `end_id` once the answer is complete.
        """
        if self.stop.push(token, logprob):
            return True
        settings = self.sample.generation
        if self.matcher is None or settings.logprobs:
            return False
        # Only if no later token of this row is in flight.
        if max_run and self.stop.num_tokens == self.num_chosen and not settings.has_penalty:
            for forced in self.matcher.take_forced(max_run):
                self.run = (*self.run, forced)
                if self.stop.push(forced):
                    return True
        if end_id is None or settings.ignore_eos:
            return False
        return self.matcher.must_end and self.stop.push(end_id)

    def end_run(self) -> int:
        """Count the forced tokens as computed and clear them; return how many there were."""
        num = len(self.run)
        self.num_chosen += num
        self.run = ()
        return num

    def completion(self) -> Completion:
        """The row's completion, once its answer has ended."""
        latency_s = time.perf_counter() - self.prefilled.start_s
        completion = self.stop.completion(self.sample.row_index, latency_s)
        if self.matcher is None:
            return completion
        return replace(completion, constraint=self.matcher.constraint)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the newest one and its run."""
        return self.sample.prompt_tokens + max(0, self.num_chosen - 1)


class ToHost:
    """An asynchronous copy of tensors from one device to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            # A copy into pageable memory would be synchronous.
            pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
            for target, tensor in zip(pinned, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
            tensors = pinned
        self._tensors = tensors

    def lists(self) -> list[list[Any]]:
        """Wait for the copy; return each tensor as a list."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]


class TokensInFlight:
    """The tokens that one choice of the sampler gave some rows, on their way to the host.

    Args:
        rows: B rows.
        next_tokens: the token of each.
    """

    def __init__(self, rows: Sequence[Row], next_tokens: NextTokens) -> None:
        self.rows = rows
        tensors = [next_tokens.ids_B, next_tokens.is_finite_B]
        if next_tokens.logprobs_B is not None:
            tensors.append(next_tokens.logprobs_B)
        self._copies = ToHost(tensors)
        self._is_committed = False

    def commit(self) -> None:
        """Advance the rows' grammars by these tokens; a second call does nothing."""
        if not self._is_committed and any(row.matcher for row in self.rows):
            for row, token, is_finite, _ in self.read():
                if row.matcher is not None and is_finite:
                    row.matcher.commit(token)
        self._is_committed = True

    def read(self) -> list[tuple[Row, int, bool, float | None]]:
        """Wait for the tokens: (row, token, whether its logits are finite, log-probability)."""
        ids, is_finite, *logprobs = self._copies.lists()
        by_row = logprobs[0] if logprobs else [None] * len(ids)
        return list(zip(self.rows, ids, is_finite, by_row, strict=True))
