"""Rows before and after prefill: shared prefixes, and the pieces of a long prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from batchvlm.engine.forward.cache import RowCache
from batchvlm.engine.forward.decoder import Decoder, Prompt
from batchvlm.engine.slots.vision import Entry, Unit
from batchvlm.records import Failure, Sample

_MIN_SHARED_TOKENS = 16
"""A shorter prefix costs less to compute again than to keep."""


@dataclass(slots=True, eq=False)
class Prefix:
    """A prefix that the prompts of several rows share."""

    length: int
    num_users: int
    """Rows that still need it."""
    cache: RowCache | None = None
    """Its keys and values; None before they are computed and once no row needs them."""


@dataclass(slots=True, eq=False)
class PrefilledRow:
    """A row whose prompt has been computed."""

    sample: Sample
    prompt: Prompt
    pieces: list[RowCache]
    """The prompt's keys and values, in consecutive pieces."""
    logits_V: Tensor
    """Logits at the end of the prompt."""
    start_s: float
    """`time.perf_counter()` at the start of its prefill."""

    @property
    def bytes_per_token(self) -> int:
        return self.pieces[0].bytes_per_token

    def forget(self) -> None:
        """Drop the keys, values and logits, once decoding has them."""
        self.pieces, self.logits_V = [], self.logits_V.new_empty(0)


@dataclass(slots=True, eq=False)
class WaitingRow:
    """A row whose prompt has not been computed yet."""

    sample: Sample
    units: tuple[Unit, ...]
    prefix: Prefix | None = None
    prompt: Prompt | None = None

    @property
    def group(self) -> tuple[str, ...]:
        """A key that rows with the same images have in common."""
        return self.sample.image_keys or (str(self.sample.row_index),)

    @property
    def lengths(self) -> tuple[int, int]:
        """The sort key: bits of the answer's limit, then the prompt's length."""
        # If rows have limits of their own, sorting by the exact ones would leave prompts unsorted.
        return self.sample.generation.max_new_tokens.bit_length(), self.sample.prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        """Prompt tokens after the shared prefix."""
        return self.sample.prompt_tokens - (self.prefix.length if self.prefix else 0)


PackOutcome = PrefilledRow | tuple[Sample, Failure]
"""The result of prefill for one row of a pack."""


def find_prefixes(waiting: Sequence[WaitingRow], decoder: Decoder) -> None:
    """Set the `prefix` of waiting rows whose prompts begin alike.

    A prefix includes all images of its rows. Rows without images form one group: they may share a
    system prompt or the start of a template. Rows that have come later join a prefix of the others.
    """
    groups: dict[tuple[str, ...], list[WaitingRow]] = defaultdict(list)
    for row in waiting:
        groups[row.group if row.units else ()].append(row)
    for rows in groups.values():
        others = [row for row in rows if row.prefix is None]
        for row in {id(row.prefix): row for row in rows if row.prefix}.values():
            others = _join(others, row)
        if len(others) < 2 or (places := decoder.image_places(others[0].sample)) is None:
            continue
        length = common_length([row.sample.features["input_ids"][0] for row in others])
        last_place = places[-1] if len(places) else -1
        if length > last_place and length >= _MIN_SHARED_TOKENS:
            prefix = Prefix(length, num_users=len(others))
            for row in others:
                row.prefix = prefix


def _join(rows: Sequence[WaitingRow], user: WaitingRow) -> list[WaitingRow]:
    """Let rows share the prefix of a row if their prompts begin with it; return the others."""
    prefix = user.prefix
    assert prefix is not None
    others = []
    for row in rows:
        both = [r.sample.features["input_ids"][0] for r in (row, user)]
        if common_length(both) >= prefix.length:
            row.prefix = prefix
            prefix.num_users += 1
        else:
            others.append(row)
    return others


def num_new_tokens_of(row: WaitingRow, begun: set[int]) -> int:
    """Tokens that a row adds to a pack; `begun` collects the `id` of each prefix computed in it."""
    prefix = row.prefix
    if prefix is None or prefix.cache is not None or id(prefix) in begun:
        return row.num_new_tokens
    begun.add(id(prefix))
    return row.sample.prompt_tokens


def common_length(rows: Sequence[npt.NDArray[Any]]) -> int:
    """The length of the longest common prefix that leaves each row at least one token."""
    length = min(len(row) for row in rows) - 1
    for row in rows[1:]:
        differs = np.flatnonzero(row[:length] != rows[0][:length])
        if len(differs):
            length = int(differs[0])
    return length


def divide_prompt(
    start: int,
    stop: int,
    max_tokens: int,
    places: npt.NDArray[np.intp] | None,
    entries: Sequence[Entry],
) -> Iterator[tuple[int, int, Sequence[Entry]]]:
    """Divide tokens `start` to `stop` of a prompt into pieces of at most `max_tokens`.

    An image's tokens stay in one piece, which may be longer than `max_tokens`.

    Args:
        start: the first token.
        stop: the end, exclusive.
        max_tokens: the longest piece.
        places: [P], the indices of all image tokens of the prompt; None if they are not known: then
            a prompt with images is not divided.
        entries: the images between `start` and `stop`, in order.

    Yields:
        Start and end of each piece, and the entries of its images.
    """
    counts = [len(entry.pooled_PD) for entry in entries]
    if stop - start <= max_tokens or (entries and (places is None or sum(counts) != len(places))):
        yield start, stop, entries
        return
    is_image_T = np.zeros(stop, dtype=bool)
    if entries and places is not None:
        is_image_T[places] = True
    # The number of image tokens before each position; a cut is allowed between whole images.
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
