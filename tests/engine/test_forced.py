"""Tokens that a grammar forces: several of a row in one step, and the answers of single steps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from batchvlm.config import BatchingConfig
from batchvlm.constraints.constraints import Constraints
from batchvlm.constraints.masks import apply_mask
from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.forward.layout import Newest, Span
from batchvlm.engine.generate import GenerateEngine, eos_ids
from batchvlm.engine.sampling import RowSampler
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.records import Completion, FinishReason, Form, FormKind, Generation, Sample

from .families import FAMILIES, Family, needs_slots
from .faulty import OUT_OF_MEMORY, failing
from .loaded import ABOUT_NONE, ABOUT_ONE, ABOUT_ONE_SMALL, Loaded
from .outcomes import run

pytestmark = needs_slots

WORD = {"type": "string", "enum": ["dog", "cat", "fox"]}
KEYS = ("describe the image", "the quick brown fox", "explain_the_difference")


def schema_of(i: int) -> str:
    """Schemas with long keys, and texts that are known from the start."""
    properties: dict[str, Any] = {
        f"{KEYS[i % 3]} {i}": WORD,
        "about": {"const": "these two images and the lazy dog " * (1 + i % 4)},
        "number": {"type": "integer", "minimum": 0, "maximum": 9 + 10 * (i % 2)},
    }
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


def constraints_of(loaded: Loaded, form: Form | None = None) -> Constraints:
    return Constraints(
        loaded.processor.tokenizer,
        num_ids=loaded.model.get_output_embeddings().weight.shape[0],
        eos_ids=eos_ids(loaded.model, loaded.processor.tokenizer),
        device=torch.device("cpu"),
        form=form,
    )


@pytest.fixture
def held(small: Loaded) -> Iterator[Constraints]:
    constraints = constraints_of(small)
    yield constraints
    constraints.close()


def rows(loaded: Loaded, num: int, **generation: Any) -> list[Sample]:
    settings = {"max_new_tokens": 200, "temperature": 1.0, **generation}
    asked = [loaded.ask(i, ABOUT_ONE, i % 2, **settings) for i in range(num)]
    return [
        replace(s, json_schema=schema_of(i), generation=replace(s.generation, seed=i))
        for i, s in enumerate(asked)
    ]


def engine_of(loaded: Loaded, constraints: Constraints, **cfg: Any) -> SlotEngine:
    return loaded.slots(constraints=constraints, **cfg)


def by_steps(loaded: Loaded, constraints: Constraints, **cfg: Any) -> SlotEngine:
    """A step for each token, as it was before any were forced."""
    engine = engine_of(loaded, constraints, **cfg)
    engine._decoding.max_run = 0
    return engine


def ids_of(outcomes: Sequence[Any]) -> list[tuple[int, ...]]:
    assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes
    return [outcome.token_ids for outcome in outcomes]


@pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES if not family.why_not_slots_here],
    ids=lambda family: family.name,
)
class TestFamilies:
    def test_a_step_of_several_tokens_is_as_many_steps(
        self, family: Family, load_once: Callable[[Family], Loaded]
    ) -> None:
        """The logits after the last token of each slot, and what the slots then hold."""
        loaded = load_once(family)
        constraints = constraints_of(loaded)
        samples = [replace(s, json_schema=None) for s in rows(loaded, 5, temperature=0.0)]
        constraints.close()
        draw = random.Random(0)
        runs = {1: [draw.randrange(256) for _ in range(5)], 2: [7], 4: [9, 9]}
        first = [draw.randrange(256) for _ in samples]
        found = []
        for is_at_once in (True, False):
            engine = loaded.slots(eos=[])
            decoder, cache, newest = slots_with(engine, samples, first)
            places_N = newest.positions_N
            spans = spans_over(len(samples), int(places_N.max()) + 8)
            if is_at_once:
                logits_BV = decoder.step(cache, newest, spans, runs)
            else:
                logits_BV = decoder.step(cache, newest, spans).clone()
                for n in range(5):
                    more = [slot for slot, run_ids in runs.items() if n < len(run_ids)]
                    for slot in more:
                        newest.ids_N[slot] = runs[slot][n]
                        places_N[slot] += 1
                    again = decoder.step(cache, newest, spans)
                    logits_BV[more] = again[more]
            held = [cache.row(slot, int(places_N[slot])).layers for slot in range(len(samples))]
            found.append((logits_BV, held))
        (one, one_held), (other, other_held) = found
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
        for slot, run_ids in runs.items():
            assert one_held[slot][0][0].shape[1] + len(run_ids) == other_held[slot][0][0].shape[1]


def slots_with(
    engine: SlotEngine, samples: Sequence[Sample], ids: Sequence[int]
) -> tuple[Decoder, Any, Newest]:
    """Slots that hold the prompts of these rows, each followed by one token."""
    from batchvlm.engine.forward.cache import SlotCache

    engine._prefill.add(samples)
    prefilled: list[Any] = []
    while engine._prefill.num_waiting:
        prefilled += engine._prefill.next_pack(engine._streams, is_alone=True)
    prefilled.sort(key=lambda row: row.sample.row_index)
    lengths = [len(row.prompt) for row in prefilled]
    cache = SlotCache(prefilled[0].pieces[0], num_slots=len(prefilled), length=max(lengths) + 8)
    for slot, row in enumerate(prefilled):
        cache.put(slot, row.pieces)
    deltas = torch.tensor([row.prompt.rope_delta for row in prefilled])
    return engine._decoder, cache, Newest(torch.tensor(ids), torch.tensor(lengths), deltas)


def spans_over(num_slots: int, length: int) -> list[Any]:
    middle = num_slots // 2
    return [Span(0, middle, length), Span(middle, num_slots, length)]


KINDS = {
    "roomy": {},
    "tight": {"max_slots": 3, "sort_window": 5, "max_prefill_tokens": 40},
    "alone": {"max_slots": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_say_what_they_say_step_by_step_and_by_generate(
    small: Loaded, held: Constraints, kind: str
) -> None:
    samples = rows(small, 14)
    # Rows of other lengths beside them, free ones, and some that are cut within a run.
    free = [small.ask(20 + i, ABOUT_NONE, max_new_tokens=3 * i + 1) for i in range(4)]
    short = [
        replace(s, row_index=30 + i, generation=replace(s.generation, max_new_tokens=2 + 3 * i))
        for i, s in enumerate(rows(small, 6))
    ]
    mixed = [*samples, *free, *short]
    random.Random(0).shuffle(mixed)
    one = engine_of(small, held, **KINDS[kind])
    outcomes = run(one, mixed)
    other = by_steps(small, held, **KINDS[kind])
    assert outcomes_alike(outcomes, run(other, mixed))
    delayed = engine_of(small, held, max_slots=4)
    delayed._lag = 1  # as on a GPU, where nothing is forced in one go
    assert outcomes_alike(outcomes, run(delayed, mixed))
    assert delayed.stats.forced_tokens == 0
    padded = GenerateEngine(
        small.own(),
        small.processor.tokenizer,
        BatchingConfig(max_batch_size=8),
        constraints=held,
    )
    assert outcomes_alike(outcomes, run(padded, mixed))
    for outcome, sample in zip(outcomes, mixed, strict=True):
        assert len(outcome.token_ids) <= sample.generation.max_new_tokens
        if sample.json_schema and outcome.finish_reason is FinishReason.STOP:
            assert json.loads(outcome.text)["about"].startswith("these two images")
    # More than half of these answers is known from the start.
    assert one.stats.row_steps < 0.5 * other.stats.row_steps
    saved = other.stats.row_steps - one.stats.row_steps
    assert 0 <= one.stats.forced_tokens - saved <= len(mixed)


def outcomes_alike(some: Sequence[Any], others: Sequence[Any]) -> bool:
    kept = [
        [(o.token_ids, o.text, o.finish_reason, o.constraint, o.logprobs) for o in outcomes]
        for outcomes in (some, others)
    ]
    return kept[0] == kept[1]


def test_rows_that_ask_for_more_than_a_text_take_steps(small: Loaded, held: Constraints) -> None:
    for settings in ({"logprobs": True}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.5}):
        samples = rows(small, 4, **settings)
        engine = engine_of(small, held)
        outcomes = run(engine, samples)
        assert engine.stats.forced_tokens == 0
        wanted = run(by_steps(small, held), samples)
        assert ids_of(outcomes) == ids_of(wanted)
        if "logprobs" in settings:
            assert all(len(o.logprobs) == len(o.token_ids) for o in outcomes)


def test_a_stop_string_within_forced_text_ends_the_answer(small: Loaded, held: Constraints) -> None:
    samples = rows(small, 4, stop=("two images",))
    outcomes = run(engine_of(small, held), samples)
    for outcome in outcomes:
        assert outcome.finish_reason is FinishReason.STOP
        assert outcome.text.endswith('"these ')
    assert outcomes_alike(outcomes, run(by_steps(small, held), samples))


def test_every_token_is_told(small: Loaded, held: Constraints) -> None:
    engine = engine_of(small, held)
    told: dict[int, list[int]] = {}
    engine.on_token = lambda row, token: told.setdefault(row, []).append(token)
    samples = rows(small, 3)
    ends = {*eos_ids(small.model, small.processor.tokenizer)}
    for sample, ids in zip(samples, ids_of(run(engine, samples)), strict=True):
        # The end of an answer that is whole is nobody's token.
        assert told[sample.row_index] == [token for token in ids if token not in ends]


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_text_that_reads_like_a_control_token_is_not_said_by_it(small: Loaded, name: str) -> None:
    tokenizer = small.processor.tokenizer
    end = getattr(tokenizer, name)
    form = Form(FormKind.JSON_SCHEMA, json.dumps({"const": f"a dog {end} and a cat"}))
    constraints = constraints_of(small, form)
    try:
        (sample,) = rows(small, 1)
        (outcome,) = run(engine_of(small, constraints), [replace(sample, json_schema=None)])
    finally:
        constraints.close()
    assert outcome.finish_reason is FinishReason.STOP
    assert json.loads(outcome.text) == f"a dog {end} and a cat"
    assert not {*outcome.token_ids[:-1]} & {*tokenizer.all_special_ids}


@pytest.mark.parametrize("most", [1, 3])
def test_steps_that_fail_are_halved_with_their_runs(
    small: Loaded, held: Constraints, most: int, no_collection: None
) -> None:
    samples = rows(small, 9)
    wanted = run(by_steps(small, held), samples)

    def too_much(self: Any, cache: Any, *args: Any, **kwargs: Any) -> bool:
        return sum(span.stop - span.start for span in args[1]) > most

    engine = engine_of(small, held)
    with failing(Decoder, "step", too_much, OUT_OF_MEMORY) as raised:
        outcomes = run(engine, samples)
    assert raised and engine.stats.forced_tokens
    assert outcomes_alike(outcomes, wanted)


def test_a_mask_lets_pass_the_forced_token_alone(small: Loaded) -> None:
    constraints = constraints_of(small, Form(FormKind.CHOICE, '["the quick brown fox"]'))
    try:
        sample = small.ask(0, ABOUT_ONE_SMALL)
        row, free = constraints.begin(sample), None
        tokens = small.processor.tokenizer("the quick brown fox")["input_ids"]
        assert row is not None
        for token in tokens:
            mask_BW = constraints.take([row, free])
            assert mask_BW is not None
            allowed = apply_mask(torch.zeros(2, 400), mask_BW).isfinite()
            assert allowed[0].nonzero()[:, 0].tolist() == [token]
            assert allowed[1].sum() > 300
            row.commit(token)
        assert row.must_end and not row.forced
    finally:
        constraints.close()


def test_a_sampler_goes_on_as_if_it_had_chosen() -> None:
    logits_BV = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 50)))
    drawn = []
    for has_skipped in (True, False):
        sampler = RowSampler(2, eos_ids=(0,), device=torch.device("cpu"))
        sampler.admit(1, Generation(max_new_tokens=9, temperature=1.0, seed=5), np.zeros(1, int))
        if has_skipped:
            sampler.skip(1, 3)
        else:
            for _ in range(3):
                sampler.choose(logits_BV, [1])
        drawn.append([int(sampler.choose(logits_BV, [1]).ids_B) for _ in range(6)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1
