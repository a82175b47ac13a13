"""Rows held to their forms: each to its own, whoever comes, goes or moves beside it."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from batchvlm.config import BatchingConfig
from batchvlm.constraints.constraints import Constraints
from batchvlm.constraints.masks import apply_mask
from batchvlm.engine.generate import GenerateEngine, eos_ids
from batchvlm.engine.protocol import Engine
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.forms.schemas import why_invalid
from batchvlm.records import Completion, Constraint, Failure, FinishReason, Form, FormKind, Sample

from .loaded import ABOUT_ONE, Loaded
from .outcomes import run

COLORS = {"type": "string", "enum": ["red", "green", "blue"]}


def schema_of(i: int) -> dict[str, Any]:
    """Fifty schemas, no two of them alike; an answer to each is short."""
    part = [
        {"type": "integer", "minimum": i, "maximum": i + 3},
        {"type": "array", "items": COLORS, "minItems": 1, "maxItems": 1 + i % 3},
        {"type": ["boolean", "null"]},
        {"type": "string", "pattern": f"^[a-{chr(ord('b') + i % 20)}]{{1,4}}$"},
        {"oneOf": [COLORS, {"type": "object", "properties": {}, "additionalProperties": False}]},
    ][i % 5]
    return {
        "type": "object",
        "properties": {f"k{i}": part, "also": {"type": "boolean"}},
        "required": [f"k{i}"],
        "additionalProperties": False,
    }


@pytest.fixture
def hold(small: Loaded) -> Iterator[Callable[..., Constraints]]:
    """Makes constraints for the small model, and ends them."""
    made: list[Constraints] = []

    def make(form: Form | None = None, **settings: Any) -> Constraints:
        made.append(
            Constraints(
                small.processor.tokenizer,
                num_ids=small.model.get_output_embeddings().weight.shape[0],
                eos_ids=eos_ids(small.model, small.processor.tokenizer),
                device=torch.device("cpu"),
                form=form,
                **settings,
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def slots(small: Loaded, constraints: Constraints, *, lag: int = 0, **settings: Any) -> SlotEngine:
    engine = small.slots(constraints=constraints, **settings)
    engine._lag = lag
    return engine


def generate(small: Loaded, constraints: Constraints) -> GenerateEngine:
    tokenizer = small.processor.tokenizer
    return GenerateEngine(
        small.own(), tokenizer, BatchingConfig(max_batch_size=16), constraints=constraints
    )


def rows(small: Loaded, num: int, **generation: Any) -> list[Sample]:
    settings = {"max_new_tokens": 200, "temperature": 1.0, **generation}
    asked = [small.ask(i, ABOUT_ONE, i % 2, **settings) for i in range(num)]
    return [replace(s, generation=replace(s.generation, seed=i)) for i, s in enumerate(asked)]


@pytest.mark.parametrize("kind", ["roomy", "tight", "behind", "generate"])
def test_rows_of_fifty_schemas_in_one_batch_each_fit_their_own(
    small: Loaded, hold: Callable[..., Constraints], kind: str
) -> None:
    constraints = hold()
    engines: dict[str, Callable[[], Engine]] = {
        "roomy": lambda: slots(small, constraints),
        "tight": lambda: slots(small, constraints, max_slots=7, sort_window=9),
        # As on a GPU, where a step starts before the tokens of the last one are read.
        "behind": lambda: slots(small, constraints, lag=1, max_slots=16),
        "generate": lambda: generate(small, constraints),
    }
    schemas = [json.dumps(schema_of(i)) for i in range(50)]
    samples = [replace(s, json_schema=schemas[i]) for i, s in enumerate(rows(small, 50))]
    # Some rows are free, and a free row's answer is that of a run without constraints.
    free = [small.ask(50 + i, ABOUT_ONE, max_new_tokens=5) for i in range(5)]
    mixed = [*samples, *free]
    random.Random(0).shuffle(mixed)
    by_row = {o.row_index: o for o in run(engines[kind](), mixed)}
    for i, schema in enumerate(schemas):
        completion = by_row[i]
        assert completion.finish_reason is FinishReason.STOP
        assert completion.constraint is Constraint.STRICT
        assert why_invalid(json.loads(completion.text), schema) is None, completion.text
    for sample in free:
        completion = by_row[sample.row_index]
        assert completion.constraint is None
        assert list(completion.token_ids) == small.known(ABOUT_ONE)[:5]


def test_engines_and_batches_draw_the_same(small: Loaded, hold: Callable[..., Constraints]) -> None:
    constraints = hold()
    samples = [
        replace(s, json_schema=json.dumps(schema_of(i))) for i, s in enumerate(rows(small, 12))
    ]
    one, two, three = (
        [completion.text for completion in run(engine, samples)]
        for engine in (
            slots(small, constraints),
            slots(small, constraints, lag=1, max_slots=3),
            generate(small, constraints),
        )
    )
    assert one == two == three


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (Form(FormKind.CHOICE, '["no", "not sure", "yes \\"maybe\\"", "ja / oui"]'), None),
        (Form(FormKind.REGEX, r"^[0-9]{2}-[a-c]+$"), r"[0-9]{2}-[a-c]+"),
        (Form(FormKind.GRAMMAR, 'start: "a" start "b" | "c"'), r"a*cb*"),
    ],
)
def test_choices_patterns_and_grammars(
    small: Loaded, hold: Callable[..., Constraints], form: Form, pattern: str | None
) -> None:
    import re

    constraints = hold(form)
    texts = set()
    for completion in run(slots(small, constraints), rows(small, 24)):
        assert isinstance(completion, Completion)
        if completion.finish_reason is FinishReason.STOP:
            texts.add(completion.text)
    assert len(texts) > 1
    for text in texts:
        if pattern is None:
            assert text in json.loads(form.text)
        else:
            assert re.fullmatch(pattern, text), text


def test_a_rows_own_choices_come_before_the_run(
    small: Loaded, hold: Callable[..., Constraints]
) -> None:
    constraints = hold(Form(FormKind.CHOICE, '["red", "blue"]'))
    first, second = rows(small, 2)
    outcomes = run(slots(small, constraints), [first, replace(second, choices=("seven",))])
    assert outcomes[0].text in ("red", "blue")
    assert outcomes[1].text == "seven"


def test_an_answer_that_is_whole_ends_without_a_step_for_its_end(
    small: Loaded, hold: Callable[..., Constraints]
) -> None:
    constraints = hold(Form(FormKind.CHOICE, '["a cat or a dog"]'))
    engine = slots(small, constraints)
    (completion,) = run(engine, rows(small, 1))
    assert completion.token_ids[-1] in eos_ids(small.model, small.processor.tokenizer)
    assert completion.text == "a cat or a dog"
    # All of it was forced: what the prompt's last token did not say was said without the model.
    assert engine.stats.row_steps == 0
    assert engine.stats.forced_tokens == len(completion.token_ids) - 2
    # Its probability was asked for, so it is computed.
    engine = slots(small, constraints)
    (completion,) = run(engine, rows(small, 1, logprobs=True))
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids)
    assert engine.stats.row_steps == len(completion.token_ids) - 1


def test_an_answer_cut_at_its_limit_says_so(
    small: Loaded, hold: Callable[..., Constraints]
) -> None:
    schema = {"type": "array", "items": COLORS, "minItems": 50}
    constraints = hold(Form(FormKind.JSON_SCHEMA, json.dumps(schema)))
    (completion,) = run(slots(small, constraints), rows(small, 1, max_new_tokens=9))
    assert completion.finish_reason is FinishReason.LENGTH
    assert len(completion.token_ids) == 9
    assert completion.constraint is Constraint.STRICT


def test_the_least_number_of_tokens_does_not_break_a_form(
    small: Loaded, hold: Callable[..., Constraints]
) -> None:
    constraints = hold(Form(FormKind.CHOICE, '["a", "b"]'))
    for completion in run(slots(small, constraints), rows(small, 4, min_new_tokens=20)):
        assert completion.text in ("a", "b")


def hostile_schemas() -> dict[str, Any]:
    doubled: dict[str, Any] = {"$ref": "#/$defs/n0", "$defs": {}}
    for i in range(40):
        both = [{"$ref": f"#/$defs/n{i + 1}"}, {"$ref": f"#/$defs/n{i + 1}"}]
        doubled["$defs"][f"n{i}"] = {
            "type": "object",
            "properties": {"a": both[0], "b": both[1]},
            "allOf": both,
        }
    doubled["$defs"]["n40"] = {"type": "object"}
    deep: Any = {"type": "integer"}
    for _ in range(300):
        deep = {"type": "array", "items": deep, "minItems": 1, "maxItems": 1}
    wide = {
        "type": "object",
        "properties": {
            f"key-{i:05d}": {"type": "string", "description": "x"} for i in range(20_000)
        },
    }
    combined = {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(8)]}
            for i in range(12)
        ]
    }
    return {
        "doubled": doubled,
        "itself": {"$ref": "#"},
        "deep": deep,
        "wide": wide,
        "combined": combined,
        "nowhere": {"$ref": "#/$defs/none"},
        "pattern": {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
        # Refused by llguidance, so that they come to xgrammar.
        "wide and overlapping": OVERLAPPING
        | {
            "properties": {f"k{i}": {"type": "string"} for i in range(5_000)},
            "maxProperties": 5_001,
        },
        "long and overlapping": OVERLAPPING
        | {
            "properties": {
                "color": {"type": "array", "items": COLORS, "minItems": 10**5, "maxItems": 10**9}
            }
        },
        "deep and overlapping": OVERLAPPING | {"properties": {"color": deep}},
    }


# llguidance wants patterns of properties that cannot overlap.
OVERLAPPING = {
    "type": "object",
    "properties": {"color": COLORS},
    "patternProperties": {"a": {"type": "integer"}, "^.b": {"type": "integer"}},
    "required": ["color"],
    "maxProperties": 1,
    "additionalProperties": False,
}
LOOSE = {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}, "maxItems": 2}
NOWHERE = {"$ref": "#/none"}


@pytest.mark.parametrize("kind", ["tight", "behind", "generate"])
def test_rows_of_all_four_kinds_in_one_batch(
    small: Loaded, hold: Callable[..., Constraints], kind: str
) -> None:
    constraints = hold()
    engines: dict[str, Callable[[], Engine]] = {
        "tight": lambda: slots(small, constraints, max_slots=7, sort_window=9),
        "behind": lambda: slots(small, constraints, lag=1, max_slots=16),
        "generate": lambda: generate(small, constraints),
    }
    schemas = [json.dumps(s) for s in (schema_of(0), LOOSE, OVERLAPPING, NOWHERE)]
    wanted = [Constraint.STRICT, Constraint.LENIENT, Constraint.XGRAMMAR, Constraint.NONE]
    samples = [
        replace(s, json_schema=schemas[i % 4])
        for i, s in enumerate(rows(small, 32, max_new_tokens=60))
    ]
    num_held = 0
    for i, outcome in enumerate(run(engines[kind](), samples)):
        assert isinstance(outcome, Completion)
        assert outcome.constraint is wanted[i % 4]
        if i % 4 < 3 and outcome.finish_reason is FinishReason.STOP:
            num_held += 1
            assert i % 4 == 1 or why_invalid(json.loads(outcome.text), schemas[i % 4]) is None
    assert num_held > 20
    assert constraints.num_rows == dict.fromkeys(wanted, 8)


def test_a_row_that_xgrammar_holds_draws_the_same_in_every_engine(
    small: Loaded, hold: Callable[..., Constraints]
) -> None:
    constraints = hold(Form(FormKind.JSON_SCHEMA, json.dumps(OVERLAPPING)))
    one, two = (
        [completion.text for completion in run(engine, rows(small, 6))]
        for engine in (slots(small, constraints, max_slots=2), generate(small, constraints))
    )
    assert one == two
    assert len(set(one)) > 1


def test_without_xgrammar_the_chain_goes_on_to_none_and_says_so_once(
    small: Loaded,
    hold: Callable[..., Constraints],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "xgrammar" else find_spec(name)
    )
    constraints = hold()
    other = OVERLAPPING | {"title": "Another"}
    samples = [
        replace(s, json_schema=json.dumps((OVERLAPPING, other)[i % 2]))
        for i, s in enumerate(rows(small, 4, max_new_tokens=5))
    ]
    for outcome in run(slots(small, constraints), samples):
        assert outcome.constraint is Constraint.NONE
    assert [record.message.count("batchvlm[xgrammar]") for record in caplog.records] == [1]


def test_special_tokens_and_ids_of_no_token_are_masked_from_xgrammar_too(
    small: Loaded, hold: Callable[..., Constraints]
) -> None:
    """Within a string it would take the text of one for text."""
    free_text = OVERLAPPING | {"properties": {"color": {"type": "string"}}}
    constraints = hold(Form(FormKind.JSON_SCHEMA, json.dumps(free_text)))
    (sample,) = rows(small, 1)
    row = constraints.begin(sample)
    assert row is not None and row.constraint is Constraint.XGRAMMAR
    tokenizer = small.processor.tokenizer
    for token in tokenizer('{"color":"', add_special_tokens=False)["input_ids"]:
        row.commit(token)
    mask_1W = constraints.take([row])
    assert mask_1W is not None and row.is_held
    num_ids = small.model.get_output_embeddings().weight.shape[0]
    is_free = apply_mask(torch.zeros(1, num_ids), mask_1W)[0].isfinite()
    free = set(is_free.nonzero()[:, 0].tolist())
    assert len(free) > 20
    assert not free & set(tokenizer.all_special_ids)
    assert free <= set(tokenizer.get_vocab().values())


@pytest.mark.soak
def test_hostile_schemas_cost_their_own_rows_alone(
    small: Loaded, hold: Callable[..., Constraints]
) -> None:
    constraints = hold()
    hostile = [json.dumps(schema) for schema in hostile_schemas().values()]
    samples = rows(small, 2 * len(hostile), max_new_tokens=60)
    mixed: Sequence[Sample] = [
        replace(s, json_schema=hostile[i // 2] if i % 2 else json.dumps(schema_of(i)))
        for i, s in enumerate(samples)
    ]
    outcomes = run(slots(small, constraints, max_slots=4), mixed)
    for i, outcome in enumerate(outcomes):
        assert isinstance(outcome, Completion), outcome
        if i % 2 == 0:
            assert outcome.constraint is Constraint.STRICT
            assert why_invalid(json.loads(outcome.text), json.dumps(schema_of(i))) is None


def test_a_strict_run_refuses_rows_that_cannot_be_held_to_the_letter(
    small: Loaded, hold: Callable[..., Constraints]
) -> None:
    constraints = hold(is_strict=True)
    loose = json.dumps({"type": "array", "uniqueItems": True})
    first, second = rows(small, 2)
    samples = [
        replace(first, json_schema=loose),
        replace(second, json_schema=json.dumps(schema_of(0))),
    ]
    for engine in (slots(small, constraints), generate(small, constraints)):
        outcomes = run(engine, samples)
        assert isinstance(outcomes[0], Failure)
        assert "uniqueItems" in outcomes[0].message
        assert outcomes[1].constraint is Constraint.STRICT
