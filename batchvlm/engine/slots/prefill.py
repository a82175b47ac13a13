"""Samples of a window -> prefilled rows, in packs without padding.

The rows of a window are sorted and taken in packs within a token budget; the prompts of a pack are
concatenated. Rows with the same images share their encoding and, if their prompts begin alike, the
keys and values of that prefix (prefix caching). A prompt longer than the budget is computed in
pieces (chunked prefill).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from batchvlm.config import EngineConfig
from batchvlm.engine.faults import device_error, failure_of, free_memory
from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.forward.streams import Streams
from batchvlm.engine.slots.clock import Clock
from batchvlm.engine.slots.memory import MemoryPlan
from batchvlm.engine.slots.pack_runner import PackRunner
from batchvlm.engine.slots.vision import Encoded, ImageFeatures, Unit, batches
from batchvlm.engine.slots.waiting import (
    PackOutcome,
    PrefilledRow,
    WaitingRow,
    find_prefixes,
    num_new_tokens_of,
)
from batchvlm.errors import ErrorType
from batchvlm.records import EngineStats, Failure, Sample
from batchvlm.words import described

log = logging.getLogger(__name__)

_MIN_PIECE_TOKENS = 64
"""Pieces of this length are not halved when memory is short: they take next to none."""


class Prefill:
    """Prefills waiting rows, pack by pack.

    Args:
        model: a transformers model of a family that supports it.
        decoder: the same model's decoder.
        plan: limits on one forward.
        cfg: whether rows share images and prefixes.
        stats: counts what is computed.
        clock: measures the seconds of encoding and of prefill.
        looks_ahead: whether to prepare the next pack while the device computes the last one.
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
        looks_ahead: bool = False,
    ) -> None:
        self._clock = clock
        self._streams = Streams()
        """Those of the latest `next_pack`."""
        self._decoder = decoder
        self._plan = plan
        self._is_shared = cfg.share_images
        self._looks_ahead = looks_ahead
        self.images = ImageFeatures(
            model, stats, is_shared=cfg.share_images, around=decoder.encoding
        )
        """The image encoder, and its output for the images of waiting rows."""
        self._runner = PackRunner(decoder, self.images, plan, stats)
        self._waiting: list[WaitingRow] = []
        """Sorted so that the next row is the last."""
        self._postponed: list[WaitingRow] = []
        """Rows for which memory was short while other rows held some."""
        self._failed: list[tuple[Sample, Failure]] = []
        self._num_taken = 0
        """Rows that `next_pack` is computing, perhaps in another thread."""
        self._ready_tokens: tuple[int, int] | None = None
        """Kept until other rows wait."""
        self._searched: set[bool] = set()
        """The kinds of waiting rows already searched for prefixes: True with images."""

    @property
    def num_waiting(self) -> int:
        """Number of rows that `next_pack` has not returned yet."""
        num_waiting = len(self._waiting) + len(self._postponed) + len(self._failed)
        return num_waiting + self._num_taken

    @property
    def ready_tokens(self) -> tuple[int, int]:
        """Of the rows that wait for nothing but their turn: prompt tokens, and answers' limits."""
        if self._ready_tokens is None:
            limits = (row.sample.generation.max_new_tokens for row in self._waiting)
            self._ready_tokens = sum(row.num_new_tokens for row in self._waiting), sum(limits)
        return self._ready_tokens

    def add(self, samples: Iterable[Sample]) -> None:
        """Let samples wait, in one order with the rows that wait already."""
        rows: list[WaitingRow] = []
        for sample in samples:
            try:
                rows.append(WaitingRow(sample, self.images.units(sample)))
            except Exception as error:
                self._failed.append((sample, failure_of(error)))
        for row in rows:
            self.images.retain(row.units)
        rows += self._waiting
        # Rows with the same images stay together, so that what they share is released early.
        lengths: dict[tuple[str, ...], tuple[int, int]] = {}
        for row in rows:
            lengths[row.group] = max(row.lengths, lengths.get(row.group, (0, 0)))
        rows.sort(key=lambda r: (lengths[r.group], r.group, r.lengths, -r.sample.row_index))
        self._waiting = rows
        self._ready_tokens = None
        self._searched.clear()

    def next_pack(
        self, streams: Streams, *, is_alone: bool, max_packs: int | None = None
    ) -> list[PackOutcome]:
        """Prefill the next rows: one pack, or several at once on a CPU.

        Args:
            streams: compute packs, or batches of images, at once.
            max_packs: the most packs; None: as many as take some seconds.
            is_alone: whether no other row holds memory, so that a row that does not fit now never
                will.

        Returns:
            Prefilled rows and rows that failed. Empty if all remaining rows wait for memory.
        """
        if self._failed:
            failed, self._failed = self._failed, []
            return [*failed]
        if not self._waiting:
            if not is_alone:
                return []
            self._waiting, self._postponed = self._postponed, []
        self._streams = streams
        if self._is_shared:
            self._find_prefixes()
        packs = self._take_packs(max_packs)
        rows = list(chain.from_iterable(packs))
        self._num_taken, self._ready_tokens = len(rows), None
        self._encode([*rows, *self._waiting[::-1]], num_needed=len(rows), is_alone=is_alone)
        prefilled = list(self._compute_packs(packs, is_alone=is_alone))
        if self._looks_ahead:
            self._prepare(len(rows))
        self._num_taken = 0
        return prefilled

    def _find_prefixes(self) -> None:
        """Find shared prefixes, once a window; only causal prompts can share them."""
        for has_images in (True, False):
            if has_images not in self._searched and self._decoder.is_causal(has_images=has_images):
                self._searched.add(has_images)
                alike = [row for row in self._waiting if bool(row.units) is has_images]
                find_prefixes(alike, self._decoder)

    def _take_packs(self, max_packs: int | None) -> list[list[WaitingRow]]:
        """Take the next rows, in as many packs as are computed before others decode."""
        kinds = {bool(row.units) for row in self._waiting}
        # Whether a kind of prompt is causal is known once the first of the kind is computed.
        is_known = all(self._decoder.has_prefilled(has_images=kind) for kind in kinds)
        most = self._streams.num_packs(self._plan.pack_tokens) if is_known else 1
        if max_packs is not None:
            most = min(most, max_packs)
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
        """Prepare the next pack's prompts and images while the GPU computes the last pack."""
        rows = self._waiting[::-1]
        for row in rows[:num_rows]:
            try:
                self._runner.prompt(row)
            except Exception:
                break  # raised again, and handled, when the row's own pack is computed
        self._encode(rows, num_needed=num_rows)

    def _encode(
        self, rows: Sequence[WaitingRow], *, num_needed: int, is_alone: bool = False
    ) -> None:
        """Encode the images of the first rows, and of later rows while a batch has room."""
        units = self.images.missing(u for row in rows[:num_needed] for u in row.units)
        if not units:
            return
        num_cells = sum(unit.num_cells for unit in units)
        keys = {unit.key for unit in units}
        for row in rows[num_needed:]:
            more = self.images.missing(u for u in row.units if u.key not in keys)
            num_cells += sum(unit.num_cells for unit in more)
            if num_cells > self._plan.vision_cells:
                break
            units += more
            keys |= {unit.key for unit in more}
        parts = batches(units, self._plan.vision_cells)
        with self._clock.measure("vision_s", share=self._streams.share):
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
            # Otherwise the unit's rows are postponed until other rows free memory.
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
        """Prefill packs, several at once; rows without all of their images fail or wait."""
        able: list[list[WaitingRow]] = []
        for pack in packs:
            able.append([])
            for row in pack:
                failure = self.images.failure(row.units)
                if failure is not None:
                    yield self._fail(row, failure)
                elif self.images.missing(row.units):
                    self._postponed.append(row)
                else:
                    able[-1].append(row)
        able = [rows for rows in able if rows]
        with self._clock.measure("prefill_s", share=self._streams.share):
            # One by one: the first pack that needs a shared prefix computes it.
            outcomes: Iterable[list[PrefilledRow] | Failure] = map(self._try_compute, able)
            if len(able) > 1 and self._runner.try_compute_prefixes(
                list(chain.from_iterable(able)), self._streams
            ):
                outcomes = list(self._streams.map(self._try_compute, able, again=_is_oom))
                is_alone &= all(isinstance(outcome, Failure) for outcome in outcomes)
            for rows, outcome in zip(able, outcomes, strict=True):
                yield from self._finish_or_split(rows, outcome, is_alone=is_alone)
                is_alone = False

    def _try_compute(self, rows: Sequence[WaitingRow]) -> list[PrefilledRow] | Failure:
        try:
            return self._runner.run(rows, self._streams)
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except Exception as error:
            # Only the failure is kept: the traceback would keep the attempt's tensors alive.
            return failure_of(error)

    def _finish_or_split(
        self,
        rows: Sequence[WaitingRow],
        outcome: list[PrefilledRow] | Failure,
        *,
        is_alone: bool,
    ) -> Iterator[PackOutcome]:
        if not isinstance(outcome, Failure):
            self._plan.count_good_pack()
            for row in rows:
                self._release(row)
            yield from outcome
            return
        free_memory(self._decoder.device)
        is_oom = outcome.error_type is ErrorType.OOM
        if len(rows) == 1:
            if is_oom and not is_alone:
                self._postponed.append(rows[0])
            elif is_oom and (smaller := self._compute_in_smaller_pieces(rows[0])):
                self._release(rows[0])
                yield smaller
            else:
                yield self._fail(rows[0], outcome)
            return
        log.warning("a pack of %d prompts failed (%s); halving it", len(rows), outcome.message)
        if is_oom:
            begun: set[int] = set()
            self._plan.lower_pack(sum(num_new_tokens_of(row, begun) for row in rows))
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            yield from self._finish_or_split(half, self._try_compute(half), is_alone=is_alone)
            is_alone = False

    def _compute_in_smaller_pieces(self, row: WaitingRow) -> PrefilledRow | None:
        """Prefill one row in ever smaller pieces; None if memory is short even for the smallest."""
        before = self._plan.pieces.now
        num_tokens = min(self._plan.piece_tokens, num_new_tokens_of(row, set()))
        is_causal = self._decoder.is_causal(has_images=bool(row.units))
        while is_causal and num_tokens > _MIN_PIECE_TOKENS:
            log.warning("no memory for %d tokens of one prompt at once; halving them", num_tokens)
            num_tokens //= 2
            self._plan.pieces.lower(num_tokens)
            try:
                return self._runner.run([row], self._streams)[0]
            except torch.AcceleratorError:
                raise
            except Exception as error:
                log.warning(
                    "a prompt failed in pieces of %d tokens too: %s", num_tokens, described(error)
                )
            free_memory(self._decoder.device)
        # Smaller pieces do not help, so the limit on pieces was not the cause.
        self._plan.pieces.now = before
        return None

    def _fail(self, row: WaitingRow, failure: Failure) -> tuple[Sample, Failure]:
        self._release(row)
        return row.sample, failure

    def _release(self, row: WaitingRow) -> None:
        """Release the images and the prefix that a row needed."""
        self.images.release(row.units)
        if row.prefix:
            row.prefix.num_users -= 1
            if not row.prefix.num_users:
                row.prefix.cache = None


def _is_oom(outcome: object) -> bool:
    return isinstance(outcome, Failure) and outcome.error_type is ErrorType.OOM
