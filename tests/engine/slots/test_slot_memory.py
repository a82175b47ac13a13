"""Memory that is short is halved work for an engine over slots, and ends no run."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.sampling import RowSampler
from batchvlm.engine.slots import memory, pool
from batchvlm.engine.slots.vision import ImageFeatures
from batchvlm.errors import ErrorType
from batchvlm.records import Failure

from ..families import needs_slots
from ..faulty import (
    OUT_OF_MEMORY,
    QUESTIONS,
    ROWS,
    TALE,
    Row,
    answers,
    asked,
    check,
    failing,
)
from ..loaded import Loaded, Question
from ..outcomes import run

pytestmark = [needs_slots, pytest.mark.usefixtures("no_collection")]


def rounded(num_tokens: int) -> int:
    """Slots come in multiples of this many tokens."""
    step = pool._LENGTH_STEP["cpu"]
    return -(-num_tokens // step) * step


class TestMemory:
    @settings(max_examples=40)
    @given(
        rows=ROWS,
        max_slots=st.integers(1, 8),
        window=st.integers(1, 12),
        streams=st.integers(1, 3),
        most_tokens=st.integers(110, 400) | st.none(),
        most_rows=st.integers(1, 8) | st.none(),
        most_images=st.integers(1, 3) | st.none(),
        most_cache=st.integers(1, 8) | st.none(),
    )
    def test_too_much_at_once_is_halved(
        self,
        small: Loaded,
        rows: list[Row],
        max_slots: int,
        window: int,
        streams: int,
        most_tokens: int | None,
        most_rows: int | None,
        most_images: int | None,
        most_cache: int | None,
    ) -> None:
        def too_many_tokens(self: Any, pieces: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
            num_tokens = sum(piece.stop - piece.start for piece in pieces)
            return most_tokens is not None and num_tokens > most_tokens

        def too_many_rows(self: Any, *args: Any, **kwargs: Any) -> bool:
            spans = args[2]
            num_rows = spans[-1].stop - spans[0].start
            return most_rows is not None and num_rows > most_rows

        def too_many_images(self: Any, units: Sequence[Any]) -> bool:
            num_images = sum(len(unit.arrays["pixel_values"]) for unit in units)
            return most_images is not None and num_images > most_images

        def too_many_slots(like: Any, *, num_slots: int, length: int) -> bool:
            return most_cache is not None and num_slots * length > 64 * most_cache

        samples = asked(small, rows)
        lengths = [rounded(s.prompt_tokens + s.generation.max_new_tokens) for s in samples]
        never_fits = [most_cache is not None and length > 64 * most_cache for length in lengths]
        engine = small.slots(max_slots=max_slots, sort_window=window, cpu_streams=streams, eos=[])
        with (
            failing(Decoder, "prefill", too_many_tokens, OUT_OF_MEMORY) as packs,
            failing(Decoder, "step", too_many_rows, OUT_OF_MEMORY) as steps,
            failing(ImageFeatures, "encode", too_many_images, OUT_OF_MEMORY) as images,
            failing(pool, "SlotCache", too_many_slots, OUT_OF_MEMORY) as caches,
        ):
            outcomes = run(engine, samples)
        check(outcomes, answers(small, rows), never_fits)
        assert all(o.error_type is ErrorType.OOM for o in outcomes if isinstance(o, Failure))
        # What failed once is not tried again and again, though once in every stream.
        assert len(packs) <= 6 * streams
        assert len(steps) <= 3 * streams
        assert len(images) <= 5 * streams
        assert len(caches) <= 5 + sum(never_fits)

    @pytest.mark.usefixtures("small_parts")
    def test_what_fits_only_by_itself_is_computed_by_itself(self, small: Loaded) -> None:
        def is_beside_others(*args: Any, **kwargs: Any) -> bool:
            return threading.current_thread() is not threading.main_thread()

        rows = [(question, seed, 6) for question in QUESTIONS for seed in (0, 1)]
        samples = asked(small, rows)
        engine = small.slots(max_prefill_tokens=60, cpu_streams=2, eos=[])
        engine._plan.lower_vision(1)
        with (
            failing(Decoder, "prefill", is_beside_others, OUT_OF_MEMORY) as packs,
            failing(Decoder, "step", is_beside_others, OUT_OF_MEMORY) as steps,
            failing(ImageFeatures, "encode", is_beside_others, OUT_OF_MEMORY) as images,
        ):
            outcomes = run(engine, samples)
        check(outcomes, answers(small, rows), [False] * len(rows))
        assert packs and steps and images

    def test_steps_of_too_many_rows_are_not_tried_again_at_each_token(self, small: Loaded) -> None:
        def are_too_many(self: Any, *args: Any, **kwargs: Any) -> bool:
            spans = args[2]
            return bool(spans[-1].stop - spans[0].start > 2)

        rows = [(QUESTIONS[0], seed % 2, 8) for seed in range(6)]
        engine = small.slots(max_slots=8, cpu_streams=1, eos=[])
        with failing(Decoder, "step", are_too_many, OUT_OF_MEMORY) as steps:
            outcomes = run(engine, asked(small, rows))
        check(outcomes, answers(small, rows), [False] * 6)
        # Six rows and then three, though there are seven steps.
        assert 0 < len(steps) <= 3

    def test_choosing_for_too_many_rows_is_halved_down_to_the_row(self, small: Loaded) -> None:
        rows = [(QUESTIONS[0], seed % 2, 8) for seed in range(6)]
        engine = small.slots(max_slots=8, eos=[])
        most = 2

        def is_too_much(self: Any, logits_BV: Any, slots: slice, **kwargs: Any) -> bool:
            return len(logits_BV) > most

        with failing(RowSampler, "choose", is_too_much, OUT_OF_MEMORY) as raised:
            outcomes = run(engine, asked(small, rows))
            assert raised
            check(outcomes, answers(small, rows), [False] * 6)
            most = 0
            outcomes = run(engine, asked(small, rows))
        check(outcomes, answers(small, rows), [True] * 6)
        assert all(o.error_type is ErrorType.OOM for o in outcomes if isinstance(o, Failure))

    @pytest.mark.parametrize(
        ("owner", "name", "num_lost"), [(torch, "stack", 0), (pool.SlotCache, "put", 1)]
    )
    def test_a_moment_without_memory_while_rows_come_into_slots(
        self, small: Loaded, owner: Any, name: str, num_lost: int
    ) -> None:
        rows = [(QUESTIONS[0], i % 2, limit) for i, limit in enumerate((3, 7, 4, 8))]
        calls: list[int] = []

        def is_first(*args: Any, **kwargs: Any) -> bool:
            calls.append(1)
            return len(calls) == 1

        with failing(owner, name, is_first, OUT_OF_MEMORY) as raised:
            outcomes = run(small.slots(eos=[]), asked(small, rows))
        assert raised
        is_lost = [isinstance(outcome, Failure) for outcome in outcomes]
        assert sum(is_lost) == num_lost
        check(outcomes, answers(small, rows), is_lost)

    def test_a_prompt_that_fits_only_alone_waits_for_the_others(self, small: Loaded) -> None:
        long, short = QUESTIONS[11], QUESTIONS[0]
        rows = [(short, 0, 12), (short, 1, 10), (long, 0, 3), (short, 0, 2)]
        samples = asked(small, rows)
        engine = small.slots(max_slots=4, sort_window=2, eos=[])

        def is_too_much(self: Any, pieces: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
            is_long = any(len(piece.prompt) == samples[2].prompt_tokens for piece in pieces)
            return bool(is_long and (engine._decoding.rows or engine._parked))

        with failing(Decoder, "prefill", is_too_much, OUT_OF_MEMORY) as raised:
            order = dict(engine.run(samples))
        check([order[i] for i in range(4)], answers(small, rows), [False] * 4)
        assert list(order)[-1] == 2
        assert 1 <= len(raised) <= 3

    def test_no_memory_for_longer_slots_costs_no_row_in_the_shorter_ones(
        self, small: Loaded
    ) -> None:
        long, short = QUESTIONS[11], QUESTIONS[0]
        rows = [(short, 0, 12), (short, 1, 12), (long, 0, 3), (short, 0, 12)]
        samples = asked(small, rows)
        lengths = {rounded(s.prompt_tokens + s.generation.max_new_tokens) for s in samples}
        assert len(lengths) == 2

        def is_long(like: Any, *, num_slots: int, length: int) -> bool:
            return length == max(lengths)

        engine = small.slots(max_slots=2, sort_window=2, eos=[])
        with failing(pool, "SlotCache", is_long, OUT_OF_MEMORY) as raised:
            outcomes = run(engine, samples)
        check(outcomes, answers(small, rows), [False, False, True, False])
        assert len(raised) <= 3

    def test_rows_whose_slots_are_lost_fail_and_the_next_are_answered(self, small: Loaded) -> None:
        rows = [(QUESTIONS[0], 0, 12), (QUESTIONS[0], 1, 12), (QUESTIONS[11], 0, 3)]
        samples = asked(small, rows)
        made: list[int] = []

        def is_lost(like: Any, *, num_slots: int, length: int) -> bool:
            made.append(length)
            # The first buffers are there; while rows are in them, there is no room for any.
            return 1 < len(made) < 5

        engine = small.slots(max_slots=3, sort_window=2, eos=[])
        with failing(pool, "SlotCache", is_lost, OUT_OF_MEMORY):
            outcomes = run(engine, samples)
        check(outcomes, answers(small, rows), [True, True, False])
        assert [outcome.error_type for outcome in outcomes[:2]] == [ErrorType.OOM] * 2


def test_shared_beginnings_count_towards_a_pack(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[int] = []

    def noted(self: Any, pieces: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
        packs.append(sum(piece.stop - piece.start for piece in pieces))
        return False

    # Little of a prompt is its row's own.
    texts = ("compare " * 12 + word for word in ("a cat", "a dog"))
    questions = [Question(text=text, sizes=((90, 60),)) for text in texts]
    rows = [(question, seed, 2) for seed in range(5) for question in questions]
    samples = asked(small, rows)
    budget = 150
    assert max(sample.prompt_tokens for sample in samples) <= budget
    engine = small.slots(max_prefill_tokens=budget, eos=[])
    with failing(Decoder, "prefill", noted, OUT_OF_MEMORY):
        outcomes = run(engine, samples)
    check(outcomes, answers(small, rows), [False] * len(rows))
    assert max(packs) <= budget
    assert sum(packs) < sum(sample.prompt_tokens for sample in samples)


def test_an_image_that_fits_only_alone_waits_for_the_others(small: Loaded) -> None:
    rows = [(QUESTIONS[0], 0, 12), (QUESTIONS[1], 0, 3), (QUESTIONS[4], 0, 2)]
    engine = small.slots(max_slots=4, sort_window=1, eos=[])

    def is_beside_others(self: Any, units: Any) -> bool:
        return bool(engine._decoding.rows)

    with failing(ImageFeatures, "encode", is_beside_others, OUT_OF_MEMORY) as raised:
        outcomes = dict(engine.run(asked(small, rows)))
    check([outcomes[i] for i in range(3)], answers(small, rows), [False] * 3)
    assert 1 <= len(raised) <= 2


@pytest.mark.parametrize("most_tokens", [120, 70, 40])
def test_a_prompt_that_does_not_fit_is_computed_in_pieces(small: Loaded, most_tokens: int) -> None:
    # One row that tells what the family allows, then long ones.
    shown = Question(text=TALE.text, sizes=((90, 60), (48, 48)))
    rows = [(QUESTIONS[1], 0, 3), (TALE, 0, 3), (shown, 0, 3)]
    samples = asked(small, rows)
    assert min(sample.prompt_tokens for sample in samples[1:]) > 120
    engine = small.slots(max_prefill_tokens=2000, sort_window=1, eos=[])

    def is_too_much(self: Any, pieces: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
        return sum(piece.stop - piece.start for piece in pieces) > most_tokens

    with failing(Decoder, "prefill", is_too_much, OUT_OF_MEMORY) as raised:
        outcomes = run(engine, samples)
    check(outcomes, answers(small, rows), [False] * 3)
    assert 1 <= len(raised) <= 4


def test_a_prompt_that_never_fits_leaves_packs_as_large_as_they_were(small: Loaded) -> None:
    # The first window tells what the family allows.
    rows = [*[(QUESTIONS[1], seed, 3) for seed in range(3)], (TALE, 0, 3)]
    rows += [(QUESTIONS[0], seed, 3) for seed in range(6)]
    samples = asked(small, rows)
    packs: list[int] = []

    def is_long(self: Any, pieces: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
        packs.append(len(pieces))
        return any(len(piece.prompt) == samples[3].prompt_tokens for piece in pieces)

    with failing(Decoder, "prefill", is_long, OUT_OF_MEMORY):
        # A beginning that rows share would be a piece by itself.
        engine = small.slots(sort_window=2, share_images=False, eos=[])
        limit = engine._plan.pieces.now
        outcomes = run(engine, samples)
    check(outcomes, answers(small, rows), [i == 3 for i in range(len(rows))])
    assert outcomes[3].error_type is ErrorType.OOM
    assert packs[-3:] == [2, 2, 2] and engine._plan.pieces.now == limit


def test_a_shared_beginning_above_the_budget_is_computed_in_pieces(small: Loaded) -> None:
    packs: list[int] = []

    def noted(self: Any, pieces: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
        packs.append(sum(piece.stop - piece.start for piece in pieces))
        return False

    texts = ("compare " * 12 + word for word in ("a cat", "a dog", "a fox"))
    rows = [(Question(text=text, sizes=((90, 60),)), 0, 4) for text in texts]
    samples = asked(small, rows)
    engine = small.slots(max_prefill_tokens=25, eos=[])
    with failing(Decoder, "prefill", noted, OUT_OF_MEMORY):
        outcomes = run(engine, samples)
    check(outcomes, answers(small, rows), [False] * 3)
    assert max(packs[1:]) <= 25
    # The first row was computed before it was known that the others may share; they do.
    assert sum(packs) < 2.5 * samples[0].prompt_tokens


def test_one_long_prompt_leaves_packs_of_others_as_they_were(small: Loaded) -> None:
    """Its pieces attend to all that lies before: what is short for them is enough for others."""
    rows = [(TALE, 0, 2), *[(QUESTIONS[0], seed % 2, 2) for seed in range(8)]]
    samples = asked(small, rows)
    packs: list[int] = []

    def is_too_much(self: Any, pieces: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
        packs.append(len(pieces))
        is_long = any(len(piece.prompt) == samples[0].prompt_tokens for piece in pieces)
        return is_long and sum(piece.stop - piece.start for piece in pieces) > 40

    engine = small.slots(share_images=False, cpu_streams=1, eos=[])
    list(engine.run(samples[1:2]))  # which tells what the family allows
    with failing(Decoder, "prefill", is_too_much, OUT_OF_MEMORY) as raised:
        outcomes = dict([*engine.run(samples[:1]), *engine.run(samples[1:])])
    assert raised
    check([outcomes[i] for i in range(9)], answers(small, rows), [False] * 9)
    assert packs[-1] == 8


def test_packs_and_batches_of_images_grow_again(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_TRY_AGAIN_PACKS", 2)
    packs: list[int] = []
    batches: list[int] = []

    def is_first(self: Any, things: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
        seen = packs if isinstance(self, Decoder) else batches
        seen.append(len(things))
        return len(seen) == 1

    rows = [(QUESTIONS[1], seed, 1) for seed in range(80)]
    engine = small.slots(sort_window=8, cpu_streams=1, eos=[])
    with (
        failing(Decoder, "prefill", is_first, OUT_OF_MEMORY),
        failing(ImageFeatures, "encode", is_first, OUT_OF_MEMORY),
    ):
        outcomes = run(engine, asked(small, rows))
    check(outcomes, answers(small, rows), [False] * len(rows))
    for sizes in (packs, batches):
        assert min(sizes) < sizes[0] and max(sizes[-3:]) == sizes[0]


def test_an_engine_and_its_slots_are_freed_with_the_last_reference(small: Loaded) -> None:
    """Also after a run that was broken off, for the next job of the process."""
    engine = small.slots(eos=[])
    answering = engine.run(asked(small, [(QUESTIONS[0], 0, 2), (QUESTIONS[0], 1, 12)]))
    next(answering)
    # The last two hold the model, of which a job of a sweep may load the next.
    parts = (engine, engine._pool.cache, engine._decoder, engine._prefill.images)
    gone = [weakref.ref(part) for part in parts]
    del parts
    gc.disable()
    try:
        answering.close()
        del answering, engine
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()
