"""Schemas are read, checked, and never fetch anything."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from batchvlm.errors import ConfigError
from batchvlm.forms import schemas
from batchvlm.forms.schemas import InvalidSchemaError, compile_schema, read_schema, why_invalid

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def test_from_a_file_or_inline(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    path.write_text(json.dumps(POINT))
    assert read_schema(str(path), "s") == read_schema(POINT, "s")
    assert json.loads(read_schema(POINT, "s")) == POINT


def test_what_is_no_schema(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    files = (str(path), str(tmp_path / "none.json"), str(tmp_path), "\0.json")
    for schema in (*files, {"type": "nonsense"}):
        with pytest.raises(ConfigError, match=r"^task.output.json_schema"):
            read_schema(schema, "task.output.json_schema")
    for text in ("", "[]", "3", '{"properties": 3}', "[" * 100_000):
        with pytest.raises(InvalidSchemaError):
            compile_schema(text)


def test_a_broken_schema_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    path.write_text('{"properties": {"a/b": {"type": "nonsense"}}}')
    with pytest.raises(ConfigError) as caught:
        read_schema(str(path), "task.output.json_schema")
    start = f"task.output.json_schema={path}: not a valid JSON schema at /properties/a~1b/type: "
    assert str(caught.value).startswith(start)


def test_a_mark_before_a_schema_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"$ref": "b.json"}', encoding="utf-8-sig")
    (tmp_path / "b.json").write_text('{"type": "integer"}', encoding="utf-8-sig")
    assert why_invalid("x", read_schema(str(tmp_path / "a.json"), "s")) is not None


def test_references_of_a_file_are_its_own(tmp_path: Path) -> None:
    """Whatever address it gives itself, and beside a definition of the same name."""
    (tmp_path / "part.json").write_text(
        json.dumps(
            {
                "$id": "https://example.com/part.json",
                "properties": {"size": {"$ref": "#/$defs/size"}, "next": {"$ref": "#"}},
                "$defs": {"size": {"type": "integer"}},
            }
        )
    )
    path = tmp_path / "whole.json"
    path.write_text(
        json.dumps({"$ref": "part.json", "$defs": {"size": {"type": "string"}, "flag": True}})
    )
    schema = read_schema(str(path), "s")
    assert why_invalid({"size": 1, "next": {"size": 2}}, schema) is None
    assert (
        why_invalid({"next": {"size": "2"}}, schema) == "$.next.size: '2' is not of type 'integer'"
    )


def test_a_reference_within_what_only_a_reference_leads_to_is_checked_too() -> None:
    parts = {"a": {"$ref": "#/parts/b"}, "b": {"items": {"$ref": "#/parts/c"}}}
    with pytest.raises(ConfigError, match=r"s: \$ref '#/parts/c' cannot be resolved"):
        read_schema({"$ref": "#/parts/a", "parts": parts}, "s")
    read_schema({"$ref": "#/parts/a", "parts": {**parts, "c": {"$ref": "#/parts/a"}}}, "s")


@pytest.mark.parametrize("name", ["a" * 300, "file:" + "a" * 5000, "a\0b.json", "\ud800.json"])
def test_a_reference_that_can_be_no_file_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^s: .*\$ref.* (resolved|'uri-reference')$"):
        read_schema({"properties": {"a": {"$ref": name}}}, "s")


def test_why_invalid_names_the_place() -> None:
    schema = json.dumps(POINT)
    assert why_invalid({"x": 1}, schema) is None
    assert why_invalid({"x": "1"}, schema) == "$.x: '1' is not of type 'integer'"
    assert "required" in str(why_invalid({}, schema))


def test_the_schemas_own_draft_and_formats() -> None:
    draft4 = {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3}
    exclusive = draft4 | {"exclusiveMaximum": True}
    assert why_invalid(3, json.dumps(draft4)) is None
    assert why_invalid(3, json.dumps(exclusive)) is not None
    date = json.dumps({"type": "string", "format": "date"})
    assert why_invalid("2026-02-30", date) is not None


@pytest.mark.parametrize(
    "draft", ["", *(f"http://json-schema.org/draft-0{n}/schema#" for n in (4, 7))]
)
def test_multiples_are_those_of_the_numbers_as_written(draft: str) -> None:
    named = {"$schema": draft} if draft else {}
    tree = {"properties": {"price": {"multipleOf": 0.01}, "inner": {"$ref": "#"}}}
    schema = json.dumps(named | tree)
    for cents in range(1000):
        assert why_invalid({"inner": {"price": cents / 100}}, schema) is None
    for wrong in (0.005, 1.001, 1e-300, -0.015):
        message = why_invalid({"inner": {"price": wrong}}, schema)
        assert message == f"$.inner.price: {wrong} is not a multiple of 0.01"
    for right in (3, 10**400, -2.5, "0.005", True, None):
        assert why_invalid({"price": right}, schema) is None
    assert why_invalid(7, '{"multipleOf": 2}') == "$: 7 is not a multiple of 2"


def test_a_reference_is_never_fetched(tmp_path: Path) -> None:
    secret = tmp_path / "schema.json"
    secret.write_text('{"type": "integer"}')
    for ref in (secret.as_uri(), "http://127.0.0.1:9/schema.json"):
        assert "is not in it" in str(why_invalid(1, json.dumps({"$ref": ref})))


def test_a_schema_that_cannot_be_applied_is_an_answer_too() -> None:
    assert "cannot be applied" in str(why_invalid("a", '{"pattern": "(?<bad"}'))
    endless = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    assert "cannot be applied" in str(why_invalid(1, json.dumps(endless)))


SLOW_PATTERN = {"pattern": "^(a+)+$"}
# Each definition asks for the next one twice: 2^40 questions about one value.
SLOW_REFERENCES = {
    "$defs": {
        **{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)},
        "d40": {"type": "null"},
    },
    "$ref": "#/$defs/d0",
}


@pytest.mark.parametrize(
    ("schema", "value"), [(SLOW_PATTERN, "a" * 60 + "b"), (SLOW_REFERENCES, "x")]
)
def test_a_schema_that_takes_ages_is_given_up(
    schema: dict[str, Any], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's own schema must not stop the run: it would stop there again after each restart."""
    monkeypatch.setattr(schemas, "MAX_CHECK_S", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    reason = why_invalid(value, json.dumps(schema))
    assert reason == "the schema cannot be applied: it takes longer than 0.2 s"
    assert why_invalid({"x": 1}, json.dumps(POINT)) is None
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_clock_that_was_running_goes_on() -> None:
    rung = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rung.set())
    try:
        # With what is left of its time.
        signal.setitimer(signal.ITIMER_REAL, 3600)
        assert why_invalid({"x": 1}, json.dumps(POINT)) is None
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 60
        assert not rung.is_set()
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert why_invalid({"x": 1}, json.dumps(POINT)) is None
        end = time.monotonic() + 10
        while not rung.is_set() and time.monotonic() < end:
            time.sleep(0.01)
        assert rung.is_set()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_thread_checks_too() -> None:
    """Signals reach the main thread alone; elsewhere there is no limit, and no error either."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(why_invalid({}, json.dumps(POINT))))
    thread.start()
    thread.join()
    assert "required" in str(found[0])
