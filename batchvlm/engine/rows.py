"""Rows in decoding, and their tokens on the way from the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from batchvlm.constraints.masks import RowMatcher
from batchvlm.engine.layout import Span
from batchvlm.engine.sampling import NextTokens
from batchvlm.engine.stops import RowStop
from batchvlm.engine.waiting import PrefilledRow
from batchvlm.records import Completion, Generation, Sample


@dataclass(slots=True, eq=False)
class Row:
    """A row that is decoded in a slot, or waits for one."""

    prefilled: PrefilledRow
    stop: RowStop
    length: int
    """Tokens that its slot must hold."""
    max_new_tokens: int
    matcher: RowMatcher | None = None
    """Where it is in the grammar of its answer, if that has one."""
    num_chosen: int = 0
    """Tokens chosen for it, read by the host or not."""
    run: tuple[int, ...] = ()
    """Tokens that its grammar forces behind the newest chosen one, computed together with it
    (jump-forward decoding)."""
    is_over: bool = False
    """Whether its last token is chosen, so that it needs no slot."""
    is_answered: bool = False

    @property
    def sample(self) -> Sample:
        return self.prefilled.sample

    @property
    def settings(self) -> Generation:
        """How it is decoded."""
        settings = self.sample.generation
        if self.matcher is None:
            return settings
        # The grammar says when the answer is whole; there may be nothing to add.
        return replace(settings, min_new_tokens=0)

    def push(
        self, token: int, logprob: float | None, *, end_id: int | None, max_run: int = 0
    ) -> bool:
        """Take the next token; whether the answer is over with it.

        What may follow alone by its grammar is taken here and not by a step for each token: up to
        `max_run` tokens, and the end of an answer that is whole.
        """
        if self.stop.push(token, logprob):
            return True
        settings = self.sample.generation
        if self.matcher is None or settings.logprobs:
            return False
        # Not behind a token that is chosen already and has yet to come.
        if max_run and self.stop.num_tokens == self.num_chosen and not settings.has_penalty:
            for forced in self.matcher.take_forced(max_run):
                self.run = (*self.run, forced)
                if self.stop.push(forced):
                    return True
        if end_id is None or settings.ignore_eos:
            return False
        return self.matcher.must_end and self.stop.push(end_id)

    def end_run(self) -> int:
        """Note that the tokens forced at last are computed; how many they were."""
        num = len(self.run)
        self.num_chosen += num
        self.run = ()
        return num

    def completion(self) -> Completion:
        """What it says, once its answer is over."""
        latency_s = time.perf_counter() - self.prefilled.start_s
        completion = self.stop.completion(self.sample.row_index, latency_s)
        if self.matcher is None:
            return completion
        return replace(completion, constraint=self.matcher.constraint)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are computed: all but the newest chosen one and its run."""
        return self.sample.prompt_tokens + max(0, self.num_chosen - 1)


def spans_of(rows: Sequence[Row], start: int, width: int) -> list[Span]:
    """Neighbouring slots in spans of so many, each as far as its longest row goes.

    Args:
        rows: the rows of these slots.
        start: the first slot.
        width: slots of a span.
    """
    spans = []
    for first in range(0, len(rows), width):
        group = rows[first : first + width]
        length = 1 + max(row.num_cached + len(row.run) for row in group)
        spans.append(Span(start + first, start + first + len(group), length))
    return spans


class ToHost:
    """Tensors of one device on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            # Into pinned memory, or the copy would wait for the device.
            pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
            for target, tensor in zip(pinned, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
            tensors = pinned
        self._tensors = tensors

    def lists(self) -> list[list[Any]]:
        """Each as a list, once it has come."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]


class Chosen:
    """Tokens on their way to the host, one for each of some rows."""

    def __init__(self, rows: Sequence[Row], next_tokens: NextTokens) -> None:
        self.rows = rows
        tensors = [next_tokens.ids_B, next_tokens.is_finite_B]
        if next_tokens.logprobs_B is not None:
            tensors.append(next_tokens.logprobs_B)
        self._copies = ToHost(tensors)
        self._is_committed = False

    def commit(self) -> None:
        """Let the rows' grammars take these tokens, once."""
        if not self._is_committed and any(row.matcher for row in self.rows):
            for row, token, is_finite, _ in self.read():
                if row.matcher is not None and is_finite:
                    row.matcher.commit(token)
        self._is_committed = True

    def read(self) -> list[tuple[Row, int, bool, float | None]]:
        """Row, token, whether its logit is a finite number, and its log-probability if asked."""
        ids, is_finite, *logprobs = self._copies.lists()
        by_row = logprobs[0] if logprobs else [None] * len(ids)
        return list(zip(self.rows, ids, is_finite, by_row, strict=True))
