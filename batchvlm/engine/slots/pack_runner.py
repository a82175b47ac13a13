"""Runs the prefill of packs: from waiting rows with encoded images to keys, values and logits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from batchvlm.engine.forward.cache import RowCache
from batchvlm.engine.forward.decoder import Decoder, Piece, Prompt
from batchvlm.engine.forward.streams import Streams
from batchvlm.engine.slots.memory import MemoryPlan
from batchvlm.engine.slots.vision import Entry, ImageFeatures
from batchvlm.engine.slots.waiting import PrefilledRow, WaitingRow, divide_prompt
from batchvlm.records import EngineStats
from batchvlm.words import described

log = logging.getLogger(__name__)

# Shape legend: as in attention.py; E prompts that end in a pack.


class PackRunner:
    """Prefills packs of rows, several at once if called by several threads.

    Args:
        decoder: a model's decoder.
        images: the encoded images.
        plan: limits on one forward.
        stats: counts what is computed.
    """

    def __init__(
        self, decoder: Decoder, images: ImageFeatures, plan: MemoryPlan, stats: EngineStats
    ) -> None:
        self._decoder, self._images = decoder, images
        self._plan, self._stats = plan, stats
        self._lock = threading.Lock()

    def prompt(self, row: WaitingRow) -> Prompt:
        """The decoder's input for a row, built once."""
        if row.prompt is None:
            row.prompt = self._decoder.prompt(row.sample)
        return row.prompt

    def run(self, rows: Sequence[WaitingRow], streams: Streams) -> list[PrefilledRow]:
        """Prefill a pack in one forward, after its shared prefixes; a single row in pieces.

        Args:
            rows: the rows of the pack, whose images are encoded.
            streams: compute the prefixes that are still missing.
        """
        start_s = time.perf_counter()
        prompts = [self.prompt(row) for row in rows]
        self._compute_prefixes(rows, streams)
        if len(rows) == 1 and self._decoder.is_causal(has_images=bool(rows[0].units)):
            cache, logits_EV = self._compute_up_to(rows[0], len(prompts[0]))
            caches = [[cache]]
        else:
            pieces = [self._piece(row, row.prefix.length if row.prefix else 0) for row in rows]
            entries = [e for row in rows if not row.prefix for e in self._images.entries(row.units)]
            logits_EV, own = self._forward(pieces, entries, ends=range(len(rows)))
            caches = [
                [row.prefix.cache, cache] if row.prefix and row.prefix.cache else [cache]
                for row, cache in zip(rows, own, strict=True)
            ]
        return [
            PrefilledRow(row.sample.without_images(), prompt, caches[i], logits_EV[i], start_s)
            for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        ]

    def try_compute_prefixes(self, rows: Sequence[WaitingRow], streams: Streams) -> bool:
        """Compute the shared prefixes of several packs before the packs; return whether all are."""
        try:
            for row in rows:
                self.prompt(row)
            self._compute_prefixes(rows, streams)
        except Exception as error:
            # The failing row's own pack raises again and handles the error.
            log.debug("shared prefixes were not computed in advance: %s", described(error))
            return False
        return True

    def _compute_prefixes(self, rows: Sequence[WaitingRow], streams: Streams) -> None:
        """Compute the shared prefixes that have no keys and values yet, each once."""
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
        deque(streams.map(self._compute_prefix_group, groups), maxlen=0)

    def _compute_prefix_group(self, rows: Sequence[WaitingRow]) -> None:
        """Compute the prefixes of these rows in one forward; that of a single row in pieces."""
        if len(rows) == 1 and (prefix := rows[0].prefix):
            prefix.cache, _ = self._compute_up_to(rows[0], prefix.length)
            return
        pieces = [self._piece(row, 0, row.prefix.length) for row in rows if row.prefix]
        entries = [e for row in rows for e in self._images.entries(row.units)]
        _, caches = self._forward(pieces, entries, ends=())
        for row, cache in zip(rows, caches, strict=True):
            assert row.prefix is not None
            row.prefix.cache = cache

    def _compute_up_to(self, row: WaitingRow, stop: int) -> tuple[RowCache, Tensor]:
        """Compute a row up to `stop`: keys and values, and logits [1, V] at the prompt's end."""
        num_tokens = len(self.prompt(row))
        past = row.prefix.cache if row.prefix else None
        done = past.length if past else 0
        entries = self._images.entries(row.units) if done == 0 else []
        places = self._decoder.image_places(row.sample)
        parts = divide_prompt(done, stop, self._plan.piece_tokens, places, entries)
        for start, piece_stop, shown in parts:
            piece = self._piece(row, start, piece_stop, past)
            ends = (0,) if piece_stop == num_tokens else ()
            logits_EV, (cache,) = self._forward([piece], shown, ends=ends)
            past = past.joined(cache) if past else cache
        assert past is not None
        return past, logits_EV

    def _forward(
        self, pieces: Sequence[Piece], entries: Sequence[Entry], *, ends: Sequence[int]
    ) -> tuple[Tensor, list[RowCache]]:
        logits_EV, cache = self._decoder.prefill(pieces, self._images.joined(entries), ends=ends)
        bounds = np.cumsum([0, *(piece.stop - piece.start for piece in pieces)]).tolist()
        with self._lock:
            self._stats.num_batches += 1
            self._stats.prompt_cells += bounds[-1]
            self._stats.prompt_tokens += bounds[-1]
        return logits_EV, [cache.row(start, stop) for start, stop in pairwise(bounds)]

    def _piece(
        self, row: WaitingRow, start: int, stop: int | None = None, past: RowCache | None = None
    ) -> Piece:
        prompt = self.prompt(row)
        if past is None and start and row.prefix:
            past = row.prefix.cache
        return Piece(prompt, start, len(prompt) if stop is None else stop, past)
