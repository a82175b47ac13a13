"""OpenAI's batch files: what a request says becomes columns, and nothing is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.errors import ErrorType, InputError
from batchvlm.records import Record
from tests.sources.make import check_all_ways, open_path, plan, read_all

MESSAGES = [{"role": "user", "content": "What is this?"}]


def request(key: Any = "a", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": key,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "gpt-x", "messages": MESSAGES, **body},
    }


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def read(path: Path, *columns: str) -> list[Record]:
    source = open_path("openai", path, id_column="custom_id")
    return read_all(source, columns or source.schema.names)


def read_one(tmp_path: Path, line: Any) -> Record:
    # Beside a good one: a file without any object is refused as a whole.
    record, _ = read(write(tmp_path / "in.jsonl", line, request("good")))
    return record


def test_a_request_becomes_columns(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    body = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["a", "b"],
        "seed": 3,
        "n": 2,
        "logprobs": True,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.2,
        "top_k": 4,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    record = read_one(tmp_path, request(**body))
    assert (record.id, record.failure) == ("a", None)
    values = dict(record.values)
    assert json.loads(values.pop("json_schema")) == schema
    body.pop("response_format")
    expected = body | {"custom_id": "a", "model": "gpt-x", "messages": MESSAGES}
    assert {key: value for key, value in values.items() if value is not None} == expected


def test_what_is_left_open_is_null(tmp_path: Path) -> None:
    record = read_one(tmp_path, {"custom_id": 7, "body": {"messages": MESSAGES, "n": None}})
    values = {key: value for key, value in record.values.items() if value is not None}
    assert values == {"custom_id": "7", "messages": MESSAGES}
    assert record.id == "7"


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
    ],
)
def test_response_formats(tmp_path: Path, response_format: Any, schema: Any) -> None:
    text = read_one(tmp_path, request(response_format=response_format)).values["json_schema"]
    assert (None if text is None else json.loads(text)) == schema


@pytest.mark.parametrize(
    "field",
    [
        {"guided_json": {"type": "object"}},
        {"guided_json": '{"type": "object"}', "response_format": {"type": "text"}},
        {"structured_outputs": {"json": {"type": "object"}, "regex": None}},
        {"structured_outputs": {"json_object": True, "json": None}},
    ],
)
def test_a_schema_in_the_words_of_vllm(tmp_path: Path, field: Any) -> None:
    record = read_one(tmp_path, request(**field))
    assert json.loads(record.values["json_schema"]) == {"type": "object"}


def test_the_newer_words_mean_the_older(tmp_path: Path) -> None:
    messages = [{"role": "developer", "content": "Be brief.", "name": None}, *MESSAGES]
    record = read_one(tmp_path, request(messages=messages, max_completion_tokens=9, max_tokens=8))
    assert record.values["max_tokens"] == 9
    assert record.values["messages"][0] == {"role": "system", "content": "Be brief."}


def test_what_changes_no_answer_is_taken(tmp_path: Path) -> None:
    harmless = {
        "user": "somebody",
        "metadata": {"a": "b"},
        "store": True,
        "stream": False,
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "top_logprobs": 0,
        "reasoning_effort": None,
    }
    assert read_one(tmp_path, request(**harmless)).failure is None


BEGUN = [*MESSAGES, {"role": "assistant", "content": "I see"}]


@pytest.mark.parametrize(
    "body",
    [
        {"continue_final_message": True, "add_generation_prompt": False},
        {"continue_final_message": True},
        {"messages": [*MESSAGES, {**BEGUN[-1], "prefix": True}]},
    ],
)
def test_a_request_may_ask_to_continue_its_last_message(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    record = read_one(tmp_path, request(**{"messages": BEGUN, **body}))
    assert record.failure is None
    assert record.values["messages"][-1] == {**BEGUN[-1], "prefix": True}


def test_variables_of_the_chat_template(tmp_path: Path) -> None:
    given = {"enable_thinking": False}
    path = write(tmp_path / "in.jsonl", request(chat_template_kwargs=given), request())
    source = open_path("openai", path, id_column="custom_id")
    (shard,) = plan(source)
    column = "chat_template_kwargs"
    first, second = source.read_shard(shard, [column], kept=[column])
    assert (first.values, first.kept) == ({column: given}, {column: json.dumps(given)})
    assert (second.values, second.kept) == ({column: None}, {column: None})


def test_vllms_values_without_effect_are_taken(tmp_path: Path) -> None:
    values = {
        "stop_token_ids": [],
        "bad_words": [],
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "add_special_tokens": False,
        "mm_processor_kwargs": {},
        "priority": 0,
        "top_k": -1,
    }
    record = read_one(tmp_path, request(**values))
    assert record.failure is None and record.values["top_k"] == 0


REFUSED = {
    "must be true and false": request(messages=BEGUN, add_generation_prompt=False),
    "body.continue_final_message and body.add_generation_prompt": request(
        messages=BEGUN, continue_final_message=True, add_generation_prompt=True
    ),
    "the last message is not the assistant's": request(continue_final_message=True),
    "tools": request(tools=[{"type": "function"}]),
    "stream": request(stream=True),
    "'logit_bias'": request(logit_bias={"50256": -100}),
    "top_logprobs": request(logprobs=True, top_logprobs=5),
    "'temprature' is not supported": request(temprature=1),
    "best_of": request(best_of=2),
    "body.response_format": request(response_format={"type": "grammar"}),
    "body.structured_outputs": request(structured_outputs={"choice": ["a"]}),
    "both ask for a schema": request(guided_json={}, response_format={"type": "json_object"}),
    "guided_choice": request(guided_choice=["a"]),
    "body.model": request(model=3),
    "body.messages is no list": request(messages="hello"),
    "body.messages[0]: 'tool_calls'": request(
        messages=[{"role": "assistant", "content": "", "tool_calls": [{}]}]
    ),
    "the request: 'params'": {**request(), "params": {}},
    "url": {**request(), "url": "/v1/embeddings"},
    "method": {**request(), "method": "GET"},
    "no body": {"custom_id": "a", "body": None},
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_what_is_not_supported_is_the_rows_error_by_its_name(tmp_path: Path, words: str) -> None:
    record = read_one(tmp_path, REFUSED[words])
    assert record.id == "a"
    assert record.values == {}
    assert record.failure is not None
    assert record.failure.error_type is ErrorType.PROMPT
    assert words in record.failure.message
    assert "\n" not in record.failure.message


@pytest.mark.parametrize("line", ["{", '["a"]', '{"custom_id": "\\ud800", "body": {}}'])
def test_a_line_that_is_no_object_is_an_input_error(tmp_path: Path, line: str) -> None:
    record = read_one(tmp_path, line)
    assert record.failure is not None
    assert record.failure.error_type is ErrorType.INPUT
    assert record.id == "in.jsonl:0"


@pytest.mark.parametrize("key", [None, "", True, {"a": 1}])
def test_a_request_without_a_name_has_its_place(tmp_path: Path, key: Any) -> None:
    record = read_one(tmp_path, request(key))
    assert (record.id, record.failure) == ("in.jsonl:0", None)


def test_other_json_lines_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"image": "a.png", "question": "what?"})
    with pytest.raises(InputError, match=r"no OpenAI batch file.*data=jsonl"):
        _ = open_path("openai", path).schema


def test_kept_columns_fit_their_types(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", request(n=2), "{")
    source = open_path("openai", path, id_column="custom_id")
    (shard,) = plan(source)
    first, broken = source.read_shard(shard, ["messages"], kept=["messages", "model", "n"])
    assert first.kept == {"messages": json.dumps(MESSAGES), "model": "gpt-x", "n": 2}
    assert first.values == {"messages": MESSAGES}
    assert broken.kept == {}


def test_every_row_comes_once_however_shards_are_read(tmp_path: Path) -> None:
    lines = [request(f"r{i}", seed=i) if i % 5 else "broken" for i in range(40)]
    path = write(tmp_path / "in.jsonl", *lines)
    check_all_ways(open_path("openai", path, id_column="custom_id"), ["seed"], 7, seed=0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = st.sampled_from(
    ["messages", "max_tokens", "stop", "seed", "n", "response_format", "tools", "user", "model"]
)
lines = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": json_values,
        "url": json_values,
        "method": json_values,
        "body": st.dictionaries(fields, json_values) | json_values,
    },
)


@settings(max_examples=100)
@given(requests=st.lists(lines, min_size=1, max_size=4))
def test_whatever_a_line_holds_is_one_row(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    write(path, *requests, request("good"))
    records = read(path)
    assert [r.row_index for r in records] == list(range(len(requests) + 1))
    assert records[-1].failure is None
    for record in records:
        record.id.encode()
        if record.failure is not None:
            assert record.values == {}
            record.failure.message.encode()
