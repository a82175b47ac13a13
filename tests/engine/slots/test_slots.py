"""The engine over slots: each row gets the answer that it gets alone, whatever is beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batchvlm.config import BatchingConfig, EngineConfig
from batchvlm.engine.forward.cache import SlotCache
from batchvlm.engine.forward.decoder import Decoder, Piece
from batchvlm.engine.select import why_not_slots
from batchvlm.engine.slots import pool
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.engine.slots.memory import Ceiling
from batchvlm.records import Completion, FinishReason, Sample

from ..families import FAMILIES, Family, needs_slots
from ..families.mixtures import glmga
from ..loaded import ABOUT_ONE, MOST_NEW_TOKENS, Loaded, Question, load
from ..outcomes import run

Row = tuple[Question, int, int]
"""What a row asks, of which pictures, and how many tokens it may answer."""


@pytest.fixture(
    scope="session",
    params=[family for family in FAMILIES if not family.why_not_slots_here],
    ids=lambda family: family.name,
)
def loaded(request: pytest.FixtureRequest, load_once: Callable[[Family], Loaded]) -> Loaded:
    """Each family that runs over slots."""
    return load_once(request.param)


def about_one_picture(loaded: Loaded) -> list[Question]:
    # 90 x 60 pixels each, so that one seed makes one picture.
    texts = [f"describe the image in one word; xyzzy, xyzzy: {word}" for word in ("dog", "cat", "")]
    return [Question(text=text, sizes=ABOUT_ONE.sizes) for text in texts]


def mixed_rows(loaded: Loaded, num_rows: int) -> list[Row]:
    draw = random.Random(0)
    questions = [*loaded.questions, *about_one_picture(loaded)]
    limits = (1, 2, 3, 8, MOST_NEW_TOKENS)
    return [
        (draw.choice(questions), draw.randrange(2), draw.choice(limits)) for _ in range(num_rows)
    ]


def asked(loaded: Loaded, rows: Sequence[Row]) -> list[Sample]:
    return [
        loaded.ask(i, question, seed, max_new_tokens=limit)
        for i, (question, seed, limit) in enumerate(rows)
    ]


def cut(ids: Sequence[int], limit: int, eos: Sequence[int]) -> list[int]:
    """A greedy answer under a limit and with these ids for its end."""
    end = next((n for n, token in enumerate(ids, 1) if token in eos), limit)
    return list(ids[: min(end, limit)])


def tokens(outcomes: Sequence[Any]) -> list[Any]:
    return [list(o.token_ids) if isinstance(o, Completion) else o for o in outcomes]


def at_lag(engine: SlotEngine, lag: int) -> SlotEngine:
    """As on a GPU, where the next step starts before the tokens of the last one are read."""
    engine._lag = lag
    return engine


class TestFamilies:
    @pytest.mark.parametrize(
        ("lag", "settings"),
        [
            (0, {"canary": True}),
            (0, {"max_slots": 3, "max_prefill_tokens": 24, "sort_window": 5}),
            (0, {"max_slots": 1, "share_images": False}),
            (1, {"max_slots": 2, "max_prefill_tokens": 100}),
            (0, {"cpu_streams": 2, "max_prefill_tokens": 60}),
        ],
        ids=["roomy", "tight", "alone", "behind", "streams"],
    )
    def test_rows_are_answered_as_transformers_answers_each_alone(
        self, loaded: Loaded, lag: int, settings: dict[str, Any]
    ) -> None:
        rows = mixed_rows(loaded, 20)
        # An end that some answers meet and others do not.
        eos = [loaded.known(ABOUT_ONE)[4]]
        expected = [cut(loaded.known(question, seed), limit, eos) for question, seed, limit in rows]
        engine = at_lag(loaded.slots(eos=eos, **settings), lag)
        outcomes = run(engine, asked(loaded, rows))
        assert tokens(outcomes) == expected
        for outcome, ids in zip(outcomes, expected, strict=True):
            is_stopped = ids[-1] in eos
            assert outcome.finish_reason is (
                FinishReason.STOP if is_stopped else FinishReason.LENGTH
            )
        assert len({outcome.finish_reason for outcome in outcomes}) == 2
        # The first token comes of the prompt, and is read with that of the first step; a step
        # behind, every end is seen one token late.
        needed = sum(len(ids) - 1 for ids in expected)
        num_late = sum(ids[-1] in eos and (lag or len(ids) == 1) for ids in expected)
        assert needed <= engine.stats.row_steps <= needed + num_late
        assert engine.stats.padding_share == 0

    def test_an_image_is_encoded_once_and_a_beginning_computed_once(self, loaded: Loaded) -> None:
        questions = about_one_picture(loaded)
        rows = [(question, seed, 4) for question in questions * 2 for seed in (0, 1)]
        samples = asked(loaded, rows)
        expected = [loaded.known(question, seed)[:4] for question, seed, _ in rows]
        # The first row has a pack to itself: what a family allows is known after it.
        budget = max(sample.prompt_tokens for sample in samples)
        sharing, apart = (
            loaded.slots(max_prefill_tokens=budget, share_images=is_shared, eos=[])
            for is_shared in (True, False)
        )
        assert tokens(run(sharing, samples)) == expected
        assert tokens(run(apart, samples)) == expected
        total = sum(sample.prompt_tokens for sample in samples)
        assert apart.stats.images_encoded == len(rows)
        assert apart.stats.prompt_tokens == total
        assert sharing.stats.images_encoded == 2
        if loaded.family.sees_ahead:
            assert sharing.stats.prompt_tokens == total
        else:
            # Of twelve rows one came too early, and one of each picture is the first.
            num_image = samples[0].image_tokens
            assert sharing.stats.prompt_tokens <= total - 9 * max(16, num_image)

    def test_an_image_beside_rows_that_share_a_beginning(self, loaded: Loaded) -> None:
        if not loaded.family.takes_text_alone:
            pytest.skip("it takes no text alone")
        texts = [
            Question(
                text=f"how is the lazy dog today? how was it on the day before? {end}", sizes=()
            )
            for end in ("tell", "and the cat?")
        ]
        engine = loaded.slots(eos=[])
        # What a family allows is known from its first rows on.
        run(engine, asked(loaded, [(texts[0], 0, 1)]))
        before = engine.stats.prompt_tokens
        samples = [
            loaded.ask(i, question, max_new_tokens=6, logprobs=True)
            for i, question in enumerate([ABOUT_ONE, *texts])
        ]
        alone = loaded.slots(eos=[], share_images=False)
        for sample, outcome in zip(samples, run(engine, samples), strict=True):
            (expected,) = run(alone, [sample])
            assert outcome.token_ids == expected.token_ids
            # Tokens of a random model can be the same by chance.
            assert outcome.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        computed = engine.stats.prompt_tokens - before
        assert computed <= sum(sample.prompt_tokens for sample in samples) - 16

    def test_a_prompt_above_the_budget_is_computed_in_pieces(
        self, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packs: list[list[int]] = []
        prefill = Decoder.prefill

        def noted(self: Decoder, pieces: Sequence[Piece], *args: Any, **kwargs: Any) -> Any:
            packs.append([piece.stop - piece.start for piece in pieces])
            return prefill(self, pieces, *args, **kwargs)

        monkeypatch.setattr(Decoder, "prefill", noted)
        rows = [(question, 0, 6) for question in loaded.questions]
        samples = asked(loaded, rows)
        budget = 9
        engine = loaded.slots(max_prefill_tokens=budget, eos=[])
        assert tokens(run(engine, samples)) == [loaded.known(q, 0)[:6] for q, _, _ in rows]
        assert sum(sum(pack) for pack in packs) == sum(s.prompt_tokens for s in samples)
        if loaded.family.sees_ahead or not loaded.family.is_cut:
            whole = {length for pack in packs for length in pack}
            assert {s.prompt_tokens for s in samples if s.image_sizes} <= whole
            return
        # The first prompt, whole, says what the family allows.
        pieces = [length for pack in packs[1:] for length in pack]
        assert len(pieces) >= 3 * (len(rows) - 1)
        # An image stays in one piece, with the marks between its tiles.
        found = (engine._decoder.image_places(sample) for sample in samples)
        extents = [
            int(np.ptp(places)) + 1 for places in found if places is not None and len(places)
        ]
        assert max(pieces) <= max(budget, *extents)

    def test_the_model_is_left_as_it_was(self, loaded: Loaded) -> None:
        before = loaded.reference(ABOUT_ONE)
        run(loaded.slots(), [loaded.ask(0, ABOUT_ONE)])
        assert loaded.reference(ABOUT_ONE) == before


@needs_slots
def test_a_type_that_has_the_class_of_another(tmp_path: Path) -> None:
    loaded = load(Family(build=glmga, image_tokens=(6, 10, 24)), tmp_path)
    assert loaded.model.config.model_type == "glmga"
    assert type(loaded.model).__name__ == "Glm46VForConditionalGeneration"
    assert not why_not_slots(loaded.model)
    rows = [(question, 0, 6) for question in loaded.questions]
    outcomes = run(loaded.slots(eos=[]), asked(loaded, rows))
    assert tokens(outcomes) == [loaded.known(question)[:6] for question in loaded.questions]


@pytest.fixture
def slots_with(model: Any, tokenizer: Any) -> Any:
    """An engine over slots over the text-only tests' model."""

    def make(
        *,
        eos: Sequence[int] = (),
        suppress: Sequence[int] = (),
        sort_window: int = 512,
        lag: int = 0,
        **cfg: Any,
    ) -> SlotEngine:
        engine = SlotEngine(
            model,
            tokenizer,
            BatchingConfig(sort_window=sort_window),
            EngineConfig(**{"canary": False, **cfg}),
            eos_ids=eos,
            suppress_ids=suppress,
        )
        return at_lag(engine, lag)

    return make


def without_latency(outcome: Completion) -> Completion:
    assert outcome.latency_s > 0
    others = tuple(without_latency(other) for other in outcome.alternatives)
    return replace(outcome, latency_s=0, alternatives=others, logprobs=None)


class TestSettings:
    """Rows under settings of their own are answered as by the engine over `generate()`."""

    ROWS = (
        {"temperature": 1.5, "seed": 4},
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5, "max_new_tokens": 11},
        {"temperature": 2.0, "min_p": 0.05, "seed": 6, "max_new_tokens": 1},
        {"repetition_penalty": 3.0, "max_new_tokens": 14},
        {"repetition_penalty": 1.2, "temperature": 1.0, "seed": 7},
        {"num_return_sequences": 3, "temperature": 1.0, "seed": 8},
        {"num_return_sequences": 2, "max_new_tokens": 3},
        {"min_new_tokens": 6, "max_new_tokens": 12},
        {"min_new_tokens": 12, "max_new_tokens": 12, "temperature": 1.3, "seed": 9},
        {"ignore_eos": True, "max_new_tokens": 13},
        {"stop": ("e", "q"), "max_new_tokens": 20},
        {"stop": ("o", " "), "temperature": 1.0, "seed": 10, "max_new_tokens": 20},
    )

    @pytest.mark.parametrize("lag", [0, 1])
    @pytest.mark.parametrize("max_slots", [1, 2, 5, 32])
    def test_rows_of_every_kind_beside_each_other(
        self,
        max_slots: int,
        lag: int,
        slots_with: Any,
        engine_with: Any,
        make_samples: Any,
        reference: Any,
        tokenizer: Any,
    ) -> None:
        eos = [tokenizer.eos_token_id, reference(1, 12)[5]]
        samples = make_samples(*self.ROWS)
        expected = [
            without_latency(run(engine_with(eos_token_id=eos), [sample])[0]) for sample in samples
        ]
        reasons = {outcome.finish_reason for outcome in expected}
        assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
        engine = slots_with(eos=eos, max_slots=max_slots, lag=lag)
        assert [without_latency(o) for o in run(engine, samples)] == expected

    def test_ids_that_a_model_must_not_say_stay_unsaid(
        self, slots_with: Any, make_samples: Any, reference: Any
    ) -> None:
        unsaid = reference(0)[:2]
        samples = make_samples({}, {"temperature": 5.0})
        greedy, drawn = run(slots_with(suppress=unsaid), samples)
        assert list(greedy.token_ids) == reference(0, suppress_tokens=unsaid)
        assert not set(unsaid) & {*greedy.token_ids, *drawn.token_ids}

    @pytest.mark.parametrize("lag", [0, 1])
    def test_logprobs(self, lag: int, slots_with: Any, engine_with: Any, make_samples: Any) -> None:
        samples = make_samples(
            {"logprobs": True},
            {"max_new_tokens": 3},
            {"logprobs": True, "temperature": 2.0, "top_k": 5, "repetition_penalty": 2.0},
            {"logprobs": True, "max_new_tokens": 2},
            {"logprobs": True, "num_return_sequences": 2, "temperature": 1.0},
        )
        expected = run(engine_with(), samples)
        outcomes = run(slots_with(max_slots=2, lag=lag), samples)
        assert tokens(outcomes) == tokens(expected)
        for outcome, other in zip(outcomes, expected, strict=True):
            if other.logprobs is None:
                assert outcome.logprobs is None
                continue
            torch.testing.assert_close(
                torch.tensor(outcome.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0
            )

    def test_answers_of_one_row_differ(
        self, slots_with: Any, make_samples: Any, tokenizer: Any
    ) -> None:
        samples = make_samples({"num_return_sequences": 4, "temperature": 1.0})
        (outcome,) = run(slots_with(), samples)
        texts = {outcome.text, *(other.text for other in outcome.alternatives)}
        assert len(outcome.alternatives) == 3
        assert len(texts) == 4


class TestSlots:
    @pytest.fixture
    def shapes(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        """(slots, length) of each cache that an engine makes."""
        made: list[tuple[int, int]] = []
        cache = pool.SlotCache

        def noted(*args: Any, num_slots: int, length: int) -> Any:
            made.append((num_slots, length))
            return cache(*args, num_slots=num_slots, length=length)

        monkeypatch.setattr(pool, "SlotCache", noted)
        return made

    def test_short_rows_do_not_pay_for_long_ones(
        self,
        slots_with: Any,
        make_samples: Any,
        reference: Any,
        shapes: list[tuple[int, int]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        limits = [4] * 6 + [120] * 2 + [4] * 12
        samples = make_samples(*({"max_new_tokens": limit} for limit in limits))
        engine = slots_with(sort_window=6)
        # Room for eight short rows, or for two long ones.
        token_bytes = 2 * 2 * 2 * 16 * 4
        most = Ceiling(8 * 64 * token_bytes, try_again=1)
        monkeypatch.setattr(engine._plan, "_cache_bytes", most)
        outcomes = run(engine, samples)
        known = [reference(i, 120) for i in range(4)]
        assert tokens(outcomes) == [known[i % 4][:limit] for i, limit in enumerate(limits)]
        lengths = [length for _, length in shapes]
        assert lengths[0] == 64 and max(lengths) >= 128 and lengths[-1] == 64
        assert all(num * length <= 8 * 64 for num, length in shapes)
        assert len(shapes) <= 5

    def test_slots_grow_under_the_rows_in_them(
        self, slots_with: Any, make_samples: Any, reference: Any, shapes: list[tuple[int, int]]
    ) -> None:
        limits = [40, 40, 100, 250]
        samples = make_samples(*({"max_new_tokens": limit} for limit in limits))
        outcomes = run(slots_with(sort_window=1), samples)
        assert tokens(outcomes) == [reference(i, limit) for i, limit in enumerate(limits)]
        assert len(shapes) >= 3

    def test_a_slot_goes_to_the_next_row_at_once(
        self, slots_with: Any, make_samples: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_use: list[int] = []
        step = Decoder.step

        def noted(self: Decoder, *args: Any, **kwargs: Any) -> Any:
            logits_BV = step(self, *args, **kwargs)
            in_use.append(len(logits_BV))
            return logits_BV

        monkeypatch.setattr(Decoder, "step", noted)
        draw = random.Random(1)
        rows = [{"max_new_tokens": draw.choice([2, 3, 9, 15])} for _ in range(24)]
        engine = slots_with(max_slots=4)
        run(engine, make_samples(*rows))
        assert max(in_use) == 4
        # Full until no row is left to take a slot.
        last_full = max(i for i, num in enumerate(in_use) if num == 4)
        assert in_use[: last_full + 1] == [4] * (last_full + 1)
        assert sum(in_use) == engine.stats.row_steps


class Stream:
    """Samples of which the next is ready where `pattern` says so; then again from its start."""

    def __init__(self, samples: Sequence[Sample], pattern: Sequence[bool]) -> None:
        self.samples, self.pattern = samples, pattern
        self.num_taken = self.num_asked = 0
        self.waits: list[int] = []
        """Samples taken so far, whenever one was taken that was not ready."""
        self._is_ready = False

    def is_ready(self) -> bool:
        self._is_ready = self.pattern[self.num_asked % len(self.pattern)]
        self.num_asked += 1
        return self._is_ready

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.samples:
            if not self._is_ready:
                self.waits.append(self.num_taken)
            self.num_taken += 1
            yield sample


class TestStream:
    @pytest.mark.parametrize(
        "pattern", [[False], [True, False], [False, False, True], [True] * 3 + [False] * 4], ids=str
    )
    @pytest.mark.parametrize("max_slots", [1, 3])
    def test_samples_that_come_slowly(
        self,
        max_slots: int,
        pattern: list[bool],
        slots_with: Any,
        make_samples: Any,
        reference: Any,
    ) -> None:
        limits = [5, 1, 9, 3, 7, 2, 8, 4]
        samples = make_samples(*({"max_new_tokens": limit} for limit in limits))
        stream = Stream(samples, pattern)
        outcomes = dict(slots_with(max_slots=max_slots, sort_window=3).run(stream))
        assert tokens([outcomes[i] for i in range(8)]) == [
            reference(i, limit) for i, limit in enumerate(limits)
        ]

    def test_it_waits_only_while_there_is_nothing_to_do(
        self, slots_with: Any, make_samples: Any
    ) -> None:
        samples = make_samples(*[{"max_new_tokens": 3}] * 6)
        stream = Stream(samples, [False])
        for num_answered, _ in enumerate(slots_with(max_slots=4).run(stream), 1):
            # Nothing is under way when it waits, so each answer comes before the next sample.
            assert stream.num_taken == num_answered
        assert stream.waits == list(range(6))

    def test_a_row_that_comes_late_joins_those_under_way(
        self, slots_with: Any, make_samples: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        samples = make_samples({"max_new_tokens": 30}, {"max_new_tokens": 2})
        # Ready only after some steps of the first row.
        stream = Stream(samples, [False] * 6 + [True] * 100)
        order = [row_index for row_index, _ in slots_with(max_slots=4).run(stream)]
        assert order == [1, 0]

    def test_a_run_leaves_nothing_for_the_next(
        self, slots_with: Any, make_samples: Any, reference: Any
    ) -> None:
        engine = slots_with(max_slots=2)
        samples = make_samples({}, {}, {})
        expected = [reference(i) for i in range(3)]
        assert tokens(run(engine, samples)) == expected
        assert list(engine.run([])) == []
        assert tokens(run(engine, samples[::-1]))[::-1] == expected


def test_a_run_that_was_broken_off_leaves_nothing_behind(
    slots_with: Any, make_samples: Any
) -> None:
    samples = make_samples(*({} for _ in range(6)))
    expected = [answer.token_ids for answer in run(slots_with(), samples)]
    engine = slots_with(max_slots=2)
    first, _ = next(iter(engine.run(samples)))
    rest = run(engine, [sample for sample in samples if sample.row_index != first])
    assert [a.token_ids for a in rest] == [expected[a.row_index] for a in rest]


class Counted(TorchDispatchMode):
    """Notes the operations that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero"):
            self.waits.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device(
    slots_with: Any, make_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, counted = Decoder.step, Counted()

    def watched(*args: Any, **kwargs: Any) -> Any:
        with counted:
            return step(*args, **kwargs)

    monkeypatch.setattr(Decoder, "step", watched)
    outcomes = run(slots_with(), make_samples({}, {}, {}))
    assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes
    assert counted.waits == []


def test_a_short_job_takes_few_slots(slots_with: Any, make_samples: Any) -> None:
    made: list[int] = []
    init = SlotCache.__init__

    def noted(self: SlotCache, like: Any, *, num_slots: int, length: int) -> None:
        made.append(num_slots)
        init(self, like, num_slots=num_slots, length=length)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(SlotCache, "__init__", noted)
        run(slots_with(), make_samples({}, {}, {}))
        assert made == [8]
        run(slots_with(), make_samples(*({} for _ in range(20))))
        assert made == [8, 32]
