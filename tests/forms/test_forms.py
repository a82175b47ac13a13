"""`task.output` as the form of an answer, and outlines' types as forms."""

from __future__ import annotations

import enum
import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from batchvlm.config import TaskOutputConfig
from batchvlm.errors import ConfigError
from batchvlm.forms.forms import form_of_type, run_form
from batchvlm.forms.schemas import why_no_match
from batchvlm.records import Form, FormKind


def form(**output: Any) -> Form | None:
    return run_form(TaskOutputConfig(**output))


def test_each_setting() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert form() is None
    # In the order of the schema, which answers follow.
    assert form(json_schema=schema) == Form(FormKind.JSON_SCHEMA, json.dumps(schema))
    assert form(json_schema="any") == Form(FormKind.JSON_SCHEMA, '{"type": "object"}')
    assert form(choice=["no", "yes"]) == Form(FormKind.CHOICE, '["no", "yes"]')
    assert form(regex="[ab]+") == Form(FormKind.REGEX, "[ab]+")
    assert form(grammar='start: "a"') == Form(FormKind.GRAMMAR, 'start: "a"')
    assert form(type="integer") == Form(FormKind.JSON_SCHEMA, '{"type": "integer"}')


def test_a_date_is_written_in_ascii_digits() -> None:
    date = form(type="date")
    assert date is not None and date.kind is FormKind.REGEX
    assert why_no_match("2024-02-28", date.text) is None
    assert why_no_match("२०२४-02-28", date.text)


def test_a_grammar_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "g.lark"
    path.write_text('start: "a"\n')
    assert form(grammar=str(path)) == Form(FormKind.GRAMMAR, 'start: "a"\n')


def test_a_pydantic_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from pydantic import BaseModel\nclass Animal(BaseModel):\n    legs: int\n    name: str\n"
    )
    (tmp_path / "animals_of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = form(pydantic="animals_of_a_test:Animal")
    assert found is not None and found.kind is FormKind.JSON_SCHEMA
    assert list(json.loads(found.text)["properties"]) == ["legs", "name"]
    del sys.modules["animals_of_a_test"]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Pydantic takes both")
def test_a_typed_dict_of_typing_is_told_where_to_take_it_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in (("old", "typing"), ("new", "typing_extensions")):
        code = f"from {module} import TypedDict\nclass Animal(TypedDict):\n    legs: int\n"
        (tmp_path / f"{name}_dict_of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"Python 3\.12.*from typing_extensions import TypedDict"):
        form(pydantic="old_dict_of_a_test:Animal")
    assert form(pydantic="new_dict_of_a_test:Animal") is not None
    for name in ("old", "new"):
        del sys.modules[f"{name}_dict_of_a_test"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"pydantic": "json"}, "must be written module:Class"),
        ({"pydantic": "no_such_module:X"}, "cannot be imported"),
        ({"pydantic": "json:nothing"}, "cannot be imported"),
        ({"pydantic": "json:JSONDecoder"}, "is no type of an answer"),
        ({"type": "nothing"}, "is no named type; there are integer"),
        (
            {"type": "intger"},
            r"mean integer\? there are integer, number, boolean, string, bic",
        ),
        ({"grammar": "nowhere.lark"}, "cannot be read"),
        ({"json_schema": {"type": 3}}, "not a valid JSON schema"),
        (
            {"json_schema": {"properties": {"a": {"$ref": "#/$defs/x"}}}},
            r"\$ref .* cannot be resolved",
        ),
        ({"json_schema": {"$ref": "#/a", "a": {"not": {"$ref": "#b"}}}}, "'#b' cannot be resolved"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/a.json"}}, r"\$ref .* cannot be resolved"),
        ({"regex": "["}, "task.output.regex is no regular expression: unterminated"),
        ({"grammar": "start: foo"}, "task.output.grammar is no grammar: .*foo"),
        ({"grammar": 'begin: "a"'}, "task.output.grammar is no grammar"),
    ],
)
def test_what_is_no_form_is_refused(output: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        form(**output)


def test_references_that_lead_somewhere() -> None:
    tree = {"properties": {"left": {"$ref": "#"}, "right": {"$ref": "#/properties/left"}}}
    named = {"$ref": "#x", "$defs": {"a": {"$anchor": "x", "enum": [{"$ref": "#/nowhere"}]}}}
    meta = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    inner = {"$id": "http://x/a", "$defs": {"b": {}}, "items": {"$ref": "#/$defs/b"}}
    for schema in (tree, named, meta, {"properties": {"$ref": {"type": "string"}}, "not": inner}):
        assert form(json_schema=schema) is not None


class Color(enum.Enum):
    red = "red"
    blue = "blue"


def test_types_of_outlines() -> None:
    from outlines.types import CFG, Choice, JsonSchema, Regex

    schema = '{"type": "object", "properties": {}}'
    assert form_of_type(JsonSchema(schema)) == Form(FormKind.JSON_SCHEMA, schema)
    assert form_of_type(Choice(["a", "b"])) == Form(FormKind.CHOICE, '["a", "b"]')
    assert form_of_type(Literal["a", "b"]) == Form(FormKind.CHOICE, '["a", "b"]')
    assert form_of_type(Color) == Form(FormKind.CHOICE, '["red", "blue"]')
    assert form_of_type(CFG('start: "a"')) == Form(FormKind.GRAMMAR, 'start: "a"')
    assert form_of_type(Regex("[ab]{2}")).kind is FormKind.REGEX
    assert form_of_type(bool).kind is FormKind.REGEX


def test_files_that_a_schema_refers_to_become_part_of_it(tmp_path: Path) -> None:
    inner = {"definitions": {"leg": {"type": "integer", "maximum": 9}}, "$id": "http://x/y"}
    middle = {"type": "array", "items": {"$ref": "sub/inner.json#/definitions/leg"}}
    outer = {
        "properties": {"a": {"$ref": "middle.json"}, "b": {"$ref": "#/$defs/c"}},
        "$defs": {"c": {"$ref": "middle.json#/items"}},
    }
    (tmp_path / "sub").mkdir()
    for name, schema in (("outer", outer), ("middle", middle), ("sub/inner", inner)):
        (tmp_path / f"{name}.json").write_text(json.dumps(schema))
    from batchvlm.forms.schemas import why_invalid

    found = form(json_schema=str(tmp_path / "outer.json"))
    assert found is not None
    assert why_invalid({"a": [1, 9], "b": 9}, found.text) is None
    assert why_invalid({"a": [10]}, found.text)
    assert why_invalid({"b": 10}, found.text)
    # Nothing of where the files lie: the next machine has them elsewhere.
    assert str(tmp_path) not in found.text
