"""A row's values in a template: strict, and as text alone."""

from __future__ import annotations

from typing import Any

import pytest

from batchvlm.errors import ConfigError, ErrorType, RowError
from batchvlm.prompts.templates import Template


@pytest.mark.parametrize(
    "source",
    ["{{ q | trim }}", "{{ 'Q: ' ~ q }}", "{{ q | upper }}", "{{ [q] | join }}", "{{ row.q }}"],
)
def test_no_road_leads_a_null_into_the_prompt(source: str) -> None:
    with pytest.raises(RowError, match="null"):
        Template(source, "task.prompt").render({"q": None})


def test_a_null_can_be_asked_for() -> None:
    source = (
        "{% if q is none %}no{% else %}yes{% endif %}{% if q == none %}no{% endif %}{{ q or 1 }}"
    )
    assert Template(source, "task.prompt").render({"q": None}) == "nono1"
    assert Template("{{ row.q }}", "task.prompt").columns == {"q"}


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("{{ question }}", {"question": b"What is it?"}),
        ("{{ 'Q: ' ~ question }}", {"question": b"What is it?"}),
        ("{{ tags }}", {"tags": [b"a"]}),
        ("{{ tags }}", {"tags": ["a", None]}),
        ("{{ tags | join(', ') }}", {"tags": ["a", None]}),
        ("{{ meta.title | trim }}", {"meta": {"title": None}}),
        ("{{ meta.title | tojson }}", {"meta": {"title": None}}),
        ("{{ row }}", {"row": "hello"}),
        ("{{ [row] }}", {"question": "What?"}),
        ("{{ row.items }}", {"question": "What?"}),
        ("{{ question.upper }}", {"question": "What?"}),
        ("{% for name in row %}{{ row[name] }}{% endfor %}", {"question": b"What?"}),
    ],
)
def test_no_python_gets_into_the_prompt(source: str, values: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        Template(source, "task.prompt").render(values)
    assert caught.value.error_type is ErrorType.PROMPT
    assert "RowError" not in caught.value.message


@pytest.mark.parametrize(
    ("source", "values", "text"),
    [
        ("{{ row.items }}", {"items": "apples"}, "apples"),
        ("{{ order.items }} {{ order['keys'] }}", {"order": {"items": 3, "keys": 4}}, "3 4"),
        ("{% for k, v in order.items() %}{{ k }}={{ v }}{% endfor %}", {"order": {"a": 1}}, "a=1"),
        ("{{ question.decode() }}", {"question": b"What?"}, "What?"),
        ("{{ meta | tojson }}", {"meta": {"title": None, "n": [None, 1]}}, None),
        ("{{ tags | reject('none') | join }}", {"tags": ["a", None]}, "a"),
        ("{{ meta.title or 'none' }}", {"meta": {"title": None}}, "none"),
        ("{{ tags }}", {"tags": ["a", 1]}, "['a', 1]"),
    ],
)
def test_what_values_of_values_come_to(
    source: str, values: dict[str, Any], text: str | None
) -> None:
    wanted = '{"n": [null, 1], "title": null}' if text is None else text
    assert Template(source, "task.prompt").render(values) == wanted


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        ("{% for row in table %}{{ row.a }} {% endfor %}", {"table"}),
        ("{% for row in row.table %}{{ row.a }}{% else %}{{ row.b }}{% endfor %}", {"table", "b"}),
        ("{% for i, row in t %}{{ row['a'] }}{% endfor %}{{ row['c d'] }}", {"t", "c d"}),
        ("{% with row = row.x %}{{ row.a }}{% endwith %}", {"x"}),
        ("{% macro show(row) %}{{ row.a }}{% endmacro %}{{ show(row.b) }}", {"b"}),
        ("{% for x in t if row.y %}{{ row.a }}{% endfor %}", {"t", "y", "a"}),
    ],
)
def test_the_columns_of_a_template(source: str, columns: set[str]) -> None:
    assert Template(source, "task.prompt").columns == columns


def test_a_column_may_have_the_name_of_a_function() -> None:
    template = Template("{{ range }} {{ dict }}", "task.prompt")
    assert template.columns == {"range", "dict"}
    assert template.render({"range": 1, "dict": 2}) == "1 2"


@pytest.mark.parametrize(
    "source", ["{{ a.b.c }}", "{{ a / 0 }}", "{{ a[7] }}", "{{ a.__class__ }}"]
)
def test_what_an_expression_cannot_do_is_the_rows_error(source: str) -> None:
    with pytest.raises(RowError) as caught:
        Template(source, "task.prompt").render({"a": 1})
    assert caught.value.error_type is ErrorType.PROMPT


@pytest.mark.parametrize(
    ("source", "values", "reason"),
    [
        ("{{ a.b }}", {"a": {"c": 1}}, "the row has no field 'b'; write DEFAULT"),
        ("{{ a['b'] }}", {"a": {"c": 1}}, "the row has no field 'b'; write DEFAULT"),
        ("{{ a.b.c }}", {"a": None}, "a null has no field 'b'; write DEFAULT"),
        ("{{ a[1] }}", {"a": ["x"]}, "the row has no such field or item; write DEFAULT"),
        (
            "{{ a.b }}",
            {"a": "{}"},
            "a text has no field 'b'; write {{ (column | from_json).b }} where it is JSON",
        ),
        # A name that is itself a value of the row is not told.
        ("{{ row[a] }}", {"a": "b"}, "the row has no such field or item; write DEFAULT"),
    ],
)
def test_a_field_that_the_row_lacks_is_told_with_what_to_write(
    source: str, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RowError) as caught:
        Template(source, "task.prompt").render(values)
    default = "{{ column.field | default('') }} to allow it"
    assert caught.value.message == f"task.prompt over a: {reason}".replace("DEFAULT", default)
    optional = Template("{{ a.b | default('') }}", "task.prompt")
    assert [optional.render({"a": value}) for value in ({"c": 1}, None, "text")] == [""] * 3


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ a }}", "column 'a' is null; write {{ column or '' }} to allow it"),
        ("{{ row.a }}", "column 'a' is null; write {{ column or '' }} to allow it"),
        ("{{ b }}", "column 'b' is binary; write {{ column.decode() }} where it is text"),
        ("{{ c.x }}", "a value of column 'c' is null; write {{ column or '' }} to allow it"),
        (
            "{{ c['y'][0] }}",
            "a value of column 'c' is binary; write {{ column.decode() }} where it is text",
        ),
        ("{{ c.get('z') }}", "a value is null; write {{ column or '' }} to allow it"),
    ],
)
def test_the_column_that_is_no_text_is_named(source: str, reason: str) -> None:
    values = {"a": None, "b": b"B", "c": {"x": None, "y": [b"Y"]}}
    with pytest.raises(RowError) as caught:
        Template(source, "task.prompt").render(values)
    assert caught.value.message == f"task.prompt: {reason}"


def test_json_text_of_a_column_can_be_read() -> None:
    template = Template("{{ (a | from_json).b[1].c }}", "task.prompt")
    assert template.render({"a": '{"b": [0, {"c": "x"}]}'}) == "x"
    assert Template("{{ (a | from_json).b }}", "s").render({"a": b'{"b": 1}'}) == "1"
    for broken in ("{", None, 3, "[" * 100_000):
        with pytest.raises(RowError) as caught:
            template.render({"a": broken})
        reason = "a value is no JSON, so from_json cannot read it"
        assert caught.value.message == f"task.prompt: {reason}"
    with pytest.raises(RowError, match="a value is null"):
        Template("{{ (a | from_json).b }}", "s").render({"a": '{"b": null}'})


def test_a_broken_template_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"task.prompt is no valid Jinja2 template"):
        Template("{{ question", "task.prompt")
