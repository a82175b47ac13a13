"""The column `parsed`: one type for the whole run, and what it cannot hold."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.output.schema import output_schema
from batchvlm.output.typed import UnfitError, parsed_column
from batchvlm.records import Form, FormKind

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": "integer"},
        "price": {"type": ["number", "null"]},
        "kind": {"enum": ["a", "b", None]},
        "is_new": {"type": "boolean"},
        "day": {"type": "string", "format": "date"},
        "at": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}},
        "tags": {"type": "object", "additionalProperties": {"type": "string"}},
        "tree": {"$ref": "#/$defs/tree"},
        "any": {},
    },
    "$defs": {
        "part": {"type": "object", "properties": {"size": {"type": "integer"}}},
        "tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}},
    },
}


def column(schema: Any) -> Any:
    return parsed_column(Form(FormKind.JSON_SCHEMA, json.dumps(schema)), is_by_row=False)


def test_the_type_of_a_schema() -> None:
    parsed = column(SCHEMA)
    assert parsed.type == pa.struct(
        [
            ("name", pa.string()),
            ("count", pa.int64()),
            ("price", pa.float64()),
            ("kind", pa.string()),
            ("is_new", pa.bool_()),
            ("day", pa.date32()),
            ("at", pa.timestamp("us", tz="UTC")),
            ("parts", pa.list_(pa.struct([("size", pa.int64())]))),
            ("tags", pa.string()),
            ("tree", pa.struct([("left", pa.string())])),
            ("any", pa.string()),
        ]
    )
    assert [note.split()[0] for note in parsed.notes] == ["$.tags", "$.tree.left", "$.any"]


def test_a_value_of_the_schema() -> None:
    value = {
        "name": "x",
        "count": 3.0,
        "price": 2,
        "day": "2024-02-29",
        "at": "2024-01-01T01:00:00+01:00",
        "parts": [{"size": 1}, {}],
        "tags": {"b": "c"},
        "tree": {"left": {"left": {}}},
        "any": [1, "é"],
    }
    fitted = column(SCHEMA).fit(json.dumps(value))
    array = pa.array([fitted, None], type=column(SCHEMA).type)
    (row, none) = array.to_pylist()
    assert none is None
    assert row == {
        "name": "x",
        "count": 3,
        "price": 2.0,
        "kind": None,
        "is_new": None,
        "day": date(2024, 2, 29),
        "at": datetime(2024, 1, 1, tzinfo=UTC),
        "parts": [{"size": 1}, {"size": None}],
        "tags": '{"b":"c"}',
        "tree": {"left": '{"left":{}}'},
        "any": '[1,"é"]',
    }


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"count": 2**63}, "$.count"),
        ({"count": -(10**30)}, "$.count"),
        ({"price": 10**400}, "$.price"),
        ({"parts": [{}, {"size": 2**70}]}, "$.parts[1].size"),
        ({"day": "0000-01-01"}, "$.day"),
        ({"at": "2024-12-31T23:59:60Z"}, "$.at"),
    ],
)
def test_a_value_beyond_its_type_is_named(value: Any, field: str) -> None:
    with pytest.raises(UnfitError) as caught:
        column(SCHEMA).fit(json.dumps(value))
    assert str(caught.value).startswith(f"{field} ")


ANYTHING = ["abc", 5, 1.5, True, None, [], ["a"], {}, {"a": 1}, 10**400]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "string"},
        {"type": "string", "format": "date"},
        {"type": "string", "format": "date-time"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "object", "properties": {"a": {"type": "string"}}},
        {"properties": {"a": {"type": "string"}}},
    ],
    ids=str,
)
def test_a_value_of_another_type_is_named_too(part: Any) -> None:
    """Whatever a validator lets through; a text is not compared with all numbers of 64 bits."""
    parsed = column({"type": "object", "properties": {"v": part}})
    for value in ANYTHING:
        try:
            held = parsed.fit(json.dumps({"v": value}))
        except UnfitError as error:
            assert str(error).startswith("$.v")
        else:
            assert len(pa.array([held], type=parsed.type)) == 1


@pytest.mark.parametrize(
    "part",
    [
        {"anyOf": [{"type": "integer"}, {}]},
        {"oneOf": [{"type": "integer"}, {}], "anyOf": [{}, True]},
        {"anyOf": [{"type": "string", "format": "date"}, True]},
        {"anyOf": [{"type": "array", "items": {"type": "string"}}, {}]},
        {"type": "array", "prefixItems": [{"type": "string"}]},
        {"type": "array", "prefixItems": [{"type": "number"}], "items": {"type": "string"}},
    ],
    ids=str,
)
def test_what_may_be_anything_is_json_text(part: Any) -> None:
    parsed = column({"type": "object", "properties": {"v": part}})
    assert parsed.type.field("v").type == pa.string()
    assert parsed.notes[0].startswith("$.v ")
    for value in ANYTHING:
        held = parsed.fit(json.dumps({"v": value}))["v"]
        assert value is None if held is None else json.loads(held) == value


def test_a_tuple_of_one_type_that_ends_is_a_list() -> None:
    pair = [{"type": "integer"}, {"type": "integer"}]
    for end in ({"maxItems": 2}, {"items": False}, {"items": {"type": "integer"}}):
        assert column({"type": "array", "prefixItems": pair, **end}).type == pa.list_(pa.int64())
    old = {"type": "array", "items": pair}
    assert column(old | {"additionalItems": False}).type == pa.list_(pa.int64())
    assert column(old).type == pa.string()


TEXT = {
    "type": "object",
    "properties": {"kind": {"const": "text"}, "value": {"type": "string"}},
}
TABLE = {
    "type": "object",
    "properties": {
        "kind": {"const": "table"},
        "value": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


@pytest.mark.parametrize("choices", [[TEXT, TABLE], [TABLE, TEXT]], ids=["text", "table"])
def test_alternatives_of_which_one_holds_json_text_are_json_text(choices: Any) -> None:
    """As pydantic writes `list[Text | Table]`."""
    blocks = {"type": "array", "items": {"anyOf": choices}}
    parsed = column({"type": "object", "properties": {"blocks": blocks}})
    value = [{"kind": "text", "value": "x"}, {"kind": "table", "value": {"a": "b"}}]
    held = parsed.fit(json.dumps({"blocks": value}))["blocks"]
    assert json.loads(held) == value
    assert parsed.notes == ("$.blocks (alternatives of several types)",)


def test_properties_beside_alternatives_are_kept() -> None:
    kinds = [{"properties": {"kind": {"const": kind}}} for kind in "ab"]
    own = {"kind": {"type": "string"}, "amount": {"type": "number"}}
    for alternatives in (kinds, [*kinds, {"required": ["amount"]}], [{"oneOf": kinds}, True]):
        for name in ("anyOf", "oneOf"):
            parsed = column({"type": "object", "properties": own, name: alternatives})
            assert parsed.type == pa.struct([("kind", pa.string()), ("amount", pa.float64())])
            value = {"kind": "a", "amount": 3.5}
            assert parsed.fit(json.dumps(value)) == value


@pytest.mark.parametrize(
    "part",
    [
        {"anyOf": [{"properties": {"b": {"type": "string"}}}, {}]},
        {"anyOf": [{"$ref": "#/$defs/more"}, {"required": ["a"]}]},
        {"anyOf": [{"anyOf": [{"allOf": [{"$ref": "#/$defs/more"}]}]}]},
        {"if": {"required": ["a"]}, "then": {"$ref": "#/$defs/more"}},
        {"allOf": [{"if": {"required": ["a"]}, "else": {"properties": {"b": {}}}}]},
        {"dependentSchemas": {"a": {"$ref": "#/$defs/more"}}},
        {"dependencies": {"a": {"$ref": "#/$defs/more"}}},
    ],
    ids=["as it is", "reference", "nested", "then", "else", "dependent", "dependency"],
)
def test_properties_of_some_values_alone_are_kept_as_json_text(part: Any) -> None:
    parsed = column(
        {
            "properties": {"a": {"type": "string"}},
            "$defs": {"more": {"properties": {"b": {"type": "integer"}}}},
            **part,
        }
    )
    assert parsed.type == pa.string()
    assert "properties in one alternative alone" in parsed.notes[0]


def test_conditions_on_declared_properties_leave_the_type() -> None:
    own = {"a": {"type": "string"}, "b": {"type": "integer"}}
    condition = {"if": {"required": ["a"]}, "then": {"properties": {"b": {"minimum": 1}}}}
    dependent = {"dependencies": {"a": ["b"]}}
    for part in (condition, dependent):
        parsed = column({"properties": own, **part})
        assert parsed.type == pa.struct([("a", pa.string()), ("b", pa.int64())])


def test_a_property_that_two_parts_declare_is_what_both_say() -> None:
    parts = [{"properties": {"a": {"type": "integer"}}}, {"properties": {"a": {"minimum": 5}}}]
    for all_of in (parts, parts[::-1]):
        assert column({"allOf": all_of}).type == pa.struct([("a", pa.int64())])
    size = {"properties": {"a": {"$ref": "#/$defs/size"}}}
    twice = {"allOf": [size, size], "$defs": {"size": {"type": "integer"}}}
    assert column(twice).type == pa.struct([("a", pa.int64())])


def test_alternatives_that_lead_back_are_json_text() -> None:
    parsed = column({"properties": {"a": {"type": "string"}}, "anyOf": [{"$ref": "#"}]})
    assert parsed.type == pa.string()


def test_alternatives_without_number_are_json_text() -> None:
    levels = {
        f"l{level}": {
            "properties": {"a": {"type": "string"}},
            "anyOf": [{"$ref": f"#/$defs/l{level + 1}"}] * 2,
        }
        for level in range(14)
    }
    levels["l14"] = {"properties": {"a": {"type": "string"}}}
    parsed = column({"$ref": "#/$defs/l0", "$defs": levels})
    assert parsed.type == pa.string()
    assert "more than 10000 alternatives" in parsed.notes[0]


def test_alternatives_that_hold_the_same_json_text_keep_their_type() -> None:
    parsed = column({"type": "object", "properties": {"block": {"oneOf": [TABLE, TABLE]}}})
    assert parsed.type.field("block").type == pa.struct(
        [("kind", pa.string()), ("value", pa.string())]
    )
    assert parsed.notes == ("$.block.value (properties of any name)",)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({}, "any types"),
        ({"type": "object"}, "properties of any name"),
        ({"type": ["string", "integer"]}, "2 types"),
        ({"$ref": "#"}, "contains itself"),
        ({"type": "array"}, "items of any type"),
        ({"enum": ["a", 1]}, "values of several types"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "alternatives of several types"),
    ],
)
def test_what_no_type_holds_is_json_text_and_says_so(schema: Any, reason: str) -> None:
    parsed = column(schema)
    assert parsed.type == pa.string()
    assert reason in parsed.notes[0]
    assert parsed.fit('{"a":1}') == '{"a":1}'


def test_choices_are_a_dictionary_and_forms_of_rows_are_text() -> None:
    choice = Form(FormKind.CHOICE, '["red", "blue"]')
    parsed = parsed_column(choice, is_by_row=False)
    assert parsed.type == pa.dictionary(pa.int32(), pa.string())
    assert parsed.fit('"red"') == "red"
    assert parsed_column(choice, is_by_row=True).type == pa.string()
    assert parsed_column(Form(FormKind.REGEX, "a+"), is_by_row=False).fit('"aa"') == "aa"


def test_parquet_gives_the_type_back(tmp_path: Any) -> None:
    for form in (SCHEMA, {"type": "integer"}, {"type": "array", "items": {"enum": ["a"]}}):
        schema = output_schema([], constraint=True, parsed=column(form).type)
        path = tmp_path / "one.parquet"
        # Several row groups, which nested dictionaries do not survive.
        with pq.ParquetWriter(path, schema) as writer:
            for _ in range(2):
                writer.write_table(schema.empty_table())
        assert pq.read_table(path).schema.field("parsed").type == schema.field("parsed").type


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)
LEAVES = st.sampled_from(
    [
        {"type": "string"},
        {"type": "integer"},
        {"type": ["number", "null"]},
        {"enum": ["a", None]},
        {"type": "string", "format": "date"},
        {},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(lambda i: {"type": "array", "items": i}, inner)
        | st.builds(
            lambda p: {"type": "object", "properties": p},
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        )
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(SCHEMAS, st.lists(JSON_VALUES, max_size=4))
def test_whatever_is_valid_is_held_or_named(schema: Any, values: list[Any]) -> None:
    """Never an exception but the one, and never a value that Arrow then refuses."""
    from batchvlm.forms.schemas import why_invalid

    parsed = column(schema)
    held = []
    for value in values:
        if why_invalid(value, json.dumps(schema)) is None:
            try:
                held.append(parsed.fit(json.dumps(value)))
            except UnfitError as error:
                assert str(error).startswith("$")
    assert len(pa.array(held, type=parsed.type)) == len(held)
