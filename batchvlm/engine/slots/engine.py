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
from typing import Any

import torch

from batchvlm.config import BatchingConfig, EngineConfig
from batchvlm.constraints.constraints import Constraints, Unconstrained, special_ids
from batchvlm.engine.answers import expand, join
from batchvlm.engine.choices import Choices
from batchvlm.engine.faults import device_error
from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.forward.fusing import align, is_half_on_gpu, seconds_to_fusing
from batchvlm.engine.forward.streams import Streams, open_streams
from batchvlm.engine.protocol import OnToken, Outcome
from batchvlm.engine.slots.canary import Canary
from batchvlm.engine.slots.clock import Clock
from batchvlm.engine.slots.decoding import Decoding
from batchvlm.engine.slots.feed import Feed
from batchvlm.engine.slots.memory import MemoryPlan
from batchvlm.engine.slots.overlap import num_packs_first
from batchvlm.engine.slots.pool import SlotPool
from batchvlm.engine.slots.prefill import Prefill
from batchvlm.engine.slots.rows import Row
from batchvlm.engine.slots.scoring import Scoring
from batchvlm.engine.slots.waiting import PackOutcome, PrefilledRow
from batchvlm.engine.stops import RowStop
from batchvlm.errors import RowError
from batchvlm.records import Completion, EngineStats, Failure, Sample

log = logging.getLogger(__name__)


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
        self._constraints = constraints or Unconstrained()
        self._model = model
        self._tokenizer = tokenizer
        self._special_ids = special_ids(tokenizer)
        self._batching = batching
        self._eos_ids = frozenset(eos_ids)
        self._suppress_ids = tuple(suppress_ids)
        self._choices = choices
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
        self._clock = Clock(model.device, self.stats)
        self._streams = open_streams(model, cfg)
        self._plan = MemoryPlan(cfg, model.device)
        self._pool = SlotPool(self._plan, self._decoder)
        self._cfg = cfg
        self._ready: deque[Outcome] = deque()
        self._decoding = Decoding(
            self._decoder,
            self._pool,
            self._plan,
            self._constraints,
            self._clock,
            self.stats,
            eos_ids=eos_ids,
            suppress_ids=suppress_ids,
            on_end=self._ready.append,
        )
        # On a GPU a step is launched before the host reads the tokens of the previous one.
        self._lag = 1 if model.device.type == "cuda" else 0
        self._begin()

    @property
    def on_token(self) -> OnToken | None:
        """See `Engine.on_token`."""
        return self._decoding.on_token

    @on_token.setter
    def on_token(self, on_token: OnToken | None) -> None:
        self._decoding.on_token = on_token

    def _begin(self) -> None:
        """Drop all rows: an earlier run may have been aborted."""
        self._pool.free()
        self._feed = Feed((), self._batching)
        self._prefill = Prefill(
            self._model,
            self._decoder,
            self._plan,
            self._cfg,
            self.stats,
            self._clock,
            looks_ahead=self._lag > 0,
        )
        self._scoring: Scoring | None = None
        if choices := self._choices:
            self._scoring = Scoring(
                choices, self._decoder, self._plan, self._clock, suppress_ids=self._suppress_ids
            )
        self._parked: deque[Row] = deque()
        """Prefilled rows that wait for a slot."""
        self._decoding.clear()
        self._ready.clear()

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
            if not self._prefill.num_waiting:
                feed.open_window()
                self._take_samples()
            if not self._is_busy() and feed.is_done and not len(feed):
                break
            self._fill()
            if self._scoring is not None:
                # On a GPU one pack stays in flight while the next prompts are prefilled.
                num_left = self._lag if self._prefill.num_waiting else 0
                self._ready.extend(self._scoring.take(num_left=num_left))
            if not self._lag:
                self._decoding.read()  # the tokens forced after a first token join this step
            if self._decoding.rows:
                if self._is_time_to_overlap():
                    self._decode_beside_prefill()
                else:
                    self._decoding.step(self._streams)
            self._decoding.read(num_left=self._lag if self._decoding.rows else 0)
            while self._ready:
                yield self._ready.popleft()
        self._clock.finish()
        self._pool.free()

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
            or self._decoding.is_busy
            or self._ready
            or (self._scoring and self._scoring.is_busy)
        )

    def _take_samples(self) -> None:
        """Let gathered samples wait for prefill, as many as the open window has room for."""
        feed = self._feed
        if not feed.can_take:
            return
        if self._canary.check_new_kind(feed.gathered, self._prefill.images):
            feed.gather(wait=False)  # others have become ready meanwhile
        self._prefill.add(feed.take())

    def _fill(self) -> None:
        """Prefill packs and admit their rows until no slot is free or no prompt is left."""
        while True:
            self._admit()
            num_held = len(self._decoding.rows) + len(self._parked)
            if num_held >= self._pool.num_slots(self._num_rows()) or not self._prefill.num_waiting:
                return
            self._feed.gather(wait=False)
            self._take_samples()
            max_packs = self._num_packs_first()
            if max_packs == 0:
                return  # the rest is prefilled beside decode steps
            pack = self._prefill.next_pack(
                self._streams, is_alone=num_held == 0, max_packs=max_packs
            )
            if not pack:
                return  # the remaining rows wait for memory
            self._receive(pack)
            if self._scoring is not None:
                return

    def _receive(self, pack: Sequence[PackOutcome]) -> None:
        """Let prefilled rows wait for a slot, or score them; report those that failed."""
        rows = [prefilled for prefilled in pack if isinstance(prefilled, PrefilledRow)]
        self._ready.extend(p for p in pack if not isinstance(p, PrefilledRow))
        if self._scoring is not None:
            self._scoring.score(rows)
            return
        for prefilled in rows:
            self._park(prefilled)

    def _num_packs_first(self) -> int | None:
        """Packs to prefill before the rest is prefilled beside decode steps; None: no such plan."""
        # While more rows are ready, the slots are kept full.
        if self._streams.num == 1 or self._scoring is not None or len(self._feed):
            return None
        prompt_tokens, limits = self._prefill.ready_tokens
        if not prompt_tokens:
            return None
        lengths = self._decoding.lengths
        return num_packs_first(
            prompt_tokens,
            lengths.expected(limits),
            lengths.left((*self._decoding.rows, *self._parked)),
            pack_tokens=self._plan.pack_tokens,
            num_streams=self._streams.num,
        )

    def _is_time_to_overlap(self) -> bool:
        """Whether to prefill the next packs beside decode steps."""
        has_room = 2 * len(self._parked) < self._plan.max_slots
        return has_room and self._num_packs_first() == 0

    def _decode_beside_prefill(self) -> None:
        """Prefill a pack in each stream but one, and decode in that one until they are done."""

        def prefill(streams: Streams) -> list[PackOutcome]:
            return self._prefill.next_pack(streams, is_alone=False, max_packs=streams.num)

        with self._streams.beside(prefill) as (stream, packs):
            while True:
                self._decoding.step(stream)
                self._decoding.read()
                self._admit()
                if packs.done() or not self._decoding.rows:
                    break
        self._receive(packs.result())

    def _park(self, prefilled: PrefilledRow) -> None:
        """Let a prefilled row wait for a slot; it fails if its grammar cannot be made."""
        sample = prefilled.sample
        try:
            matcher = self._constraints.begin(sample)
        except RowError as error:
            self._ready.append((sample, Failure.of(error)))
            return
        stop = RowStop(
            sample.generation,
            self._eos_ids,
            self._tokenizer,
            self._special_ids,
            sample.continued_ids,
        )
        length = sample.prompt_tokens + sample.generation.max_new_tokens
        self._parked.append(Row(prefilled, stop, length, sample.generation.max_new_tokens, matcher))

    def _num_rows(self) -> int:
        """Number of rows in slots, waiting for one, waiting for prefill, or gathered."""
        num_waiting = len(self._parked) + self._prefill.num_waiting + len(self._feed)
        return len(self._decoding.rows) + num_waiting

    def _admit(self) -> None:
        """Move waiting rows into free slots and choose their first tokens."""
        first = len(self._decoding.rows)
        while self._parked and self._provide_slot(self._parked[0]):
            self._decoding.admit(self._parked.popleft())
        self._decoding.choose_first_tokens(first)

    def _provide_slot(self, row: Row) -> bool:
        """Provide a free slot that is long enough for this row; return whether there is one."""
        rows = self._decoding.rows
        longest = max((*self._parked, *rows), key=lambda other: other.length)
        outcome = self._pool.provide_slot(
            row, rows, max_tokens=longest.length, num_rows=self._num_rows()
        )
        if not isinstance(outcome, Failure):
            return outcome
        if not rows:
            # There is no memory for a single slot of the longest row.
            self._parked.remove(longest)
            self._ready.append((longest.sample, outcome))
        elif self._pool.cache is None:
            self._decoding.fail(outcome)
        return False  # tried again when rows have ended
