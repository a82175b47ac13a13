"""Samples of a window -> computed prompts, in packs without padding.

Rows of a window are sorted, then taken in packs to a token budget and computed behind one another.
Rows that ask about the same images share the encoding of these and, where their prompts begin
alike, the computing of that beginning. A prompt above the budget is computed in pieces.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchvlm.config import EngineConfig
from batchvlm.engine.cache import RowCache
from batchvlm.engine.decoder import Decoder, Piece, Prompt
from batchvlm.engine.faults import device_error, failure_of
from batchvlm.engine.memory import MemoryPlan
from batchvlm.engine.vision import Entry, ImageFeatures, Unit, batches
from batchvlm.errors import ErrorType
from batchvlm.records import EngineStats, Failure, Sample

log = logging.getLogger(__name__)

# Shape legend: as in attention.py; E prompts that end in a pack.

_MIN_PIECE_TOKENS = 64
"""Pieces that are not cut further where memory is short: they take next to none."""
_MIN_SHARED_TOKENS = 16
"""A shorter beginning costs less to compute again than to look after."""


@dataclass(slots=True, eq=False)
class Prefix:
    """The beginning that the prompts of several rows share."""

    length: int
    num_users: int
    cache: RowCache | None = None


@dataclass(slots=True, eq=False)
class PreparedRow:
    """A row whose prompt is computed."""

    sample: Sample
    prompt: Prompt
    pieces: list[RowCache]
    """Its keys and values, behind one another."""
    logits_V: Tensor
    start_s: float
    """`time.perf_counter()` when its prompt was begun."""

    @property
    def bytes_per_token(self) -> int:
        return self.pieces[0].bytes_per_token

    def forget(self) -> None:
        """Give up what is in a slot now."""
        self.pieces, self.logits_V = [], self.logits_V.new_empty(0)


@dataclass(slots=True, eq=False)
class _Waiting:
    sample: Sample
    units: tuple[Unit, ...]
    prefix: Prefix | None = None
    prompt: Prompt | None = None

    @property
    def group(self) -> tuple[str, ...]:
        """The same for rows that show the same images."""
        return self.sample.image_keys or (str(self.sample.row_index),)

    @property
    def lengths(self) -> tuple[int, int]:
        """What rows are sorted by: room for the answer, to a power of two, then the prompt."""
        # Exact limits of the rows' own would leave prompts unsorted.
        return self.sample.generation.max_new_tokens.bit_length(), self.sample.prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        """Tokens that are not computed by a shared beginning."""
        return self.sample.prompt_tokens - (self.prefix.length if self.prefix else 0)


Prepared = PreparedRow | tuple[Sample, Failure]


class Prefill:
    """Computes the prompts of waiting rows, pack by pack.

    Args:
        model: a transformers model of a family that allows it.
        decoder: the same model's decoder.
        plan: how much goes into one forward.
        cfg: whether rows share images and beginnings.
        stats: counts what is computed.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        plan: MemoryPlan,
        cfg: EngineConfig,
        stats: EngineStats,
    ) -> None:
        self._decoder = decoder
        self._plan = plan
        self._is_shared = cfg.share_images
        self._stats = stats
        self._images = ImageFeatures(model, stats, is_shared=cfg.share_images)
        self._waiting: list[_Waiting] = []
        """Sorted, the next row last."""
        self._postponed: list[_Waiting] = []
        """Rows that did not fit beside others."""
        self._failed: list[tuple[Sample, Failure]] = []
        self._has_prefixes = False

    @property
    def num_waiting(self) -> int:
        """Rows that `next_pack` has yet to give back."""
        return len(self._waiting) + len(self._postponed) + len(self._failed)

    def add(self, samples: Iterable[Sample]) -> None:
        """Take a window of samples."""
        rows = []
        for sample in samples:
            try:
                rows.append(_Waiting(sample, self._images.units(sample)))
            except Exception as error:
                self._failed.append((sample, failure_of(error)))
        for row in rows:
            self._images.retain(row.units)
        # Rows of the same images stay together, so that what they share need not be kept long.
        lengths: dict[tuple[str, ...], tuple[int, int]] = {}
        for row in rows:
            lengths[row.group] = max(row.lengths, lengths.get(row.group, (0, 0)))
        rows.sort(key=lambda r: (lengths[r.group], r.group, r.lengths, -r.sample.row_index))
        self._waiting = rows + self._waiting
        self._has_prefixes = False

    def next_pack(self, *, is_alone: bool) -> list[Prepared]:
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
        if self._is_shared and not self._has_prefixes and self._decoder.sees_ahead is False:
            self._find_prefixes()
        pack: list[_Waiting] = []
        num_tokens = 0
        begun: set[int] = set()
        while self._waiting:
            num_tokens += _num_new_tokens(self._waiting[-1], begun)
            if pack and num_tokens > self._plan.pack_tokens:
                break
            pack.append(self._waiting.pop())
        self._encode([*pack, *self._waiting[::-1]], num_needed=len(pack), is_alone=is_alone)
        return list(self._compute_or_split(pack, is_alone=is_alone))

    def _find_prefixes(self) -> None:
        """Find the beginnings, all images in them, that waiting rows share."""
        self._has_prefixes = True
        groups = defaultdict(list)
        for row in self._waiting:
            if row.prefix is None:
                groups[row.group].append(row)
        for rows in groups.values():
            places = self._decoder.image_places(rows[0].sample)
            if len(rows) < 2 or places is None:
                continue
            length = _common_length([row.sample.features["input_ids"][0] for row in rows])
            last_place = places[-1] if len(places) else -1
            if length > last_place and length >= _MIN_SHARED_TOKENS:
                prefix = Prefix(length, num_users=len(rows))
                for row in rows:
                    row.prefix = prefix

    def _encode(self, rows: Sequence[_Waiting], *, num_needed: int, is_alone: bool) -> None:
        """Encode the images of the first rows, and of the next ones as far as a batch has room."""
        start = time.perf_counter()
        units = self._images.missing(u for row in rows[:num_needed] for u in row.units)
        if not units:
            return
        num_cells = sum(unit.num_cells for unit in units)
        for row in rows[num_needed:]:
            more = [u for u in row.units if u.key not in {unit.key for unit in units}]
            num_cells += sum(unit.num_cells for unit in more)
            if num_cells > self._plan.vision_cells:
                break
            units += self._images.missing(more)
        for batch in batches(units, self._plan.vision_cells):
            self._encode_or_split(batch, is_alone=is_alone)
        self._stats.vision_s += time.perf_counter() - start

    def _encode_or_split(self, units: Sequence[Unit], *, is_alone: bool) -> None:
        try:
            self._images.encode(units)
            return
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except Exception as error:
            failure = failure_of(error)
        self._free_memory()
        if len(units) == 1:
            # Else its rows wait until there may be memory for it.
            if is_alone or failure.error_type is not ErrorType.OOM:
                self._images.fail(units[0], failure)
            return
        if failure.error_type is ErrorType.OOM:
            self._plan.lower_vision(sum(unit.num_cells for unit in units))
        middle = len(units) // 2
        self._encode_or_split(units[:middle], is_alone=is_alone)
        self._encode_or_split(units[middle:], is_alone=is_alone)

    def _compute_or_split(self, rows: Sequence[_Waiting], *, is_alone: bool) -> Iterator[Prepared]:
        start = time.perf_counter()
        able = []
        for row in rows:
            failure = self._images.failure(row.units)
            if failure is not None:
                yield self._given_up(row, failure)
            elif self._images.missing(row.units):
                self._postponed.append(row)
            else:
                able.append(row)
        if not able:
            return
        try:
            prepared = self._compute(able)
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except Exception as error:
            failure = failure_of(error)
        else:
            self._stats.prefill_s += time.perf_counter() - start
            for row in able:
                self._leave(row)
            yield from prepared
            return
        # Only here, behind the except clause, is the error gone, and with its traceback the tensors
        # of the failed attempt.
        self._free_memory()
        is_oom = failure.error_type is ErrorType.OOM
        if len(able) == 1:
            if is_oom and not is_alone:
                self._postponed.append(able[0])
            elif is_oom and (smaller := self._compute_smaller(able[0])):
                self._leave(able[0])
                yield smaller
            else:
                yield self._given_up(able[0], failure)
            return
        log.warning("a pack of %d prompts failed (%s); halving it", len(able), failure.message)
        if is_oom:
            begun: set[int] = set()
            self._plan.lower_pack(sum(_num_new_tokens(row, begun) for row in able))
        middle = len(able) // 2
        yield from self._compute_or_split(able[:middle], is_alone=is_alone)
        yield from self._compute_or_split(able[middle:], is_alone=False)

    def _compute_smaller(self, row: _Waiting) -> PreparedRow | None:
        """A row for which memory was short, in smaller and smaller pieces; None: not even so."""
        before = self._plan.pack_tokens
        num_tokens = min(before, _num_new_tokens(row, set()))
        while self._decoder.sees_ahead is False and num_tokens > _MIN_PIECE_TOKENS:
            self._plan.lower_pack(num_tokens)
            num_tokens = self._plan.pack_tokens
            try:
                return self._compute([row])[0]
            except torch.AcceleratorError:
                raise
            except Exception as error:
                log.warning("not in pieces of %d tokens either: %s", num_tokens, type(error))
            self._free_memory()
        # It was not for the pack.
        self._plan.pack_tokens = before
        return None

    def _compute(self, rows: Sequence[_Waiting]) -> list[PreparedRow]:
        start_s = time.perf_counter()
        for row in rows:
            row.prompt = row.prompt or self._decoder.prompt(row.sample)
        self._compute_prefixes(rows)
        if len(rows) == 1 and self._decoder.sees_ahead is False:
            row = rows[0]
            assert row.prompt is not None
            cache, logits_EV = self._compute_up_to(row, len(row.prompt))
            return [PreparedRow(row.sample, row.prompt, [cache], logits_EV[0], start_s)]
        pieces = [self._piece(row, row.prefix.length if row.prefix else 0) for row in rows]
        entries = [e for row in rows if not row.prefix for e in self._images.entries(row.units)]
        logits_EV, caches = self._forward(pieces, entries, ends=range(len(rows)))
        prepared = []
        for i, row in enumerate(rows):
            before = [row.prefix.cache] if row.prefix and row.prefix.cache else []
            assert row.prompt is not None
            prepared.append(
                PreparedRow(row.sample, row.prompt, [*before, caches[i]], logits_EV[i], start_s)
            )
        return prepared

    def _compute_prefixes(self, rows: Sequence[_Waiting]) -> None:
        """Compute the beginnings that rows share, each once."""
        first = {id(r.prefix): r for r in reversed(rows) if r.prefix and r.prefix.cache is None}
        owners = []
        for row in first.values():
            assert row.prefix is not None
            if row.prefix.length > self._plan.pack_tokens:
                row.prefix.cache, _ = self._compute_up_to(row, row.prefix.length)
            else:
                owners.append(row)
        if not owners:
            return
        pieces = [self._piece(row, 0, row.prefix.length) for row in owners if row.prefix]
        entries = [e for row in owners for e in self._images.entries(row.units)]
        _, caches = self._forward(pieces, entries, ends=())
        for row, cache in zip(owners, caches, strict=True):
            assert row.prefix is not None
            row.prefix.cache = cache

    def _compute_up_to(self, row: _Waiting, stop: int) -> tuple[RowCache, Tensor]:
        """The first `stop` tokens of one row: keys and values, and logits [1, V] at its end."""
        assert row.prompt is not None
        past = row.prefix.cache if row.prefix else None
        done = past.length if past else 0
        entries = self._images.entries(row.units) if done == 0 else []
        places = self._decoder.image_places(row.sample)
        for start, behind, here in _cut(done, stop, self._plan.pack_tokens, places, entries):
            piece = self._piece(row, start, behind, past)
            ends = (0,) if behind == len(row.prompt) else ()
            logits_EV, (cache,) = self._forward([piece], here, ends=ends)
            past = past.joined(cache) if past else cache
        assert past is not None
        return past, logits_EV

    def _forward(
        self, pieces: Sequence[Piece], entries: Sequence[Entry], *, ends: Sequence[int]
    ) -> tuple[Tensor, list[RowCache]]:
        logits_EV, cache = self._decoder.prefill(pieces, self._images.joined(entries), ends=ends)
        bounds = np.cumsum([0, *(piece.stop - piece.start for piece in pieces)]).tolist()
        self._stats.num_batches += 1
        self._stats.prompt_cells += bounds[-1]
        self._stats.prompt_tokens += bounds[-1]
        return logits_EV, [cache.row(start, stop) for start, stop in pairwise(bounds)]

    def _piece(
        self, row: _Waiting, start: int, stop: int | None = None, past: RowCache | None = None
    ) -> Piece:
        assert row.prompt is not None
        if past is None and start and row.prefix:
            past = row.prefix.cache
        return Piece(row.prompt, start, len(row.prompt) if stop is None else stop, past)

    def _given_up(self, row: _Waiting, failure: Failure) -> tuple[Sample, Failure]:
        self._leave(row)
        return row.sample, failure

    def _leave(self, row: _Waiting) -> None:
        self._images.release(row.units)
        if row.prefix:
            row.prefix.num_users -= 1
            if not row.prefix.num_users:
                row.prefix.cache = None

    def _free_memory(self) -> None:
        gc.collect()
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()


def _num_new_tokens(row: _Waiting, begun: set[int]) -> int:
    """Tokens that a row adds to a pack; `begun` holds the `id` of beginnings already in it."""
    prefix = row.prefix
    if prefix is None or prefix.cache is not None or id(prefix) in begun:
        return row.num_new_tokens
    begun.add(id(prefix))
    return row.sample.prompt_tokens


def _common_length(rows: Sequence[npt.NDArray[Any]]) -> int:
    """Tokens that all rows begin with; each keeps one of its own at least."""
    length = min(len(row) for row in rows) - 1
    for row in rows[1:]:
        differs = np.flatnonzero(row[:length] != rows[0][:length])
        if len(differs):
            length = int(differs[0])
    return length


def _cut(
    start: int,
    stop: int,
    max_tokens: int,
    places: npt.NDArray[np.intp] | None,
    entries: Sequence[Entry],
) -> Iterator[tuple[int, int, Sequence[Entry]]]:
    """Tokens `start` to `stop` of a prompt in pieces of at most `max_tokens`.

    An image's tokens stay in one piece, which may be longer for it.

    Yields:
        First token, the one behind the last, and the images of each piece.
    """
    counts = [len(entry.pooled_PD) for entry in entries]
    if stop - start <= max_tokens or (entries and (places is None or sum(counts) != len(places))):
        yield start, stop, entries
        return
    is_image_T = np.zeros(stop, dtype=bool)
    if entries and places is not None:
        is_image_T[places] = True
    # Image tokens before each place, and the places where that is a whole number of images.
    before_T = np.cumsum([0, *is_image_T])
    ends = np.cumsum([0, *counts])
    allowed = np.flatnonzero(np.isin(before_T, ends))
    while start < stop:
        within = allowed[(allowed > start) & (allowed <= start + max_tokens)]
        end = int(within[-1] if len(within) else allowed[allowed > start][0])
        # An image that begins at the cut belongs to the next piece.
        num = int(np.searchsorted(ends, before_T[end], side="right")) - 1
        yield start, end, entries[int(np.searchsorted(ends, before_T[start])) : num]
        start = end
