"""Answers as JSON: validated, never repaired."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchvlm.config import TaskConfig, TaskName, TaskOutputConfig
from batchvlm.errors import ConfigError, ErrorType
from batchvlm.tasks import Reading, open_task
from batchvlm.tasks.extract import Extract

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}


def read(text: str, json_schema: str | None = None) -> Reading:
    return Extract(TaskOutputConfig(json_schema=SCHEMA)).read(text, json_schema=json_schema)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Zoë", "n": 3}',
        '  {"name":"Zoë","n":3}\n',
        '```json\n{"name": "Zoë", "n": 3}\n```',
        '```\n{"name": "Zoë",\n "n": 3}\n```',
    ],
)
def test_an_answer_that_fits(text: str) -> None:
    assert read(text) == Reading(parsed='{"name":"Zoë","n":3}', json_valid=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("A cat.", "no JSON: Expecting value at character 1"),
        ('{"name": "a', "no JSON: Unterminated string starting at character 10"),
        ('```json\n{"name": "a\n```', "no JSON: Invalid control character at character 20"),
        ('{"name": "a"', "no JSON: Expecting ',' delimiter at character 13"),
        ('{"name": "a"} and more', "no JSON: Extra data at character 15"),
        ('{"name": NaN}', "NaN is no JSON number"),
        ('{"name": "a", "n": 1e999}', "no JSON"),
        ('```json\n{"name": "a"}', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"n": 3}', "'name' is a required property"),
        ('{"name": 3}', "$.name"),
        ('{"name": "a", "x": 1}', "Additional properties"),
    ],
)
def test_an_answer_that_does_not(text: str, message: str) -> None:
    reading = read(text)
    assert (reading.parsed, reading.json_valid) == (None, False)
    assert reading.failure is not None
    assert reading.failure.error_type is ErrorType.INVALID_JSON
    assert message in reading.failure.message


@pytest.mark.parametrize(
    ("text", "said"),
    [(" cat", " cat"), ("cat", " cat"), ("cat\n", " cat"), ("dog", "dog"), (" dog", " dog")],
)
def test_a_choice_is_known_by_what_it_says_where_one_alone_says_it(text: str, said: str) -> None:
    """As an answer's first blank is lost with some tokenizers."""
    choices = (" cat", "dog", " dog", "\u00e9 ", " \u00e9")
    reading = Extract(TaskOutputConfig()).read(text, json_schema=None, choices=choices)
    assert reading.parsed == json.dumps(said)
    either = Extract(TaskOutputConfig()).read("\u00e9", json_schema=None, choices=choices)
    assert either.failure is not None and "none of the choices" in either.failure.message


def test_a_fence_that_never_ends_takes_no_time() -> None:
    """Quadratic matching would take minutes here."""
    for text in ("```" + "\n" * 200_000 + "x", "```json" + " \n" * 100_000, "`" * 200_000):
        assert read(text).json_valid is False
    lines = "\n" * 100_000
    assert read(f'```json{lines}{{"name": "a"}}{lines}```').parsed == '{"name":"a"}'


def test_half_a_surrogate_pair_stays_escaped() -> None:
    """JSON can say it and no text column can hold it: written out, it would become another text."""
    reading = read('{"name": "\\ud800"}')
    assert (reading.parsed, reading.json_valid) == ('{"name":"\\ud800"}', True)
    assert read('{"name": "\\ud83d\\ude00"}').parsed == '{"name":"\N{GRINNING FACE}"}'


def test_a_message_can_be_stored_whatever_the_answer_holds() -> None:
    for text in ('{"\\ud800": 1}', '{"name": {"\\udfff": 1}}', '{"name": "a", "n": "\\ud800"}'):
        failure = read(text).failure
        assert failure is not None
        failure.message.encode()


def test_a_rows_own_schema_comes_first() -> None:
    own = json.dumps({"type": "array"})
    assert read("[1]", own).json_valid is True
    assert read('{"name": "a"}', own).json_valid is False


def task(name: TaskName, **output: Any) -> TaskConfig:
    return TaskConfig(name=name, prompt="?", output=TaskOutputConfig(**output))


def test_free_text_is_taken_as_it_is() -> None:
    for name in (TaskName.caption, TaskName.vqa):
        assert open_task(task(name)).read("{not json", json_schema=None) == Reading()


def test_a_schema_that_is_not_there_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"task.output.json_schema=none.json cannot be read"):
        open_task(task(TaskName.extract, json_schema="none.json"))


def test_other_tasks_read_json_where_the_row_brings_a_schema() -> None:
    columns = TaskOutputConfig(json_schema_column="schema")
    task = open_task(TaskConfig(name=TaskName.caption, prompt="x", output=columns))
    assert task.read("a red circle", json_schema=None) == Reading()
    schema = json.dumps(SCHEMA)
    assert task.read('{"name": "a"}', json_schema=schema).parsed == '{"name":"a"}'
    broken = task.read("a red circle", json_schema=schema)
    assert broken.failure is not None
    assert broken.failure.error_type is ErrorType.INVALID_JSON
