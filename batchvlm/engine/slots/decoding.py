"""Decoding of the rows in slots: steps, tokens in flight, and the ends of answers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from batchvlm.constraints.constraints import Constraints, Unconstrained
from batchvlm.engine.faults import device_error, failure_of, free_memory, is_oom
from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.forward.streams import Streams
from batchvlm.engine.protocol import OnToken, Outcome
from batchvlm.engine.sampling import NextTokens, RowSampler
from batchvlm.engine.slots.clock import Clock
from batchvlm.engine.slots.memory import MemoryPlan
from batchvlm.engine.slots.overlap import AnswerLengths
from batchvlm.engine.slots.pool import SlotPool
from batchvlm.engine.slots.rows import Row, TokensInFlight
from batchvlm.engine.slots.step_runner import StepRunner
from batchvlm.engine.stops import not_finite
from batchvlm.errors import ErrorType
from batchvlm.records import Completion, EngineStats, Failure

log = logging.getLogger(__name__)

# Shape legend: N slots of the cache, B <= N of them in use, V vocabulary, W words of a bitmask.

_IS_OVER = attrgetter("is_over")
_MAX_RUN = 16
"""Most tokens that a grammar may force on one row in one step."""


class Decoding:
    """Decodes the rows in slots 0 to B - 1, until their answers end.

    Args:
        decoder: a model's decoder.
        pool: the slots.
        plan: limits on one step.
        constraints: the grammars that answers must follow.
        clock: measures the seconds of decode steps.
        stats: counts steps and tokens.
        eos_ids: token ids that end an answer.
        suppress_ids: token ids that are never chosen.
        on_end: called with the outcome of each row that ends.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: SlotPool,
        plan: MemoryPlan,
        constraints: Constraints | Unconstrained,
        clock: Clock,
        stats: EngineStats,
        *,
        eos_ids: Sequence[int],
        suppress_ids: Sequence[int],
        on_end: Callable[[Outcome], None],
    ) -> None:
        self._pool, self._plan, self._constraints = pool, plan, constraints
        self._clock, self._stats = clock, stats
        self._on_end = on_end
        self.on_token: OnToken | None = None
        self._device = decoder.device
        self._sampler = RowSampler(
            plan.max_slots,
            eos_ids=tuple(eos_ids),
            device=self._device,
            suppress_ids=tuple(suppress_ids),
        )
        self._runner = StepRunner(decoder, plan.max_slots)
        self.max_run = 0 if self._device.type == "cuda" else _MAX_RUN
        """Most forced tokens of one row in one step."""
        self.lengths = AnswerLengths()
        self.rows: list[Row] = []
        """Rows in slots 0 to B - 1, in slot order."""
        self._in_flight: deque[TokensInFlight] = deque()
        """Chosen tokens that the host has not read yet, the oldest first."""

    @property
    def is_busy(self) -> bool:
        """Whether rows are in slots or tokens in flight."""
        return bool(self.rows or self._in_flight)

    def clear(self) -> None:
        """Drop all rows, without an outcome."""
        self.rows.clear()
        self._in_flight.clear()

    def fail(self, failure: Failure) -> None:
        """End all rows with this failure: their slots are lost."""
        for row in self.rows:
            self._end(row, failure)
        self.rows.clear()

    def admit(self, row: Row) -> None:
        """Copy a row's keys and values into the first free slot; the row fails if memory is short.

        Its first token is not chosen before `choose_first_tokens`.
        """
        assert self._pool.cache is not None
        slot = len(self.rows)
        try:
            self._pool.cache.put(slot, row.prefilled.pieces)
        except Exception as error:
            if not is_oom(error):
                raise
            self._end(row, failure_of(error))
            return
        row.prefilled.pieces = []
        self._sampler.admit(slot, row.settings, row.sample.features["input_ids"][0])
        self.rows.append(row)

    def choose_first_tokens(self, first: int) -> None:
        """Choose the first token of the rows admitted to slot `first` and after it."""
        if len(self.rows) > first:
            self._choose(first, len(self.rows))
            self._compact()

    def _first_logits(self, start: int, rows: Sequence[Row]) -> Tensor:
        """Set up decoding of rows just admitted; return and release their logits [B, V]."""
        self._runner.admit(start, [row.prefilled.prompt for row in rows])
        logits_BV = torch.stack([row.prefilled.logits_V for row in rows])
        for row in rows:
            row.prefilled.forget()
        return logits_BV

    def step(self, streams: Streams) -> None:
        """Compute one token for every slot in use.

        Args:
            streams: compute parts of the step at once.
        """
        with self._clock.measure("decode_s", share=streams.share):
            self._step_in_parts(0, len(self.rows), streams)
            self._compact()

    def _step_in_parts(self, start: int, stop: int, streams: Streams) -> None:
        while start < stop:
            # Read in each iteration: a part that fails lowers it.
            end = min(start + self._plan.max_step_rows, stop)
            self._step_range(start, end, streams)
            start = end

    def _step_range(self, start: int, stop: int, streams: Streams) -> None:
        rows = self.rows[start:stop]
        assert self._pool.cache is not None
        if not self._in_flight:
            # The grammars know all tokens, so the next masks are filled while the model runs.
            self._constraints.start([row.matcher for row in rows])
        try:
            logits_BV = self._runner.step(
                self._pool.cache, rows, start, streams, num_used=len(self.rows)
            )
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except Exception as error:
            failure = failure_of(error)
        else:
            self._stats.row_steps += stop - start
            self._plan.count_good_step()
            for slot, row in enumerate(rows, start):
                if num := row.end_run():
                    self._runner.skip(slot, num)
                    self._sampler.skip(slot, num)
            self._choose(start, stop, logits_BV)
            return
        free_memory(self._device)
        if stop - start == 1:
            self._end(self.rows[start], failure)
            return
        log.warning("a step of %d rows failed (%s); halving it", stop - start, failure.message)
        middle = (start + stop) // 2
        if failure.error_type is ErrorType.OOM:
            self._plan.lower_step(middle - start)
        self._step_in_parts(start, middle, streams)
        self._step_in_parts(middle, stop, streams)

    def _choose(
        self,
        start: int,
        stop: int,
        logits_BV: Tensor | None = None,
        mask_BW: Tensor | None = None,
    ) -> None:
        """Choose the next token of slots `start` to `stop`, in halves if memory is short.

        `logits_BV` is None for rows just admitted, which bring their own.
        """
        rows = self.rows[start:stop]
        if mask_BW is None:
            mask_BW = self._mask_of(rows)
        try:
            if logits_BV is None:
                logits_BV = self._first_logits(start, rows)
            next_tokens = self._sampler.choose(logits_BV, slice(start, stop), mask_BW=mask_BW)
        except Exception as error:
            if not is_oom(error):
                raise
            failure = failure_of(error)
        else:
            self._add_in_flight(start, stop, next_tokens)
            return
        free_memory(self._device)
        if stop - start == 1:
            self._end(self.rows[start], failure)
            return
        middle = (start + stop) // 2
        for first, end in ((start, middle), (middle, stop)):
            half = slice(first - start, end - start)
            logits = None if logits_BV is None else logits_BV[half]
            mask = None if mask_BW is None else mask_BW[half]
            self._choose(first, end, logits, mask)

    def _mask_of(self, rows: Sequence[Row]) -> Tensor | None:
        """The tokens that the rows' grammars allow next, as bits; None: all are allowed."""
        # The grammars need the previous tokens. On a GPU this step is launched before the wait.
        if any(row.matcher and row.num_chosen for row in rows):
            for tokens in self._in_flight:
                tokens.commit()
        return self._constraints.take([row.matcher for row in rows])

    def _add_in_flight(self, start: int, stop: int, next_tokens: NextTokens) -> None:
        """Add chosen tokens to those in flight, and give them to the next step."""
        self._runner.push(start, stop, next_tokens.ids_B)
        rows = self.rows[start:stop]
        self._in_flight.append(TokensInFlight(rows, next_tokens))
        for row in rows:
            row.num_chosen += 1
            # The limit is known before the token is read, so the slot is free at once.
            if row.num_chosen >= row.max_new_tokens:
                row.is_over = True

    def read(self, *, num_left: int = 0) -> None:
        """Read the tokens in flight, except the last `num_left` choices of the sampler."""
        while len(self._in_flight) > num_left:
            self._read(self._in_flight.popleft())

    def _read(self, tokens: TokensInFlight) -> None:
        """Wait for tokens to reach the host, push them to their rows and end finished rows."""
        tokens.commit()
        for row, token, is_finite, logprob in tokens.read():
            if row.is_answered:
                continue  # a token past the row's end, chosen before the end was known
            self._report(row, token)
            outcome: Completion | Failure
            try:
                if not is_finite:
                    outcome = not_finite(row.stop.num_tokens)
                elif self._push(row, token, logprob):
                    outcome = row.completion()
                else:
                    continue
            except Exception as error:
                # A tokenizer can raise on an id that belongs to no token.
                outcome = failure_of(error)
            self._end(row, outcome)
        self._compact()

    def _end(self, row: Row, outcome: Completion | Failure) -> None:
        row.is_over = row.is_answered = True
        if isinstance(outcome, Completion):
            self.lengths.count(row.stop.num_tokens, row.max_new_tokens)
        self._on_end((row.sample, outcome))

    def _push(self, row: Row, token: int, logprob: float | None) -> bool:
        """Push a token and those that the grammar forces after it; return whether the row ends."""
        is_over = row.push(token, logprob, end_id=self._constraints.end_id, max_run=self.max_run)
        self._report(row, *row.run)
        self._stats.forced_tokens += len(row.run)
        return is_over

    def _report(self, row: Row, *tokens: int) -> None:
        if self.on_token is not None and row.sample.answer == 0:
            for token in tokens:
                self.on_token(row.sample.row_index, token)

    def _compact(self) -> None:
        """Fill the slots of ended rows: the last row moves into the first such slot."""
        if not any(map(_IS_OVER, self.rows)):
            return
        slot = 0
        while slot < len(self.rows):
            if not self.rows[slot].is_over:
                slot += 1
                continue
            last = len(self.rows) - 1
            while last > slot and self.rows[last].is_over:
                self.rows.pop()
                last -= 1
            row = self.rows.pop()
            if last == slot:
                break
            assert self._pool.cache is not None
            self._pool.cache.move(last, slot, row.num_cached)
            self._sampler.move(last, slot)
            self._runner.move(last, slot)
            self.rows[slot] = row
