"""Samples of a window -> computed prompts, in packs without padding.

Rows of a window are sorted, then taken in packs to a token budget and computed behind one another.
Rows that ask about the same images share the encoding of these and, where their prompts begin
alike, the computing of that beginning (prefix caching). A prompt above the budget is computed in
pieces (chunked prefill).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchvlm.config import EngineConfig
from batchvlm.engine.cache import RowCache
from batchvlm.engine.clock import Clock
from batchvlm.engine.decoder import Decoder, Piece, Prompt
from batchvlm.engine.faults import device_error, failure_of, free_memory
from batchvlm.engine.memory import MemoryPlan
from batchvlm.engine.streams import Streams
from batchvlm.engine.vision import Encoded, Entry, ImageFeatures, Unit, batches
from batchvlm.engine.waiting import (
    PackOutcome,
    PrefilledRow,
    WaitingRow,
    cut,
    find_prefixes,
    num_new_tokens_of,
)
from batchvlm.errors import ErrorType
from batchvlm.records import EngineStats, Failure, Sample

log = logging.getLogger(__name__)

# Shape legend: as in attention.py; E prompts that end in a pack.

_MIN_PIECE_TOKENS = 64
"""Pieces that are not cut further where memory is short: they take next to none."""


class Prefill:
    """Computes the prompts of waiting rows, pack by pack.

    Args:
        model: a transformers model of a family that allows it.
        decoder: the same model's decoder.
        plan: how much goes into one forward.
        cfg: whether rows share images and beginnings.
        stats: counts what is computed.
        clock: counts its seconds.
        streams: how many packs, and batches of images, are computed at once.
        looks_ahead: whether the device works by itself, so that this process has time meanwhile.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        plan: MemoryPlan,
        cfg: EngineConfig,
        stats: EngineStats,
        clock: Clock,
        *,
        streams: Streams,
        looks_ahead: bool = False,
    ) -> None:
        self._clock = clock
        self._streams = streams
        self._lock = threading.Lock()
        self._decoder = decoder
        self._plan = plan
        self._is_shared = cfg.share_images
        self._looks_ahead = looks_ahead
        self._stats = stats
        self.images = ImageFeatures(
            model, stats, is_shared=cfg.share_images, around=decoder.encoding
        )
        """The encoder's output for the images that rows need."""
        self._waiting: list[WaitingRow] = []
        """Sorted, the next row last."""
        self._postponed: list[WaitingRow] = []
        """Rows that did not fit beside others."""
        self._failed: list[tuple[Sample, Failure]] = []
        self._searched: set[bool] = set()
        """Whether prefixes were looked for among waiting rows without and with images."""

    @property
    def num_waiting(self) -> int:
        """Rows that `next_pack` has yet to return."""
        return len(self._waiting) + len(self._postponed) + len(self._failed)

    def add(self, samples: Iterable[Sample]) -> None:
        """Take a window of samples."""
        rows = []
        for sample in samples:
            try:
                rows.append(WaitingRow(sample, self.images.units(sample)))
            except Exception as error:
                self._failed.append((sample, failure_of(error)))
        for row in rows:
            self.images.retain(row.units)
        # Rows of the same images stay together, so that what they share need not be kept long.
        lengths: dict[tuple[str, ...], tuple[int, int]] = {}
        for row in rows:
            lengths[row.group] = max(row.lengths, lengths.get(row.group, (0, 0)))
        rows.sort(key=lambda r: (lengths[r.group], r.group, r.lengths, -r.sample.row_index))
        self._waiting = rows + self._waiting
        self._searched.clear()

    def next_pack(self, *, is_alone: bool) -> list[PackOutcome]:
        """Compute the next rows' prompts, as many as go into one pack.

        Args:
            is_alone: whether no other row takes up memory, so that one that does not fit now never
                will.

        Returns:
            Rows ready for a slot and rows that failed; empty where the only rows left have to wait
            for memory.
        """
        if self._failed:
            failed, self._failed = self._failed, []
            return [*failed]
        if not self._waiting:
            if not is_alone:
                return []
            self._waiting, self._postponed = self._postponed, []
        if self._is_shared:
            self._find_prefixes()
        packs = self._take_packs()
        rows = list(chain.from_iterable(packs))
        self._encode([*rows, *self._waiting[::-1]], num_needed=len(rows), is_alone=is_alone)
        prefilled = list(self._compute_packs(packs, is_alone=is_alone))
        if self._looks_ahead:
            self._prepare(len(rows))
        return prefilled

    def _find_prefixes(self) -> None:
        """Look, once a window, for what waiting rows share; only causal prompts can share it."""
        for has_images in (True, False):
            if has_images not in self._searched and self._decoder.is_causal(has_images=has_images):
                self._searched.add(has_images)
                alike = [row for row in self._waiting if bool(row.units) is has_images]
                find_prefixes(alike, self._decoder)

    def _take_packs(self) -> list[list[WaitingRow]]:
        """The next rows, in as many packs as are computed at once."""
        kinds = {bool(row.units) for row in self._waiting}
        # What rows may share is known when the first of their kind are computed.
        is_known = all(self._decoder.knows(has_images=kind) for kind in kinds)
        most = self._streams.num_packs(self._plan.pack_tokens) if is_known else 1
        packs: list[list[WaitingRow]] = []
        num_tokens = 0
        begun: set[int] = set()
        while self._waiting:
            num = num_new_tokens_of(self._waiting[-1], begun)
            if not packs or num_tokens + num > self._plan.pack_tokens:
                if len(packs) == most:
                    break
                packs.append([])
                num_tokens = 0
            num_tokens += num
            packs[-1].append(self._waiting.pop())
        return packs

    def _prepare(self, num_rows: int) -> None:
        """Make the next pack ready while the GPU computes the last one, rather than after it."""
        rows = self._waiting[::-1]
        for row in rows[:num_rows]:
            try:
                self._prompt(row)
            except Exception:
                break  # it says so when its turn comes
        self._encode(rows, num_needed=num_rows)

    def _encode(
        self, rows: Sequence[WaitingRow], *, num_needed: int, is_alone: bool = False
    ) -> None:
        """Encode the images of the first rows, and of the next ones as far as a batch has room."""
        units = self.images.missing(u for row in rows[:num_needed] for u in row.units)
        if not units:
            return
        num_cells = sum(unit.num_cells for unit in units)
        for row in rows[num_needed:]:
            more = [u for u in row.units if u.key not in {unit.key for unit in units}]
            num_cells += sum(unit.num_cells for unit in more)
            if num_cells > self._plan.vision_cells:
                break
            units += self.images.missing(more)
        parts = batches(units, self._plan.vision_cells)
        with self._clock.measure("vision_s"):
            outcomes = self._streams.map(self._try_encode, parts, again=_is_oom)
            for batch, outcome in zip(parts, outcomes, strict=True):
                self._keep_or_split(batch, outcome, is_alone=is_alone)

    def _try_encode(self, units: Sequence[Unit]) -> Encoded | Failure:
        try:
            return self.images.encode(units)
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except Exception as error:
            return failure_of(error)

    def _keep_or_split(
        self, units: Sequence[Unit], outcome: Encoded | Failure, *, is_alone: bool
    ) -> None:
        if not isinstance(outcome, Failure):
            self.images.keep(units, outcome)
            self._plan.count_good_images()
            return
        free_memory(self._decoder.device)
        if len(units) == 1:
            # Else its rows wait until there may be memory for it.
            if is_alone or outcome.error_type is not ErrorType.OOM:
                self.images.fail(units[0], outcome)
            return
        if outcome.error_type is ErrorType.OOM:
            self._plan.lower_vision(sum(unit.num_cells for unit in units))
        middle = len(units) // 2
        for half in (units[:middle], units[middle:]):
            self._keep_or_split(half, self._try_encode(half), is_alone=is_alone)

    def _compute_packs(
        self, packs: Sequence[Sequence[WaitingRow]], *, is_alone: bool
    ) -> Iterator[PackOutcome]:
        able: list[list[WaitingRow]] = []
        for pack in packs:
            able.append([])
            for row in pack:
                failure = self.images.failure(row.units)
                if failure is not None:
                    yield self._given_up(row, failure)
                elif self.images.missing(row.units):
                    self._postponed.append(row)
                else:
                    able[-1].append(row)
        able = [rows for rows in able if rows]
        with self._clock.measure("prefill_s"):
            # One after another: where two need the same beginning, the first of them computes it.
            outcomes: Iterable[list[PrefilledRow] | Failure] = map(self._try_compute, able)
            if len(able) > 1 and self._compute_shared(list(chain.from_iterable(able))):
                outcomes = list(self._streams.map(self._try_compute, able, again=_is_oom))
                is_alone &= all(isinstance(outcome, Failure) for outcome in outcomes)
            for rows, outcome in zip(able, outcomes, strict=True):
                yield from self._leave_or_split(rows, outcome, is_alone=is_alone)
                is_alone = False

    def _try_compute(self, rows: Sequence[WaitingRow]) -> list[PrefilledRow] | Failure:
        try:
            return self._compute(rows)
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except Exception as error:
            # With the error its traceback goes, and with that the tensors of the attempt.
            return failure_of(error)

    def _leave_or_split(
        self,
        rows: Sequence[WaitingRow],
        outcome: list[PrefilledRow] | Failure,
        *,
        is_alone: bool,
    ) -> Iterator[PackOutcome]:
        if not isinstance(outcome, Failure):
            self._plan.count_good_pack()
            for row in rows:
                self._leave(row)
            yield from outcome
            return
        free_memory(self._decoder.device)
        is_oom = outcome.error_type is ErrorType.OOM
        if len(rows) == 1:
            if is_oom and not is_alone:
                self._postponed.append(rows[0])
            elif is_oom and (smaller := self._compute_smaller(rows[0])):
                self._leave(rows[0])
                yield smaller
            else:
                yield self._given_up(rows[0], outcome)
            return
        log.warning("a pack of %d prompts failed (%s); halving it", len(rows), outcome.message)
        if is_oom:
            begun: set[int] = set()
            self._plan.lower_pack(sum(num_new_tokens_of(row, begun) for row in rows))
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            yield from self._leave_or_split(half, self._try_compute(half), is_alone=is_alone)
            is_alone = False

    def _compute_smaller(self, row: WaitingRow) -> PrefilledRow | None:
        """A row for which memory was short, in smaller and smaller pieces; None: not even so."""
        before = self._plan.pieces.now
        num_tokens = min(self._plan.piece_tokens, num_new_tokens_of(row, set()))
        is_causal = self._decoder.is_causal(has_images=bool(row.units))
        while is_causal and num_tokens > _MIN_PIECE_TOKENS:
            log.warning("no memory for %d tokens of one prompt at once; halving", num_tokens)
            num_tokens //= 2
            self._plan.pieces.lower(num_tokens)
            try:
                return self._compute([row])[0]
            except torch.AcceleratorError:
                raise
            except Exception as error:
                log.warning("not in pieces of %d tokens either: %s", num_tokens, type(error))
            free_memory(self._decoder.device)
        # It was not for the pieces.
        self._plan.pieces.now = before
        return None

    def _compute(self, rows: Sequence[WaitingRow]) -> list[PrefilledRow]:
        start_s = time.perf_counter()
        prompts = [self._prompt(row) for row in rows]
        self._compute_prefixes(rows)
        if len(rows) == 1 and self._decoder.is_causal(has_images=bool(rows[0].units)):
            cache, logits_EV = self._compute_up_to(rows[0], len(prompts[0]))
            caches = [[cache]]
        else:
            pieces = [self._piece(row, row.prefix.length if row.prefix else 0) for row in rows]
            entries = [e for row in rows if not row.prefix for e in self.images.entries(row.units)]
            logits_EV, own = self._forward(pieces, entries, ends=range(len(rows)))
            caches = [
                [row.prefix.cache, cache] if row.prefix and row.prefix.cache else [cache]
                for row, cache in zip(rows, own, strict=True)
            ]
        return [
            PrefilledRow(row.sample.without_images(), prompt, caches[i], logits_EV[i], start_s)
            for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        ]

    def _compute_shared(self, rows: Sequence[WaitingRow]) -> bool:
        """Compute what rows of several packs share, before these; False: not all of it."""
        try:
            for row in rows:
                self._prompt(row)
            self._compute_prefixes(rows)
        except Exception as error:
            # The pack with the row at fault says so.
            log.debug("what rows share was not computed at once: %s", type(error))
            return False
        return True

    def _compute_prefixes(self, rows: Sequence[WaitingRow]) -> None:
        """Compute the beginnings that rows share, each once."""
        first = {id(r.prefix): r for r in reversed(rows) if r.prefix and r.prefix.cache is None}
        groups: list[list[WaitingRow]] = []
        num_tokens = 0
        for row in first.values():
            assert row.prefix is not None
            if not groups or num_tokens + row.prefix.length > self._plan.pack_tokens:
                groups.append([])
                num_tokens = 0
            num_tokens += row.prefix.length
            groups[-1].append(row)
        deque(self._streams.map(self._compute_beginnings, groups), maxlen=0)

    def _compute_beginnings(self, rows: Sequence[WaitingRow]) -> None:
        """Compute the beginnings of these rows, in one forward if that is not too long."""
        if len(rows) == 1 and (prefix := rows[0].prefix):
            prefix.cache, _ = self._compute_up_to(rows[0], prefix.length)
            return
        pieces = [self._piece(row, 0, row.prefix.length) for row in rows if row.prefix]
        entries = [e for row in rows for e in self.images.entries(row.units)]
        _, caches = self._forward(pieces, entries, ends=())
        for row, cache in zip(rows, caches, strict=True):
            assert row.prefix is not None
            row.prefix.cache = cache

    def _compute_up_to(self, row: WaitingRow, stop: int) -> tuple[RowCache, Tensor]:
        """The first `stop` tokens of one row: keys and values, and logits [1, V] at its end."""
        num_tokens = len(self._prompt(row))
        past = row.prefix.cache if row.prefix else None
        done = past.length if past else 0
        entries = self.images.entries(row.units) if done == 0 else []
        places = self._decoder.image_places(row.sample)
        for start, behind, here in cut(done, stop, self._plan.piece_tokens, places, entries):
            piece = self._piece(row, start, behind, past)
            ends = (0,) if behind == num_tokens else ()
            logits_EV, (cache,) = self._forward([piece], here, ends=ends)
            past = past.joined(cache) if past else cache
        assert past is not None
        return past, logits_EV

    def _forward(
        self, pieces: Sequence[Piece], entries: Sequence[Entry], *, ends: Sequence[int]
    ) -> tuple[Tensor, list[RowCache]]:
        logits_EV, cache = self._decoder.prefill(pieces, self.images.joined(entries), ends=ends)
        bounds = np.cumsum([0, *(piece.stop - piece.start for piece in pieces)]).tolist()
        with self._lock:
            self._stats.num_batches += 1
            self._stats.prompt_cells += bounds[-1]
            self._stats.prompt_tokens += bounds[-1]
        return logits_EV, [cache.row(start, stop) for start, stop in pairwise(bounds)]

    def _piece(
        self, row: WaitingRow, start: int, stop: int | None = None, past: RowCache | None = None
    ) -> Piece:
        prompt = self._prompt(row)
        if past is None and start and row.prefix:
            past = row.prefix.cache
        return Piece(prompt, start, len(prompt) if stop is None else stop, past)

    def _prompt(self, row: WaitingRow) -> Prompt:
        """What the decoder takes of a row, made once."""
        if row.prompt is None:
            row.prompt = self._decoder.prompt(row.sample)
        return row.prompt

    def _given_up(self, row: WaitingRow, failure: Failure) -> tuple[Sample, Failure]:
        self._leave(row)
        return row.sample, failure

    def _leave(self, row: WaitingRow) -> None:
        self.images.release(row.units)
        if row.prefix:
            row.prefix.num_users -= 1
            if not row.prefix.num_users:
                row.prefix.cache = None


def _is_oom(outcome: object) -> bool:
    return isinstance(outcome, Failure) and outcome.error_type is ErrorType.OOM
