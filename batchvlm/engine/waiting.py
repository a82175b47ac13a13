"""Rows before and after prefill: what their prompts share, and where a long one is cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from batchvlm.engine.cache import RowCache
from batchvlm.engine.decoder import Decoder, Prompt
from batchvlm.engine.vision import Entry, Unit
from batchvlm.records import Failure, Sample

_MIN_SHARED_TOKENS = 16
"""A shorter beginning costs less to compute again than to look after."""


@dataclass(slots=True, eq=False)
class Prefix:
    """The beginning that the prompts of several rows share."""

    length: int
    num_users: int
    cache: RowCache | None = None


@dataclass(slots=True, eq=False)
class PrefilledRow:
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
class WaitingRow:
    """A row whose prompt is yet to be computed."""

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


PackOutcome = PrefilledRow | tuple[Sample, Failure]
"""What prefill makes of one row of a pack."""


def find_prefixes(waiting: Sequence[WaitingRow], decoder: Decoder) -> None:
    """Note the beginnings, all images in them, that waiting rows share.

    Rows without images share one: a system prompt, or a template's first words.
    """
    groups = defaultdict(list)
    for row in waiting:
        if row.prefix is None:
            groups[row.group if row.units else ()].append(row)
    for rows in groups.values():
        places = decoder.image_places(rows[0].sample)
        if len(rows) < 2 or places is None:
            continue
        length = common_length([row.sample.features["input_ids"][0] for row in rows])
        last_place = places[-1] if len(places) else -1
        if length > last_place and length >= _MIN_SHARED_TOKENS:
            prefix = Prefix(length, num_users=len(rows))
            for row in rows:
                row.prefix = prefix


def num_new_tokens_of(row: WaitingRow, begun: set[int]) -> int:
    """Tokens that a row adds to a pack; `begun` holds the `id` of beginnings already in it."""
    prefix = row.prefix
    if prefix is None or prefix.cache is not None or id(prefix) in begun:
        return row.num_new_tokens
    begun.add(id(prefix))
    return row.sample.prompt_tokens


def common_length(rows: Sequence[npt.NDArray[Any]]) -> int:
    """Tokens that all rows begin with; each keeps one of its own at least."""
    length = min(len(row) for row in rows) - 1
    for row in rows[1:]:
        differs = np.flatnonzero(row[:length] != rows[0][:length])
        if len(differs):
            length = int(differs[0])
    return length


def cut(
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
