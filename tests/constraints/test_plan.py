"""Grammars held against `jsonschema`: drawn schemas, every value and every beginning of one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.constraints.plan import Plan, byte_matcher, fits, make_plan
from batchvlm.forms.schemas import compile_schema
from batchvlm.records import Constraint, Form, FormKind
from tests.constraints.instances import accepts

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 1.5, "", "a", "ab", "b"),
    *([], [0], [0, "a"], ["a", "b"], ["a", "a"], [1, 2, 1]),
    *({}, {"a": 0}, {"a": "b"}, {"b": 1}, {"a": 0, "b": 1}, {"a": 1, "b": "a", "c": None}),
]
NAMES = st.sampled_from(["a", "b", "c"])
TYPES = st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])


def one_key(key: str, value: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return value.map(lambda v: {key: v})


LEAVES = st.one_of(
    one_key("type", TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True)),
    one_key("enum", st.lists(st.sampled_from(VALUES), min_size=1, max_size=4)),
    one_key("const", st.sampled_from(VALUES)),
    one_key("minimum", st.integers(-1, 2)),
    one_key("exclusiveMaximum", st.integers(0, 2)),
    one_key("minLength", st.integers(0, 2)),
    one_key("maxLength", st.integers(0, 2)),
    one_key("pattern", st.sampled_from(["^a", "b$", "^(?:a|b)$", "^(?!a)", "^[^a]*$"])),
    one_key("minItems", st.integers(0, 2)),
    one_key("maxItems", st.integers(0, 2)),
    one_key("required", st.lists(NAMES, min_size=1, max_size=2, unique=True)),
    one_key("dependentRequired", st.dictionaries(NAMES, st.lists(NAMES, max_size=1), max_size=1)),
    one_key("minProperties", st.integers(0, 2)),
    one_key("maxProperties", st.integers(0, 2)),
)


def wider(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(LEAVES, inner).map(lambda both: {**both[0], **both[1]}),
        one_key("properties", st.dictionaries(NAMES, inner, min_size=1, max_size=2)),
        one_key("additionalProperties", inner | st.just(False)),
        one_key("items", inner),
        one_key("prefixItems", some),
        one_key("allOf", some),
        one_key("anyOf", some),
        one_key("oneOf", some),
        one_key("not", inner),
        st.tuples(inner, inner, inner).map(lambda i: {"if": i[0], "then": i[1], "else": i[2]}),
        one_key("dependentSchemas", st.dictionaries(NAMES, inner, max_size=1)),
    )


SCHEMAS = st.recursive(LEAVES, wider, max_leaves=6)


def plan_of(schema: Any) -> Plan:
    return make_plan(Form(FormKind.JSON_SCHEMA, json.dumps(schema)))


# The same schemas each time: a change of a library shows when it is made, not some other day.
@settings(max_examples=250, derandomize=True)
@given(SCHEMAS)
def test_a_strict_grammar_takes_what_is_valid_and_nothing_else(schema: dict[str, Any]) -> None:
    plan = plan_of(schema)
    if plan.constraint is not Constraint.STRICT or plan.grammar is None:
        return
    validator = compile_schema(json.dumps(schema))
    first = byte_matcher(plan.grammar)
    for value in VALUES:
        assert accepts(first, value, schema) == validator.is_valid(value), (value, plan)


@settings(max_examples=120, derandomize=True)
@given(SCHEMAS)
def test_every_beginning_is_that_of_a_valid_answer(schema: dict[str, Any]) -> None:
    """Byte by byte: what may come next is what comes next in some valid value, no more, no less."""
    whole = {"allOf": [{"enum": VALUES}, schema]}
    plan = plan_of(whole)
    if plan.constraint is not Constraint.STRICT or plan.grammar is None:
        return
    validator = compile_schema(json.dumps(whole))
    texts = {json.dumps(v, separators=(",", ":")).encode() for v in VALUES if validator.is_valid(v)}
    first = byte_matcher(plan.grammar)
    beginnings = {text[:n] for text in texts for n in range(len(text) + 1)}
    for beginning in beginnings:
        matcher = first.deep_copy()
        assert matcher.try_consume_tokens(list(beginning)) == len(beginning)
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        may_follow = {byte for byte in range(256) if mask >> byte & 1}
        if beginning.endswith((b",", b":")):
            may_follow.discard(ord(" "))  # room for one, which these texts do not take
        longer = [t for t in texts if t.startswith(beginning) and len(t) > len(beginning)]
        assert may_follow == {text[len(beginning)] for text in longer}, (beginning, plan)
        assert matcher.is_accepting() == (beginning in texts)


@pytest.mark.parametrize(
    ("schema", "left_out"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"not": {"patternProperties": {"a": {"type": "string"}}}, "type": ["object", "null"]}, ""),
        ({"type": "string", "pattern": r"^(?=.*a)b"}, "pattern"),
        ({"type": "string", "format": "regex"}, "format regex"),
        ({"type": "object", "propertyNames": {"$ref": "#"}}, "propertyNames"),
    ],
)
def test_what_cannot_be_said_is_left_out_by_name(schema: Any, left_out: str) -> None:
    plan = plan_of(schema)
    assert plan.constraint is Constraint.LENIENT
    assert left_out in " ".join(plan.notes)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True, "maxItems": 1},
        {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b", "c"]}},
        {"type": "string", "format": "some-format-of-their-own"},
        {"type": "string", "pattern": r"^\W\D\S\/[[&]$"},
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "id": "#x",
            "minimum": 0,
            "exclusiveMinimum": True,
        },
        {"type": "string", "pattern": r"^\<\w{,3}\>{}$"},
        # As pydantic writes `set[Colour]` and `dict[Colour, int]`.
        {"uniqueItems": True, "items": {"$ref": "#/$defs/c"}, "$defs": {"c": {"enum": ["a", "b"]}}},
        {"propertyNames": {"$ref": "#/$defs/c"}, "$defs": {"c": {"enum": ["a"]}}},
        {"$ref": "#/definitions/a", "definitions": {"a": {"$ref": "#b"}, "b": {"$anchor": "b"}}},
    ],
)
def test_what_looks_hard_and_is_said_exactly(schema: Any) -> None:
    plan = plan_of(schema)
    assert plan.constraint is Constraint.STRICT, plan.notes


@pytest.mark.parametrize(
    ("schema", "left_out"),
    [
        ({"type": "number", "maximum": 1.7976931348623157e308}, "maximum"),
        ({"type": "number", "multipleOf": 1e-12}, "multipleOf"),
        ({"type": "integer", "minimum": 10**30}, "minimum"),
        ({"type": "string", "maxLength": (1 << 63) - 1}, "maxLength"),
        ({"type": "string", "pattern": "a$b|c"}, "pattern"),
    ],
)
def test_what_the_compiler_refuses_costs_itself_and_not_the_rest(
    schema: Any, left_out: str
) -> None:
    whole = {"properties": {"a": schema, "b": {"enum": ["x", "y"]}}, "required": ["b"]}
    plan = plan_of({"type": "object", **whole})
    assert plan.constraint is Constraint.LENIENT
    assert plan.notes[-1] == f"left to validation: {left_out}"
    first = byte_matcher(plan.grammar or "")
    assert accepts(first, {"b": "x"}, whole) and not accepts(first, {"b": "z"}, whole)


@pytest.mark.parametrize(
    ("bounds", "good", "bad"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, [0.5, 0.25, 1e-3], [0, 0.6]),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, [1.25, 1.01], [1, 1.5]),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, [-1.5, -1.01], [-1, -1.6]),
        ({"exclusiveMaximum": 2}, [1.9, 1.99], [2]),
        ({"type": "integer", "exclusiveMinimum": 0}, [1], [0]),
        ({"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}, [-3, 5], [1 << 63]),
    ],
)
def test_bounds_of_numbers(bounds: Any, good: list[Any], bad: list[Any]) -> None:
    schema = {"type": "number", **bounds}
    plan = plan_of(schema)
    assert plan.constraint is Constraint.STRICT, plan.notes
    first = byte_matcher(plan.grammar or "")
    assert all(accepts(first, value, schema) for value in good)
    assert not any(accepts(first, value, schema) for value in bad)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 1, "enum": [True, 1.0, 2]},
        {"const": [1], "enum": [[True], [1.0]]},
        {"$ref": "#/$defs/a", "enum": [1.0, 2], "$defs": {"a": {"enum": [1, True, 3]}}},
        {"oneOf": [{"enum": [1, 2]}, {"enum": [1.0, True]}]},
    ],
)
def test_values_are_equal_as_in_json_where_one_is_no_truth_value(schema: Any) -> None:
    plan = plan_of(schema)
    assert plan.constraint is Constraint.STRICT, plan.notes
    first, validator = byte_matcher(plan.grammar or ""), compile_schema(json.dumps(schema))
    for value in (1, True, 2, 3, [1], [True]):
        assert accepts(first, value, schema) == validator.is_valid(value), value


PART = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "array", "items": PART}, [0.25], [0]),
        ({"type": "array", "prefixItems": [PART]}, [0.25], [0]),
        ({"type": "object", "properties": {"a": PART}}, {"a": 0.25}, {"a": 0}),
        ({"type": "object", "patternProperties": {"^a$": PART}}, {"a": 0.25}, {"a": 0}),
        ({"type": "object", "additionalProperties": PART}, {"a": 0.25}, {"a": 0}),
        ({"anyOf": [{"type": "null"}, PART]}, 0.25, 0),
        ({"type": "array", "items": {"$ref": "#/$defs/a"}, "$defs": {"a": PART}}, [0.25], [0]),
    ],
)
def test_bounds_of_numbers_wherever_they_stand(schema: Any, good: Any, bad: Any) -> None:
    plan = plan_of(schema)
    assert plan.constraint is Constraint.STRICT, plan.notes
    first = byte_matcher(plan.grammar or "")
    assert accepts(first, good, schema) and not accepts(first, bad, schema)


@pytest.mark.parametrize(
    "schema",
    [
        *({"pattern": rf"^{part}$"} for part in (r"[^\w]", r"[^\d.]", r"[^\s-]", r"\W", r"[\S]")),
        {"not": {"pattern": "^a$"}},
        {"pattern": "^(?!a$)"},
    ],
    ids=str,
)
def test_no_text_is_taken_that_python_takes_for_something_else(schema: Any) -> None:
    """All alphabets have letters and digits, and a last line's end is none to `$`."""
    plan = plan_of({"type": "string", **schema})
    assert plan.constraint is Constraint.STRICT, plan.notes
    first, validator = byte_matcher(plan.grammar or ""), compile_schema(json.dumps(schema))
    for text in ["é", "٣", "三", "½", "\x1c", "\u3000", "a", "a\n", "!", "."]:
        assert not accepts(first, text, schema) or validator.is_valid(text), text
    assert accepts(first, "!", schema)


def test_an_object_of_many_optional_properties_does_not_break_off() -> None:
    names = [f"property-{i:03d}" for i in range(900)]
    plan = plan_of({"type": "object", "properties": {n: {"type": "integer"} for n in names}})
    assert plan.constraint is Constraint.STRICT
    matcher = byte_matcher(plan.grammar or "")
    text = b'{"property-007":1,"property-899":2}'
    for byte in text:
        matcher.compute_bitmask()  # which is what has limits
        assert matcher.consume_token(byte), matcher.get_error()
    assert matcher.is_accepting()


def test_recursion_beside_other_keywords() -> None:
    """Which the compiler of grammars refuses, and real schemas are full of."""
    node = {
        "type": "object",
        "properties": {"kind": {"enum": ["leaf", "pair"]}},
        "required": ["kind"],
        "anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/pair"}],
    }
    schema = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": node,
            "leaf": {"properties": {"kind": {"const": "leaf"}, "value": {"type": "integer"}}},
            "pair": {
                "properties": {
                    "kind": {"const": "pair"},
                    "one": {"$ref": "#/$defs/node", "description": "of two"},
                },
                "required": ["one"],
            },
        },
    }
    plan = plan_of(schema)
    assert plan.constraint is Constraint.STRICT, plan.notes
    first = byte_matcher(plan.grammar or "")
    leaf = {"kind": "leaf", "value": 3}
    assert accepts(first, {"kind": "pair", "one": {"kind": "pair", "one": leaf}}, schema)
    assert not accepts(first, {"kind": "pair", "one": {"kind": "pair", "one": 3}}, schema)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (Form(FormKind.CHOICE, '["no", "not \\"sure\\""]'), ["no", 'not "sure"'], ["not", ""]),
        (Form(FormKind.REGEX, r"^a|b\$$"), ["a", "b$"], ["ab", ""]),
        (Form(FormKind.REGEX, r"\w+"), ["Zoë", "a_1"], ["", "-", "e\u0301"]),
        (Form(FormKind.REGEX, r"\<\d{,2}\>|{}"), ["<>", "<12>", "{}"], ["<123>", ""]),
        (Form(FormKind.GRAMMAR, 'start: "(" start ")" | "x"'), ["((x))"], ["((x)", "y"]),
    ],
)
def test_other_forms(form: Form, good: list[str], bad: list[str]) -> None:
    assert make_plan(form).constraint is Constraint.STRICT
    assert all(fits(form, text) for text in good)
    assert not any(fits(form, text) for text in bad)


def test_blanks_do_not_fill_an_answer() -> None:
    plan = plan_of({"type": "array", "items": {"type": "integer"}})
    for text, is_taken in (("[1,2]", True), ("[1, 2]", True), ("[1,  2]", False), ("[ 1]", False)):
        matcher = byte_matcher(plan.grammar or "")
        assert (matcher.try_consume_tokens(list(text.encode())) == len(text)) == is_taken
