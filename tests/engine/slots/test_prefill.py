"""How prompts are cut and what they share; what comes of it is in test_slots.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.engine.forward.streams import Streams
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.engine.slots.pack_runner import PackRunner
from batchvlm.engine.slots.prefill import Prefill
from batchvlm.engine.slots.vision import Entry, Unit
from batchvlm.engine.slots.waiting import (
    Prefix,
    WaitingRow,
    common_length,
    divide_prompt,
    num_new_tokens_of,
)
from batchvlm.records import Sample

from ...conftest import make_sample
from ..families import needs_slots
from ..loaded import ABOUT_NONE, ABOUT_ONE, Loaded, Question
from ..outcomes import run

pytestmark = needs_slots


def entry(num_tokens: int) -> Entry:
    return Entry(torch.zeros(num_tokens, 2))


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[bool], list[int]]:
    """Which tokens are an image's, and how many tokens each image has; images may touch."""
    is_image: list[bool] = []
    counts = []
    for _ in range(draw(st.integers(0, 4))):
        is_image += [False] * draw(st.integers(0, 6))
        counts.append(draw(st.integers(1, 9)))
        is_image += [True] * counts[-1]
        # Some families put a token between the rows of an image.
        if counts[-1] > 1 and draw(st.booleans()):
            is_image.insert(len(is_image) - 1, False)
    is_image += [False] * draw(st.integers(1, 9))
    return is_image, counts


@given(prompt=prompts(), max_tokens=st.integers(1, 40))
def test_pieces_are_in_order_and_hold_whole_images(
    prompt: tuple[list[bool], list[int]], max_tokens: int
) -> None:
    is_image, counts = prompt
    entries = [entry(num) for num in counts]
    places = np.flatnonzero(is_image)
    pieces = list(divide_prompt(0, len(is_image), max_tokens, places, entries))
    assert [start for start, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces[:-1])]
    assert pieces[-1][1] == len(is_image)
    shown = [one for _, _, here in pieces for one in here]
    assert all(one is other for one, other in zip(shown, entries, strict=True))
    for start, stop, here in pieces:
        assert start < stop
        assert sum(is_image[start:stop]) == sum(len(one.pooled_PD) for one in here)
        # Longer only for one image that is, with the token before its last.
        assert stop - start <= max_tokens or len(here) == 1


@given(start=st.integers(0, 20), num_tokens=st.integers(1, 40), max_tokens=st.integers(1, 50))
def test_what_is_behind_the_images_is_cut_to_the_budget(
    start: int, num_tokens: int, max_tokens: int
) -> None:
    pieces = list(divide_prompt(start, start + num_tokens, max_tokens, np.array([0]), []))
    lengths = [stop - begin for begin, stop, _ in pieces]
    assert pieces[0][0] == start and sum(lengths) == num_tokens
    assert all(length == max_tokens for length in lengths[:-1])
    assert lengths[-1] <= max_tokens


def test_a_prompt_whose_image_tokens_cannot_be_told_is_notcut() -> None:
    entries = [entry(4)]
    for places in (None, np.arange(3)):
        assert list(divide_prompt(0, 50, 10, places, entries)) == [(0, 50, entries)]


class Encoder:
    """Stands in for `ImageFeatures`: notes what it encodes."""

    def __init__(self, known: Iterable[str]) -> None:
        self.known = {*known}
        self.batches: list[list[str]] = []

    def missing(self, units: Iterable[Unit]) -> list[Unit]:
        return list({u.key: u for u in units if u.key not in self.known}.values())

    def encode(self, units: Sequence[Unit]) -> None:
        self.batches.append(sorted(unit.key for unit in units))

    def keep(self, units: Sequence[Unit], encoded: None) -> None:
        self.known.update(unit.key for unit in units)


def test_an_image_that_is_encoded_already_takes_no_room_in_a_batch() -> None:
    prefill: Any = object.__new__(Prefill)
    prefill.images = Encoder(known=["shared"])
    prefill._plan = SimpleNamespace(vision_cells=30, count_good_images=lambda: None)
    prefill._clock = SimpleNamespace(measure=lambda name, share: nullcontext())
    prefill._streams = Streams()
    pixels = {"pixel_values": np.zeros((1, 10))}
    sample: Any = None
    rows = [WaitingRow(sample, (Unit("shared", pixels), Unit(key, pixels))) for key in "abcd"]
    prefill._encode(rows, num_needed=1)
    assert prefill.images.batches == [["a", "b", "c"]]


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=4))
def test_what_rows_have_in_common(rows: list[list[int]]) -> None:
    length = common_length([np.array(row) for row in rows])
    most = min(len(row) for row in rows) - 1
    assert 0 <= length <= most
    assert len({tuple(row[:length]) for row in rows}) == 1
    assert length == most or len({tuple(row[: length + 1]) for row in rows}) > 1


def test_a_shared_beginning_counts_once_in_a_pack_and_not_once_it_is_kept() -> None:
    cache: Any = object()
    shared, other = Prefix(20, num_users=3), Prefix(16, num_users=2)
    rows = [
        WaitingRow(make_sample(number, num_tokens=25), (), prefix)
        for number, prefix in enumerate([shared, shared, other, shared, None])
    ]
    begun: set[int] = set()
    assert [num_new_tokens_of(row, begun) for row in rows] == [25, 5, 25, 5, 25]
    shared.cache = cache
    assert [num_new_tokens_of(row, set()) for row in rows] == [5, 5, 25, 5, 25]


def test_packs_are_filled_up_to_their_limit_and_a_longer_prompt_is_one_by_itself() -> None:
    prefill: Any = object.__new__(Prefill)
    lengths = [20, 30, 1, 60, 10, 10]
    rows = [WaitingRow(make_sample(i, num_tokens=num), ()) for i, num in enumerate(lengths)]
    prefill._waiting = rows[::-1]
    prefill._plan = SimpleNamespace(pack_tokens=50)
    prefill._decoder = SimpleNamespace(has_prefilled=lambda has_images: True)
    prefill._streams = SimpleNamespace(num_packs=lambda num_tokens: 2)

    def taken() -> list[list[int]]:
        return [[row.sample.prompt_tokens for row in pack] for pack in prefill._take_packs(None)]

    assert [taken(), taken(), taken()] == [[[20, 30], [1]], [[60], [10, 10]], []]


class InTwoParts:
    """A stream of which the first rows are ready, and the others when they are let in."""

    def __init__(self, first: Sequence[Sample], later: Sequence[Sample]) -> None:
        self._left = [*first, *later]
        self._num_later = len(later)
        self.is_open = False

    def is_ready(self) -> bool:
        return self.is_open or len(self._left) > self._num_later

    def __iter__(self) -> Iterator[Sample]:
        while self._left:
            yield self._left.pop(0)


class TestRowsThatComeLater:
    """They become ready while the first pack is computed, and join its window."""

    LONG = "describe the image in one word and then explain it in detail: "

    def packs(
        self, engine: SlotEngine, first: Sequence[Sample], later: Sequence[Sample]
    ) -> list[list[int]]:
        """The rows of each pack."""
        stream = InTwoParts(first, later)
        packs: list[list[int]] = []
        run_pack = PackRunner.run

        def run_and_let_in(self: Any, rows: Any, streams: Any) -> Any:
            packs.append([row.sample.row_index for row in rows])
            stream.is_open = True
            return run_pack(self, rows, streams)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PackRunner, "run", run_and_let_in)
            outcomes = dict(engine.run(stream))
        assert sorted(outcomes) == sorted(s.row_index for s in [*first, *later])
        return packs

    @pytest.mark.parametrize(
        ("sort_window", "expected"),
        [(512, [[0], [3], [2], [1]]), (3, [[0], [2], [1], [3]]), (2, [[0], [1], [3], [2]])],
    )
    def test_they_are_sorted_into_it_while_it_has_room(
        self, small: Loaded, sort_window: int, expected: list[list[int]]
    ) -> None:
        rows = [
            small.ask(i, ABOUT_NONE, max_new_tokens=limit) for i, limit in enumerate((2, 1, 4, 8))
        ]
        engine = small.slots(
            sort_window=sort_window, max_prefill_tokens=1, share_images=False, cpu_streams=1, eos=[]
        )
        assert self.packs(engine, rows[:2], rows[2:]) == expected

    def test_they_share_what_rows_before_them_have_computed(self, small: Loaded) -> None:
        rows = [
            small.ask(i, Question(text=self.LONG + end, sizes=ABOUT_ONE.sizes), max_new_tokens=1)
            for i, end in enumerate("abcd")
        ]
        other = small.ask(4, Question(text="what is this?", sizes=ABOUT_ONE.sizes))
        engine = small.slots(max_prefill_tokens=1, cpu_streams=1, eos=[])
        run(engine, [small.ask(0, ABOUT_ONE, 1)])
        before = engine.stats.prompt_tokens
        packs = self.packs(engine, rows[:2], [*rows[2:], other])
        assert len(packs) == 5
        length = common_length([row.features["input_ids"][0] for row in rows])
        total = sum(row.prompt_tokens for row in [*rows, other])
        assert engine.stats.prompt_tokens - before == total - 3 * length

    def test_the_first_with_images_are_checked(
        self, small: Loaded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checked: list[bool] = []

        def check(model: Any, decoder: Any, samples: Sequence[Sample], *_: Any, **__: Any) -> None:
            checked.append(any(sample.image_sizes for sample in samples))

        monkeypatch.setattr("batchvlm.engine.slots.canary.check", check)
        first = [small.ask(i, ABOUT_NONE) for i in range(2)]
        engine = small.slots(max_prefill_tokens=1, cpu_streams=1, canary=True, eos=[])
        self.packs(engine, first, [small.ask(2, ABOUT_ONE)])
        assert checked == [False, True]


def shared_tokens(
    small: Loaded, asks: list[tuple[Question, int]], first: Question = ABOUT_ONE, **cfg: Any
) -> int:
    """Tokens that were not computed because another row had computed them."""
    engine = small.slots(max_prefill_tokens=1, eos=[], **cfg)
    # What the family allows is known after one row.
    run(engine, [small.ask(0, first)])
    before = engine.stats.prompt_tokens
    samples = [small.ask(i, *ask, max_new_tokens=1) for i, ask in enumerate(asks)]
    for outcome, ask in zip(run(engine, samples), asks, strict=True):
        assert list(outcome.token_ids) == small.known(*ask)[:1]
    return sum(sample.prompt_tokens for sample in samples) - engine.stats.prompt_tokens + before


class TestBeginnings:
    ONE = ABOUT_ONE.sizes
    LONG = "describe the image in one word and then explain it in detail: "

    def asks(self, *texts: str, sizes: Any = ONE, seed: int = 0) -> list[tuple[Question, int]]:
        return [(Question(text=text, sizes=sizes), seed) for text in texts]

    def test_a_whole_prompt_less_its_last_token_is_shared(self, small: Loaded) -> None:
        asks = self.asks(self.LONG, self.LONG, self.LONG)
        length = small.ask(0, *asks[0]).prompt_tokens
        assert shared_tokens(small, asks) == 2 * (length - 1)
        # Each window by itself.
        assert shared_tokens(small, [*asks, asks[0]], sort_window=2) == 2 * (length - 1)
        assert shared_tokens(small, asks, share_images=False) == 0

    def test_rows_of_other_images_share_nothing(self, small: Loaded) -> None:
        asks = [*self.asks(self.LONG, seed=0), *self.asks(self.LONG, seed=1)]
        assert shared_tokens(small, asks) == 0

    def test_rows_that_differ_before_the_end_of_their_images_share_nothing(
        self, small: Loaded
    ) -> None:
        two = ((90, 60), (48, 48))
        one = self.asks(self.LONG)
        assert shared_tokens(small, [*one, *self.asks(self.LONG, sizes=two)]) == 0

    def test_what_they_say_alike_is_shared_up_to_where_they_differ(self, small: Loaded) -> None:
        asks = self.asks(self.LONG + "a", self.LONG + "b", self.LONG + "c")
        ids = [small.ask(0, *ask).features["input_ids"][0] for ask in asks]
        assert shared_tokens(small, asks) == 2 * common_length(ids)

    def test_rows_of_text_alone_share_their_first_words(self, small: Loaded) -> None:
        asks = self.asks(self.LONG + "a", self.LONG + "b", self.LONG + "c", sizes=())
        ids = [small.ask(0, *ask).features["input_ids"][0] for ask in asks]
        assert shared_tokens(small, asks, ABOUT_NONE) == 2 * common_length(ids)
        assert shared_tokens(small, asks, ABOUT_ONE) == 2 * common_length(ids)
        assert shared_tokens(small, asks, ABOUT_NONE, share_images=False) == 0

    def test_a_long_text_without_images_is_computed_in_pieces(self, small: Loaded) -> None:
        (ask,) = self.asks(self.LONG * 8, sizes=())
        engine = small.slots(max_prefill_tokens=32, eos=[])
        run(engine, [small.ask(0, ABOUT_NONE)])
        before = engine.stats.num_batches
        (outcome,) = run(engine, [small.ask(0, *ask, max_new_tokens=4)])
        assert list(outcome.token_ids) == small.known(*ask)[:4]
        length = small.ask(0, *ask).prompt_tokens
        assert engine.stats.num_batches - before == -(-length // 32)
