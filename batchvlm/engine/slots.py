"""The engine for most models: continuous batching over the slots of a static KV cache.

Prompts are prefilled in packs, concatenated without padding. Their keys and values are kept until
a slot is free. A decode step computes one token for each slot in use and none for the others: when
a row ends, the last row moves into its slot, and waiting rows take the free slots after it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from batchvlm.config import BatchingConfig, EngineConfig
from batchvlm.constraints.constraints import Constraints, Unconstrained, special_ids
from batchvlm.engine.answers import expand, join
from batchvlm.engine.canary import Canary
from batchvlm.engine.choices import Choices
from batchvlm.engine.clock import Clock
from batchvlm.engine.decoder import Decoder
from batchvlm.engine.faults import device_error, failure_of, free_memory, is_oom
from batchvlm.engine.feed import Feed
from batchvlm.engine.fusing import align, is_half_on_gpu, seconds_to_fusing
from batchvlm.engine.memory import MemoryPlan
from batchvlm.engine.prefill import Prefill
from batchvlm.engine.protocol import OnToken, Outcome
from batchvlm.engine.room import SlotRoom
from batchvlm.engine.rows import Chosen, Row
from batchvlm.engine.sampling import NextTokens, RowSampler
from batchvlm.engine.scoring import Scoring
from batchvlm.engine.stepping import Stepping
from batchvlm.engine.stops import RowStop, not_finite
from batchvlm.engine.streams import open_streams
from batchvlm.engine.waiting import PrefilledRow
from batchvlm.errors import ErrorType, RowError
from batchvlm.records import Completion, EngineStats, Failure, Sample

log = logging.getLogger(__name__)

# Shape legend: N slots of the cache, B <= N of them in use.

_IS_OVER = attrgetter("is_over")
_MAX_RUN = 16
"""Most tokens that a grammar may force on one row in one step."""


class SlotEngine:
    """Answers samples by continuous batching.

    Args:
        model: a transformers model of a family that supports it.
        tokenizer: decodes the answers.
        batching: how many samples are gathered and sorted together.
        cfg: limits; those that are null are sized from free memory.
        eos_ids: token ids that end an answer.
        suppress_ids: token ids that are never chosen.
        constraints: the grammars that answers must follow, if any.
        choices: the choices of each row, if they are scored and nothing is decoded.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batching: BatchingConfig,
        cfg: EngineConfig,
        *,
        eos_ids: Sequence[int],
        suppress_ids: Sequence[int] = (),
        constraints: Constraints | None = None,
        choices: Choices | None = None,
    ) -> None:
        self.stats = EngineStats()
        self.on_token: OnToken | None = None
        self._constraints = constraints or Unconstrained()
        self._model = model
        self._tokenizer = tokenizer
        self._special_ids = special_ids(tokenizer)
        self._batching = batching
        self._eos_ids = frozenset(eos_ids)
        self._suppress_ids = tuple(suppress_ids)
        self._choices = choices
        self._device: torch.device = model.device
        if is_half_on_gpu(model):
            align(model)
        self._decoder = Decoder(
            model, has_graphs=cfg.cuda_graphs, has_kernel=cfg.compile is not False
        )
        self._until_fused_s = seconds_to_fusing(cfg, model)
        self._fuse_after(0.0)
        self._canary = Canary(
            model, self._decoder, is_on=cfg.canary, is_scoring=choices is not None
        )
        self._clock = Clock(self._device, self.stats)
        self._streams = open_streams(model, cfg)
        self._plan = MemoryPlan(cfg, self._device)
        self._room = SlotRoom(self._plan, self._decoder)
        self._cfg = cfg
        num_slots = self._plan.max_slots
        self._sampler = RowSampler(
            num_slots,
            eos_ids=tuple(eos_ids),
            device=self._device,
            suppress_ids=self._suppress_ids,
        )
        self._stepping = Stepping(self._decoder, self._streams, num_slots)
        # On a GPU a step is launched before the host reads the tokens of the previous one.
        self._lag = 1 if self._device.type == "cuda" else 0
        self._max_run = 0 if self._device.type == "cuda" else _MAX_RUN
        self._begin()

    def _begin(self) -> None:
        """Drop all rows: an earlier run may have been aborted."""
        self._room.free()
        self._feed = Feed((), self._batching)
        self._prefill = Prefill(
            self._model,
            self._decoder,
            self._plan,
            self._cfg,
            self.stats,
            self._clock,
            streams=self._streams,
            looks_ahead=self._lag > 0,
        )
        self._scoring: Scoring | None = None
        if choices := self._choices:
            self._scoring = Scoring(
                choices, self._decoder, self._plan, self._clock, suppress_ids=self._suppress_ids
            )
        self._rows: list[Row] = []
        """Rows in slots 0 to B - 1, in slot order."""
        self._parked: deque[Row] = deque()
        """Prefilled rows that wait for a slot."""
        self._in_flight: deque[Chosen] = deque()
        """Chosen tokens that the host has not read yet."""
        self._ready: deque[Outcome] = deque()

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer every sample exactly once; see `Engine.run`."""
        try:
            yield from join(self._answer(self._constraints.stream(expand(samples))))
        except torch.AcceleratorError as error:
            # Raised at the next synchronization, not by the operation that failed.
            raise device_error(error) from error
        finally:
            self._constraints.close()

    def _answer(self, samples: Iterable[Sample]) -> Iterator[Outcome]:
        self._begin()
        self._feed = feed = Feed(samples, self._batching)
        start_s: float | None = None
        while True:
            feed.gather(wait=not self._is_busy())
            start_s = start_s or time.perf_counter()
            self._fuse_after(time.perf_counter() - start_s)
            if not self._prefill.num_waiting and len(feed):
                window = feed.take_window()
                self._canary.look(window, self._prefill.images)
                self._prefill.add(window)
            if not self._is_busy() and feed.is_done and not len(feed):
                break
            self._fill()
            if self._scoring is not None:
                # On a GPU one pack stays in flight while the next prompts are prefilled.
                num_left = self._lag if self._prefill.num_waiting else 0
                self._ready.extend(self._scoring.take(num_left=num_left))
            if not self._lag:
                self._read_all()  # the tokens forced after a first token join this step
            if self._rows:
                self._step()
            self._read_all(num_left=self._lag if self._rows else 0)
            while self._ready:
                yield self._ready.popleft()
        self._clock.finish()
        self._room.free()

    def _fuse_after(self, seconds: float) -> None:
        """Fuse the model's layers, once, when the engine has worked for long enough."""
        if self._until_fused_s is not None and seconds >= self._until_fused_s:
            self._until_fused_s = None
            log.info("compiling the model's layers; engine.compile=false turns this off")
            self._decoder.fuse()

    def _is_busy(self) -> bool:
        return bool(
            self._prefill.num_waiting
            or self._parked
            or self._rows
            or self._in_flight
            or self._ready
            or (self._scoring and self._scoring.is_busy)
        )

    def _fill(self) -> None:
        """Prefill packs and admit their rows until no slot is free or no prompt is left."""
        while True:
            self._admit()
            num_free = self._room.num_slots(self._num_rows()) - len(self._rows) - len(self._parked)
            if num_free <= 0 or not self._prefill.num_waiting:
                return
            pack = self._prefill.next_pack(is_alone=not self._rows and not self._parked)
            if not pack:
                return  # the remaining rows wait for memory
            rows = [prefilled for prefilled in pack if isinstance(prefilled, PrefilledRow)]
            self._ready.extend(p for p in pack if not isinstance(p, PrefilledRow))
            if self._scoring is not None:
                self._scoring.score(rows)
                return
            for prefilled in rows:
                self._park(prefilled)

    def _park(self, prefilled: PrefilledRow) -> None:
        sample = prefilled.sample
        try:
            matcher = self._constraints.begin(sample)
        except RowError as error:
            failure = Failure(error_type=error.error_type, message=error.message)
            self._ready.append((sample, failure))
            return
        stop = RowStop(sample.generation, self._eos_ids, self._tokenizer, self._special_ids)
        length = sample.prompt_tokens + sample.generation.max_new_tokens
        self._parked.append(Row(prefilled, stop, length, sample.generation.max_new_tokens, matcher))

    def _num_rows(self) -> int:
        """Number of rows in slots, waiting for one, waiting for prefill, or gathered."""
        num_waiting = len(self._parked) + self._prefill.num_waiting + len(self._feed)
        return len(self._rows) + num_waiting

    def _admit(self) -> None:
        """Move waiting rows into free slots and choose their first tokens."""
        first = len(self._rows)
        while self._parked and self._has_slot_for(self._parked[0]):
            assert self._room.cache is not None
            row = self._parked.popleft()
            slot = len(self._rows)
            try:
                self._room.cache.put(slot, row.prefilled.pieces)
            except Exception as error:
                if not is_oom(error):
                    raise
                self._end(row, failure_of(error))
                continue
            row.prefilled.pieces = []
            sample = row.sample
            self._sampler.admit(slot, row.settings, sample.features["input_ids"][0])
            self._rows.append(row)
        if len(self._rows) > first:
            self._choose(first, len(self._rows))
            self._compact()

    def _begin_rows(self, start: int, rows: Sequence[Row]) -> Tensor:
        """Set up decoding of rows just admitted; return and release their logits [B, V]."""
        self._stepping.admit(start, [row.prefilled.prompt for row in rows])
        logits_BV = torch.stack([row.prefilled.logits_V for row in rows])
        for row in rows:
            row.prefilled.forget()
        return logits_BV

    def _has_slot_for(self, row: Row) -> bool:
        """Provide a free slot that is long enough for this row; return whether there is one."""
        longest = max((*self._parked, *self._rows), key=lambda other: other.length)
        outcome = self._room.has_slot_for(
            row, self._rows, max_tokens=longest.length, num_rows=self._num_rows()
        )
        if not isinstance(outcome, Failure):
            return outcome
        if not self._rows:
            # There is no memory for a single slot of the longest row.
            self._parked.remove(longest)
            self._ready.append((longest.sample, outcome))
        elif self._room.cache is None:
            for lost in self._rows:
                self._end(lost, outcome)
            self._rows.clear()
        return False  # tried again when rows have ended

    def _step(self) -> None:
        """Compute one token for every slot in use."""
        with self._clock.measure("decode_s"):
            self._step_in_parts(0, len(self._rows))
            self._compact()

    def _step_in_parts(self, start: int, stop: int) -> None:
        while start < stop:
            # Read in each iteration: a part that fails lowers it.
            end = min(start + self._plan.max_step_rows, stop)
            self._step_range(start, end)
            start = end

    def _step_range(self, start: int, stop: int) -> None:
        rows = self._rows[start:stop]
        assert self._room.cache is not None
        if not self._in_flight:
            # The grammars know all tokens, so the next masks are filled while the model runs.
            self._constraints.start([row.matcher for row in rows])
        try:
            logits_BV = self._stepping.step(self._room.cache, rows, start, num_used=len(self._rows))
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except Exception as error:
            failure = failure_of(error)
        else:
            self.stats.row_steps += stop - start
            self._plan.count_good_step()
            for slot, row in enumerate(rows, start):
                if num := row.end_run():
                    self._stepping.skip(slot, num)
                    self._sampler.skip(slot, num)
            self._choose(start, stop, logits_BV)
            return
        free_memory(self._device)
        if stop - start == 1:
            self._end(self._rows[start], failure)
            return
        log.warning("a step of %d rows failed (%s); halving it", stop - start, failure.message)
        middle = (start + stop) // 2
        if failure.error_type is ErrorType.OOM:
            self._plan.lower_step(middle - start)
        self._step_in_parts(start, middle)
        self._step_in_parts(middle, stop)

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
        rows = self._rows[start:stop]
        if mask_BW is None:
            mask_BW = self._mask_of(rows)
        try:
            if logits_BV is None:
                logits_BV = self._begin_rows(start, rows)
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
            self._end(self._rows[start], failure)
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
            for chosen in self._in_flight:
                chosen.commit()
        return self._constraints.take([row.matcher for row in rows])

    def _add_in_flight(self, start: int, stop: int, next_tokens: NextTokens) -> None:
        """Add chosen tokens to those in flight, and give them to the next step."""
        self._stepping.push(start, stop, next_tokens.ids_B)
        rows = self._rows[start:stop]
        self._in_flight.append(Chosen(rows, next_tokens))
        for row in rows:
            row.num_chosen += 1
            # The limit is known before the token is read, so the slot is free at once.
            if row.num_chosen >= row.max_new_tokens:
                row.is_over = True

    def _read_all(self, *, num_left: int = 0) -> None:
        while len(self._in_flight) > num_left:
            self._read(self._in_flight.popleft())

    def _read(self, chosen: Chosen) -> None:
        """Wait for tokens to reach the host, push them to their rows and end finished rows."""
        chosen.commit()
        for row, token, is_finite, logprob in chosen.read():
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
        self._ready.append((row.sample, outcome))

    def _push(self, row: Row, token: int, logprob: float | None) -> bool:
        """Push a token and those that the grammar forces after it; return whether the row ends."""
        is_over = row.push(token, logprob, end_id=self._constraints.end_id, max_run=self._max_run)
        self._report(row, *row.run)
        self.stats.forced_tokens += len(row.run)
        return is_over

    def _report(self, row: Row, *tokens: int) -> None:
        if self.on_token is not None and row.sample.answer == 0:
            for token in tokens:
                self.on_token(row.sample.row_index, token)

    def _compact(self) -> None:
        """Fill the slots of ended rows: the last row moves into the first such slot."""
        if not any(map(_IS_OVER, self._rows)):
            return
        slot = 0
        while slot < len(self._rows):
            if not self._rows[slot].is_over:
                slot += 1
                continue
            last = len(self._rows) - 1
            while last > slot and self._rows[last].is_over:
                self._rows.pop()
                last -= 1
            row = self._rows.pop()
            if last == slot:
                break
            assert self._room.cache is not None
            self._room.cache.move(last, slot, row.num_cached)
            self._sampler.move(last, slot)
            self._stepping.move(last, slot)
            self._rows[slot] = row
