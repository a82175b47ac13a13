"""References beside other keywords: the expanded schema takes what the schema takes."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.constraints import merge
from batchvlm.constraints.merge import MergeError, open_references
from batchvlm.constraints.plan import byte_matcher, make_plan
from batchvlm.constraints.rewrite import Rewriter, UnsupportedSchemaError
from batchvlm.forms.schemas import compile_schema
from batchvlm.records import Constraint, Form, FormKind
from tests.constraints.instances import accepts

INNER: list[Any] = [
    *(None, 1, "a", "b", [], ["a"], [1, "a"], {}, {"k": "a"}, {"k": 1}, {"x": {}}),
    *({"k": "a", "x": "b"}, {"z": 1}, {"x": ["a"]}, {"x": {"k": "a"}}),
]
VALUES: list[Any] = [
    *INNER,
    *({"x": value} for value in INNER),
    *({"k": "a", "x": value} for value in INNER),
    *([value] for value in INNER),
    *(["a", "b"], ["a", 1], ["a", "ab"], ["ab", "a"], [1, "ab"]),
]


def one_key(key: str, value: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return value.map(lambda v: {key: v})


NAMES = st.sampled_from(["k", "x"])
REFERENCES = st.sampled_from(["a", "b", "c"]).map(lambda name: {"$ref": f"#/$defs/{name}"})
PLAIN = st.one_of(
    one_key("type", st.sampled_from(["object", "array", "string", "integer"])),
    one_key("enum", st.lists(st.sampled_from(INNER), min_size=1, max_size=4)),
    one_key("required", st.lists(NAMES, min_size=1, max_size=2, unique=True)),
    one_key("minItems", st.integers(0, 2)),
    one_key("maxItems", st.integers(0, 1)),
    one_key("title", st.sampled_from(["A", "B"])),
    st.just({"minLength": 2}),
)
BELOW = st.one_of(REFERENCES, PLAIN, st.just(False), st.just(True))
KEYWORDS = st.one_of(
    PLAIN,
    REFERENCES,
    one_key("properties", st.dictionaries(NAMES, BELOW, min_size=1, max_size=2)),
    one_key("patternProperties", st.dictionaries(st.just("^k"), BELOW, min_size=1)),
    one_key("additionalProperties", BELOW),
    one_key("items", BELOW),
    one_key("prefixItems", st.lists(BELOW, min_size=1, max_size=2)),
    one_key("allOf", st.lists(BELOW, min_size=1, max_size=2)),
    one_key("anyOf", st.lists(BELOW, min_size=1, max_size=2)),
    one_key("oneOf", st.lists(BELOW, min_size=1, max_size=2)),
)
NODES = st.lists(KEYWORDS, min_size=1, max_size=3).map(
    lambda parts: {key: value for part in parts for key, value in part.items()}
)


BESIDE = st.tuples(NODES, REFERENCES).map(lambda both: {**both[0], **both[1]})


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    """A schema of three definitions that refer to one another, with keywords beside."""
    definitions = {}
    for name in "abc":
        node = {key: value for key, value in draw(NODES).items() if key != "$ref"}
        if draw(st.booleans()):
            node["properties"] = {"x": draw(BESIDE), **node.get("properties", {})}
        definitions[name] = node
    return {**draw(BESIDE), "$defs": definitions}


def has_reference_beside(schema: Any, is_name: bool = False) -> bool:
    """Whether a reference has keywords beside it, or is a part of `allOf`."""
    if isinstance(schema, list):
        return any(map(has_reference_beside, schema))
    if not isinstance(schema, dict):
        return False
    if not is_name and "$ref" in schema and len(schema) > 1:
        return True
    if not is_name and any("$ref" in p for p in schema.get("allOf", []) if isinstance(p, dict)):
        return True
    return any(
        has_reference_beside(part, not is_name and key in ("properties", "patternProperties"))
        for key, part in schema.items()
        if is_name or key not in ("enum", "const")
    )


def takes(validator: Any, value: Any) -> bool | None:
    """Whether a value is valid; None if the schema consists of itself, which says nothing."""
    try:
        return bool(validator.is_valid(value))
    except RecursionError:
        return None


def check(schema: dict[str, Any]) -> None:
    rewritten = Rewriter(schema, is_lenient=False, splits_one_of=False).rewrite()
    opened = open_references(rewritten)
    before, after = compile_schema(json.dumps(rewritten)), compile_schema(json.dumps(opened))
    if takes(before, None) is None:
        return
    if opened is not False:
        assert not has_reference_beside({k: v for k, v in opened.items() if k != "$defs"})
        assert not any(map(has_reference_beside, opened.get("$defs", {}).values()))
    for value in VALUES:
        assert takes(after, value) == takes(before, value), (value, rewritten, opened)


@settings(max_examples=150, derandomize=True)
@given(schemas())
def test_the_expanded_schema_takes_what_the_schema_takes(schema: dict[str, Any]) -> None:
    with suppress(UnsupportedSchemaError, MergeError, RecursionError):
        check(schema)


SHORT = {"maxLength": 1}
OF_PATTERNS = {"properties": {"x": {"type": "string"}}, "patternProperties": {"^k": SHORT}}


@pytest.mark.parametrize(
    ("beside", "definition"),
    [
        ({"additionalProperties": {"type": "string"}}, OF_PATTERNS),
        ({"additionalProperties": False, **OF_PATTERNS}, {"properties": {"k": True}}),
        ({"properties": {"k": True}, "additionalProperties": False}, OF_PATTERNS),
        ({"properties": {"x": {"const": "b"}}, "patternProperties": {"^k": True}}, OF_PATTERNS),
        ({"patternProperties": {"^x": {"const": "b"}}}, OF_PATTERNS),
        ({"prefixItems": [{"type": "string"}], "items": False}, {"items": {"maxLength": 1}}),
        ({"prefixItems": [True, SHORT]}, {"prefixItems": [{"type": "integer"}], "items": SHORT}),
        (
            {"oneOf": [{"required": ["k"]}, {"required": ["x"]}]},
            {"oneOf": [{"required": ["z"]}, {}]},
        ),
        ({"anyOf": [{"required": ["k"]}, {"type": "array"}]}, {"anyOf": [{"maxItems": 0}, False]}),
        ({"properties": {"x": {"$ref": "#/$defs/a", "type": "array"}}}, {"enum": ["a", {"x": []}]}),
    ],
)
def test_keywords_beside_a_reference(beside: dict[str, Any], definition: dict[str, Any]) -> None:
    check({**beside, "$ref": "#/$defs/a", "$defs": {"a": definition}})
    check({**definition, "$ref": "#/$defs/a", "$defs": {"a": beside}})


@pytest.mark.parametrize(
    ("definition", "good", "bad"),
    [
        # What is beside the reference has no `patternProperties` of its own that let `k` off.
        (
            {
                "type": ["object", "string"],
                "properties": {"x": {"additionalProperties": {"type": "string"}}},
                "patternProperties": {"^k": True},
            },
            {"x": {"k": "a"}},
            {"x": {"k": 1}},
        ),
        # `items` beside the reference also means the first one.
        (
            {
                "type": ["array", "integer"],
                "prefixItems": [{"items": {"type": "integer"}}],
            },
            [[1]],
            [[[1]]],
        ),
    ],
)
def test_what_a_keyword_applies_to_is_that_of_its_own_schema(
    definition: dict[str, Any], good: Any, bad: Any
) -> None:
    (inner,) = definition.get("prefixItems") or definition["properties"].values()
    inner["$ref"] = "#/$defs/a"
    schema = {"$ref": "#/$defs/a", "$defs": {"a": definition}}
    plan = make_plan(Form(FormKind.JSON_SCHEMA, json.dumps(schema)))
    assert plan.constraint is Constraint.STRICT, plan.notes
    first = byte_matcher(plan.grammar or "")
    assert accepts(first, good, schema) and not accepts(first, bad, schema)


def test_values_are_equal_as_in_json() -> None:
    parts = [{"enum": [1, True, "a", [1]]}, {"enum": [1.0, "a", [True]]}]
    assert open_references({"allOf": parts})["$defs"]["m0"]["enum"] == [1, "a"]


def test_what_grows_beyond_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MergeError, match="consists of itself"):
        open_references(
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a", "type": "object"}}}
        )
    one = {"anyOf": [{"required": ["k"]}, {"required": ["x"]}]}
    both = {"allOf": [one, {"anyOf": [*one["anyOf"]]}]}
    assert len(open_references(both)["$defs"]["m0"]["anyOf"]) == 4
    monkeypatch.setattr(merge, "_MAX_BRANCHES", 3)
    with pytest.raises(MergeError, match="too many alternatives"):
        open_references(both)
    monkeypatch.setattr(merge, "_MAX_PLACES", 0)
    with pytest.raises(MergeError, match="too many references"):
        open_references(both)
