"""Choices scored: for each row the numbers that transformers gives it alone, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin

from batchvlm.config import BatchingConfig
from batchvlm.engine import choices, forced
from batchvlm.engine.choices import AT_PROMPT, Choices, RowChoices
from batchvlm.engine.collate import as_arguments, collate
from batchvlm.engine.forward.decoder import Branches, Decoder
from batchvlm.engine.generate import _OWN_GENERATE, GenerateEngine, eos_ids
from batchvlm.engine.slots import memory
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.errors import DeviceError, ErrorType, ModelError
from batchvlm.records import Completion, Constraint, Failure, FinishReason, Sample

from .families import FAMILIES, Family, needs_slots
from .faulty import OUT_OF_MEMORY, failing
from .loaded import ABOUT_ONE, ABOUT_ONE_LONGER, ABOUT_TWO, Loaded
from .outcomes import run

COLORS = ("red", "red apple", "a", "a cat or a dog", "a cat", "blue")
"""Of one token and of several, some the beginnings of others."""

OVER_SLOTS = [family for family in FAMILIES if not family.why_not_slots_here]
PLAIN = {"llava", "idefics3", "gemma3", "qwen2_5_vl", "qwen3_vl", "internvl", "qwen3_5"}
"""Families whose plain forward takes the tokens of an answer as it takes those of a prompt."""


def ends(loaded: Loaded) -> tuple[int, ...]:
    return eos_ids(loaded.model, loaded.processor.tokenizer)


def made(loaded: Loaded, texts: Sequence[str] | None = COLORS) -> Choices:
    return Choices(loaded.processor.tokenizer, texts, eos_ids=ends(loaded))


def tokens_of(loaded: Loaded, text: str) -> list[int]:
    return loaded.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def generate(loaded: Loaded, texts: Sequence[str] | None = COLORS, **batching: Any) -> Any:
    tokenizer = loaded.processor.tokenizer
    return GenerateEngine(
        loaded.own(), tokenizer, BatchingConfig(**batching), choices=made(loaded, texts)
    )


def logits_of(loaded: Loaded, sample: Sample, ids: Sequence[int]) -> torch.Tensor:
    """What transformers' `generate()` says behind a prompt and each of these tokens, [n + 1, V]."""

    heeded = loaded.model
    if heeded.config.model_type == "blip-2":
        heeded = heeded.language_model
    forced_bos = getattr(heeded.generation_config, "forced_bos_token_id", None)
    skipped = int(forced_bos is not None and loaded.family.answers_apart)
    steps = iter(range(-skipped, len(ids) + 1))

    def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        if step < 0:
            return scores  # its own token comes first
        out = torch.full_like(scores, -torch.inf)
        out[:, ids[step] if step < len(ids) else 0] = 0
        return out

    generate_of = loaded.model.generate
    if loaded.model.config.model_type in _OWN_GENERATE:
        generate_of = partial(GenerationMixin.generate, loaded.model)
    inputs = collate([sample], pad_id=0, pads_right=loaded.family.answers_apart)
    with torch.inference_mode():
        out = generate_of(
            **as_arguments(inputs),
            max_new_tokens=len(ids) + 1 + skipped,
            min_new_tokens=len(ids) + 1 + skipped,
            do_sample=False,
            eos_token_id=None,
            logits_processor=[force],
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.cat(out.logits[skipped:]).float()


def expected(loaded: Loaded, sample: Sample, texts: Sequence[str]) -> list[list[float]]:
    """By choice, the log-probabilities of its tokens and of the end."""
    found = []
    for text in texts:
        ids = tokens_of(loaded, text)
        logprobs = logits_of(loaded, sample, ids).log_softmax(-1)
        end = float(logprobs[-1, list(ends(loaded))].logsumexp(0))
        found.append([*(float(logprobs[i, token]) for i, token in enumerate(ids)), end])
    return found


def check(outcome: Any, want: Sequence[Sequence[float]], texts: Sequence[str]) -> None:
    assert isinstance(outcome, Completion), outcome
    assert outcome.scores is not None
    assert [score.choice for score in outcome.scores] == list(texts)
    totals = torch.tensor([sum(each) for each in want])
    torch.testing.assert_close(
        torch.tensor([score.logprob for score in outcome.scores]), totals, atol=2e-3, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.tensor([score.probability for score in outcome.scores]),
        totals.softmax(0),
        atol=1e-3,
        rtol=1e-3,
    )
    assert math.isclose(sum(score.probability for score in outcome.scores), 1)
    best = max(outcome.scores, key=lambda score: score.probability)
    assert outcome.text == best.choice
    assert outcome.finish_reason is FinishReason.STOP
    assert outcome.constraint is Constraint.STRICT


@pytest.fixture(scope="module")
def known() -> dict[Any, list[list[float]]]:
    """What transformers says, once for each question of each family."""
    return {}


@pytest.fixture
def want(known: dict[Any, Any]) -> Callable[..., list[list[float]]]:
    def ask(loaded: Loaded, sample: Sample, texts: Sequence[str] = COLORS) -> list[list[float]]:
        ids = sample.features["input_ids"].tobytes()
        key = loaded.path, ids, sample.image_keys, tuple(texts)
        if key not in known:
            known[key] = expected(loaded, sample, texts)
        return known[key]

    return ask


def engines(loaded: Loaded) -> Iterator[Any]:
    yield generate(loaded)
    if not loaded.family.why_not_slots_here:
        yield loaded.slots(choices=made(loaded), canary=True)
        yield loaded.slots(choices=made(loaded), max_prefill_tokens=24, sort_window=2)


def test_every_family_scores_mixed_rows_as_transformers_does_each_alone(
    loaded: Loaded, want: Callable[..., list[list[float]]]
) -> None:
    samples = [*loaded.samples(), loaded.sample(len(loaded.questions), ABOUT_ONE, seed=1)]
    for engine in engines(loaded):
        for sample, outcome in zip(samples, run(engine, samples), strict=True):
            check(outcome, want(loaded, sample), COLORS)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in PLAIN], ids=lambda family: family.name
)
def test_scores_are_those_of_one_plain_forward(
    family: Family, load_once: Callable[[Family], Loaded]
) -> None:
    loaded = load_once(family)
    sample = loaded.sample(0, ABOUT_TWO)
    found = []
    for text in COLORS:
        ids = torch.tensor([tokens_of(loaded, text)])
        inputs = dict(collate([sample], pad_id=0))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                fill = int(name == "attention_mask")
                more = torch.full_like(ids, fill).to(inputs[name].dtype)
                inputs[name] = torch.cat([inputs[name], more], dim=1)
        with torch.inference_mode():
            logits_TV = loaded.model(**inputs).logits[0, -ids.shape[1] - 1 :].float()
        logprobs = logits_TV.log_softmax(-1)
        end = float(logprobs[-1, list(ends(loaded))].logsumexp(0))
        found.append([*(float(logprobs[i, token]) for i, token in enumerate(ids[0])), end])
    for engine in engines(loaded):
        check(run(engine, [sample])[0], found, COLORS)


MANY = tuple(f"{a} {b} {i}" for a in ("red", "blue") for b in ("dog", "cat") for i in range(12))


@needs_slots
class TestSlots:
    def test_rows_of_their_own_choices_come_and_go(
        self, small: Loaded, want: Callable[..., list[list[float]]]
    ) -> None:
        lists = [COLORS, ("yes", "no"), ("yes", "yes or no", "word"), MANY, ("dog",), None]
        questions = [*small.questions, ABOUT_ONE_LONGER]
        samples = [
            replace(
                small.ask(i, questions[i % len(questions)], i % 2), choices=lists[i % len(lists)]
            )
            for i in range(17)
        ]
        for settings_, lag in (({}, 0), ({"max_prefill_tokens": 40, "sort_window": 5}, 1)):
            engine = small.slots(choices=made(small, ("cat", "dog")), **settings_)
            engine._lag = lag
            for sample, outcome in zip(samples, run(engine, samples), strict=True):
                texts = sample.choices or ("cat", "dog")
                check(outcome, want(small, sample, texts), texts)
            assert engine.stats.row_steps == 0

    def test_a_list_that_is_too_long_for_one_forward_goes_through_several(
        self,
        small: Loaded,
        want: Callable[..., list[list[float]]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(memory, "_SCORED_TOKENS", 12)
        sizes = []
        branch = Decoder.branch

        def counted(self: Decoder, branches: Sequence[Branches]) -> torch.Tensor:
            sizes.append(sum(len(b.ids) for b in branches))
            return branch(self, branches)

        monkeypatch.setattr(Decoder, "branch", counted)
        samples = [small.ask(i, ABOUT_ONE, i) for i in range(2)]
        outcomes = run(small.slots(choices=made(small, MANY)), samples)
        for sample, outcome in zip(samples, outcomes, strict=True):
            check(outcome, want(small, sample, MANY), MANY)
        assert len(sizes) > 6 and max(sizes) <= 12

    def test_what_choices_begin_with_is_computed_once(
        self, small: Loaded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed = []
        branch = Decoder.branch

        def counted(self: Decoder, branches: Sequence[Branches]) -> torch.Tensor:
            computed.extend(len(b.ids) for b in branches)
            return branch(self, branches)

        monkeypatch.setattr(Decoder, "branch", counted)
        run(small.slots(choices=made(small, MANY)), [small.ask(0, ABOUT_ONE)])
        ids = [tuple(tokens_of(small, text)) for text in MANY]
        assert computed == [len({each[:n] for each in ids for n in range(1, len(each) + 1)})]

    @pytest.mark.parametrize("lag", [0, 1])
    def test_short_memory_halves_what_is_scored_at_once(
        self, small: Loaded, want: Callable[..., list[list[float]]], lag: int
    ) -> None:
        samples = [replace(small.ask(i, ABOUT_ONE, i % 2), choices=MANY) for i in range(5)]
        engine = small.slots(choices=made(small))
        engine._lag = lag

        def too_much(self: Decoder, branches: Sequence[Branches]) -> bool:
            return sum(len(b.ids) for b in branches) > 8

        with failing(Decoder, "branch", too_much, OUT_OF_MEMORY) as raised:
            outcomes = run(engine, samples)
        for sample, outcome in zip(samples, outcomes, strict=True):
            check(outcome, want(small, sample, MANY), MANY)
        # Known from then on: what was packed before is not tried as it is.
        assert 1 <= len(raised) <= 6

    def test_a_choice_that_alone_is_too_long_costs_its_row(
        self, small: Loaded, want: Callable[..., list[list[float]]]
    ) -> None:
        own: list[tuple[str, ...] | None] = [None, ("cat", "cat " * 30), None, ("dog", "cat")]
        samples = [replace(small.ask(i, ABOUT_ONE, i), choices=c) for i, c in enumerate(own)]

        def too_much(self: Decoder, branches: Sequence[Branches]) -> bool:
            return max(len(b.ids) for b in branches) > 20

        with failing(Decoder, "branch", too_much, OUT_OF_MEMORY):
            outcomes = run(small.slots(choices=made(small)), samples)
        assert isinstance(outcomes[1], Failure) and outcomes[1].error_type is ErrorType.OOM
        for i in (0, 2, 3):
            check(outcomes[i], want(small, samples[i], own[i] or COLORS), own[i] or COLORS)

    def test_an_accelerator_that_fails_ends_the_run(self, small: Loaded) -> None:
        error = torch.AcceleratorError("device-side assert")
        with (
            failing(Decoder, "branch", lambda *_: True, error),
            pytest.raises(DeviceError),
        ):
            list(small.slots(choices=made(small)).run(small.samples()))

    def test_the_canary_looks_at_what_scoring_computes(
        self, small: Loaded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        branch = Decoder.branch

        def wrong(self: Decoder, branches: Sequence[Branches]) -> torch.Tensor:
            return branch(self, branches).roll(1, dims=-1)

        monkeypatch.setattr(Decoder, "branch", wrong)
        with pytest.raises(ModelError, match="answers differently over slots"):
            list(small.slots(choices=made(small), canary=True).run(small.samples()))


KINDS = [pytest.param("slots", marks=needs_slots), "generate"]


def engine_of(kind: str, small: Loaded, texts: Sequence[str] | None = COLORS) -> Any:
    if kind == "generate":
        return generate(small, texts, max_batch_size=4)
    return small.slots(choices=made(small, texts))


@pytest.mark.parametrize("kind", KINDS)
class TestRows:
    def test_a_row_without_choices_or_room_costs_itself(
        self, small: Loaded, want: Callable[..., list[list[float]]], kind: str
    ) -> None:
        samples = [small.ask(i, ABOUT_ONE, i) for i in range(4)]
        samples[0] = replace(samples[0], choices=COLORS)
        samples[2] = replace(samples[2], choices=("a cat or a dog",), room=2)
        samples[3] = replace(samples[3], choices=("cat",), room=2)
        outcomes = run(engine_of(kind, small, None), samples)
        check(outcomes[0], want(small, samples[0]), COLORS)
        assert [o.error_type for o in outcomes[1:3]] == [
            ErrorType.PROMPT,
            ErrorType.PROMPT_TOO_LONG,
        ]
        assert "no choices" in outcomes[1].message
        assert outcomes[3].text == "cat" and outcomes[3].scores[0].probability == 1

    def test_choices_without_end_are_an_error_of_their_row(
        self, small: Loaded, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(choices, "MAX_TOKENS", 20)
        samples = [small.ask(0, ABOUT_ONE), replace(small.ask(1, ABOUT_ONE), choices=MANY)]
        outcomes = run(engine_of(kind, small, ("cat", "dog")), samples)
        assert isinstance(outcomes[0], Completion)
        assert outcomes[1].error_type is ErrorType.PROMPT
        assert "more than 20 tokens" in outcomes[1].message

    def test_a_token_that_the_model_fails_on_costs_its_row(
        self, small: Loaded, want: Callable[..., list[list[float]]], kind: str
    ) -> None:
        own: list[tuple[str, ...]] = [("cat", "dog"), ("cat", "z"), ("dog", "cat"), ("dog",)]
        (token,) = tokens_of(small, "z")
        samples = [replace(small.ask(i, ABOUT_ONE, i), choices=c) for i, c in enumerate(own)]
        engine = engine_of(kind, small)

        def refuse(module: Any, args: Any) -> None:
            if (args[0] == token).any():
                raise RuntimeError("no")

        model = engine._model
        assert all(token not in s.features["input_ids"] for s in samples)
        handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
        try:
            outcomes = run(engine, samples)
        finally:
            handle.remove()
        assert isinstance(outcomes[1], Failure) and outcomes[1].error_type is ErrorType.ENGINE
        for i in (0, 2, 3):
            check(outcomes[i], want(small, samples[i], own[i]), own[i])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_logits_that_are_no_numbers_cost_their_row(
        self, small: Loaded, kind: str, value: float
    ) -> None:
        own: list[tuple[str, ...]] = [("cat", "dog"), ("cat", "z"), ("dog", "cat")]
        (token,) = tokens_of(small, "z")

        def overflow(module: Any, args: Any, output_BTD: torch.Tensor) -> torch.Tensor:
            return output_BTD.masked_fill((args[0] == token)[..., None], value)

        samples = [replace(small.ask(i, ABOUT_ONE, i), choices=c) for i, c in enumerate(own)]
        engine = engine_of(kind, small)
        handle = engine._model.get_input_embeddings().register_forward_hook(overflow)
        try:
            outcomes = run(engine, samples)
        finally:
            handle.remove()
        assert [isinstance(o, Failure) for o in outcomes] == [False, True, False]
        assert "not finite" in outcomes[1].message

    def test_what_is_typed_like_a_control_token_is_text(self, small: Loaded, kind: str) -> None:
        end = small.processor.tokenizer.eos_token
        (outcome,) = run(engine_of(kind, small, ("cat", f"cat{end}")), [small.ask(0, ABOUT_ONE)])
        # One end, which ends the answer.
        assert outcome.token_ids[-1] in ends(small)
        assert not set(outcome.token_ids[:-1]) & {*ends(small)}
        longer = made(small, (f"cat{end}",)).of(small.ask(0, ABOUT_ONE)).ids[0]
        assert len(longer) > 2 and not {*longer} & {*ends(small)}

    def test_logprobs_are_those_of_the_answers_tokens(
        self, small: Loaded, want: Callable[..., list[list[float]]], kind: str
    ) -> None:
        sample = small.ask(0, ABOUT_ONE, logprobs=True)
        (outcome,) = run(engine_of(kind, small), [sample])
        best = COLORS.index(outcome.text)
        assert outcome.logprobs == pytest.approx(want(small, sample)[best], abs=1e-3)
        assert list(outcome.token_ids) == [*tokens_of(small, outcome.text), ends(small)[0]]

    def test_ids_that_the_repository_suppresses_have_no_probability(
        self, small: Loaded, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        suppressed = tokens_of(small, "z")
        if kind == "generate":
            engine = engine_of(kind, small, ("cat", "z", "dog"))
            monkeypatch.setattr(
                engine._model.generation_config, "suppress_tokens", suppressed, raising=False
            )
        else:
            engine = SlotEngine(
                small.tuned(),
                small.processor.tokenizer,
                BatchingConfig(),
                small.slots()._cfg,
                eos_ids=ends(small),
                suppress_ids=suppressed,
                choices=made(small, ("cat", "z", "dog")),
            )
        alone = replace(small.ask(1, ABOUT_ONE), choices=("z",))
        outcome, none = run(engine, [small.ask(0, ABOUT_ONE), alone])
        assert outcome.scores[1].probability == 0 and outcome.scores[1].logprob == -math.inf
        assert outcome.text != "z"
        assert none.error_type is ErrorType.ENGINE and "none of the row's choices" in none.message


class TestGenerate:
    def test_rows_of_their_own_choices(
        self, small: Loaded, want: Callable[..., list[list[float]]]
    ) -> None:
        lists = [COLORS, ("yes", "no"), ("yes", "yes or no", "word"), MANY, ("dog",)]
        samples = [replace(small.ask(i, ABOUT_ONE, i % 2), choices=lists[i % 5]) for i in range(11)]
        for budget in (16_384, 400):
            engine = generate(small, None, max_batch_tokens=budget)
            for sample, outcome in zip(samples, run(engine, samples), strict=True):
                assert sample.choices is not None
                check(outcome, want(small, sample, sample.choices), sample.choices)

    def test_short_memory_forces_fewer_choices_at_once(
        self, small: Loaded, want: Callable[..., list[list[float]]]
    ) -> None:
        samples = [replace(small.ask(i, ABOUT_ONE, i % 2), choices=MANY) for i in range(3)]

        def too_much(model: Any, ids: torch.Tensor, *args: Any, **how: Any) -> bool:
            return len(ids) > 5

        with failing(forced, "_forward", too_much, OUT_OF_MEMORY) as raised:
            outcomes = run(generate(small), samples)
        for sample, outcome in zip(samples, outcomes, strict=True):
            check(outcome, want(small, sample, MANY), MANY)
        assert raised


class TestTrees:
    @settings(max_examples=200)
    @given(
        ids=st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), min_size=1, max_size=12),
        max_nodes=st.integers(1, 20),
    )
    def test_a_tree_holds_each_choice_and_no_beginning_twice(
        self, ids: list[tuple[int, ...]], max_nodes: int
    ) -> None:
        row = RowChoices(tuple(map(str, range(len(ids)))), tuple(ids))
        trees = row.trees(max_nodes)
        assert sorted(place for tree in trees for place in tree.places) == list(range(len(ids)))
        for tree in [*trees, *(half for whole in trees for half in whole.halves())]:
            beginnings = {ids[p][:n] for p in tree.places for n in range(1, len(ids[p]) + 1)}
            assert len(tree) == len(beginnings)
            for place, path in zip(tree.places, tree.paths, strict=True):
                assert tuple(tree.ids[node] for node in path) == ids[place]
                for before, node in zip([AT_PROMPT, *path], path, strict=False):
                    assert tree.parents[node] == before < node
                    assert {*tree.sees[node].nonzero()[0]} == {*path[: path.index(node) + 1]}
        for tree in trees:
            assert len(tree) <= max_nodes or len(tree.places) == 1 or len(set(tree.paths)) == 1
