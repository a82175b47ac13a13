"""Read OpenAI batch files: each line is a chat request, as hosted batch APIs accept it.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "any", "messages": [...], "max_tokens": 100, "temperature": 0.5}}

A request with an unsupported field that could change the answer becomes an error row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from batchvlm.config import DataConfig
from batchvlm.errors import ErrorType, InputError
from batchvlm.records import Failure, Record
from batchvlm.sources.files import image_root_of, list_files
from batchvlm.sources.jsonl import SUFFIXES, JsonlSource, parse, why_unusable
from batchvlm.sources.rows import ShardRows

_SETTINGS = {
    "max_tokens": pa.int64(),
    "temperature": pa.float64(),
    "top_p": pa.float64(),
    "stop": pa.list_(pa.string()),
    "seed": pa.int64(),
    "n": pa.int64(),
    "logprobs": pa.bool_(),
    "frequency_penalty": pa.float64(),
    "presence_penalty": pa.float64(),
    # Further fields that vLLM's server accepts.
    "top_k": pa.int64(),
    "min_p": pa.float64(),
    "repetition_penalty": pa.float64(),
    "min_tokens": pa.int64(),
    "ignore_eos": pa.bool_(),
}
"""Fields of the body that become columns under their own names."""

_SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("model", pa.string()),
        ("messages", pa.string()),
        ("chat_template_kwargs", pa.string()),
        *_SETTINGS.items(),
        ("json_schema", pa.string()),
    ]
)

_IGNORED_FIELDS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
}
"""Ignored fields of the body, about the user and billing: none changes an answer."""

_UNSUPPORTED_FIELDS: Mapping[str, Sequence[Any]] = {
    "stream": (False,),
    "stream_options": ({},),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (False,),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
}
"""Unsupported fields of the body, with the values that have no effect and are accepted."""

_ENDPOINT = "/chat/completions"
_LINE_FIELDS = {"custom_id", "method", "url", "body"}
_MESSAGE_FIELDS = {"role", "content", "prefix"}
_ANY_OBJECT = '{"type": "object"}'
"""The schema of `response_format={"type": "json_object"}`."""


def open_openai(cfg: DataConfig) -> OpenAISource:
    """Open the batch files of `data.path`.

    Raises:
        InputError: no file is found.
    """
    listing = list_files(cfg.path, suffixes=SUFFIXES)
    return OpenAISource(
        listing,
        id_column=cfg.columns.id,
        image_root=image_root_of(cfg.image_root, listing.local_root),
    )


class OpenAISource(JsonlSource):
    """Files of chat requests as one input; the settings of requests are columns.

    A setting that a request does not have is null, so that of the run applies. The column
    `max_tokens` has `max_completion_tokens` if the request sets it; `json_schema` has the schema of
    `response_format`, `structured_outputs` or `guided_json`.
    """

    @cached_property
    def schema(self) -> pa.Schema:
        """The same columns for every batch file.

        Raises:
            InputError: as for `JsonlSource.schema`, or no object has a key `body`.
        """
        found = super().schema
        if "body" not in found.names:
            raise InputError(
                "data.path is no OpenAI batch file: its objects have no key 'body' (their keys: "
                f"{', '.join(found.names[:10])})",
                hint="data=jsonl reads any JSON lines",
            )
        return _SCHEMA

    def _to_record(self, rows: ShardRows, row: int, line: bytes) -> Record:
        request, message = parse(line)
        message = message or why_unusable(request, line)
        if message:
            return next(rows.failed([row], f"the line is no usable JSON object: {message}"))
        # A refused request keeps its `custom_id`.
        key = request.get("custom_id")
        is_key = isinstance(key, int | str) and not isinstance(key, bool) and key != ""
        try:
            read = _read_request(request)
        except _RefusedError as error:
            (record,) = rows.failed([row], "")
            failure = Failure(error_type=ErrorType.PROMPT, message=str(error))
            record = replace(record, failure=failure)
        else:
            read |= {"custom_id": str(key) if is_key else None}
            kept = {name: _stored(name, read.get(name)) for name in rows.kept}
            record = rows.record(row, read, kept)
        is_named = is_key and rows.id_column == "custom_id"
        return replace(record, id=str(key)) if is_named else record


class _RefusedError(ValueError):
    """A request cannot be answered; the message is one line."""


def _stored(name: str, value: Any) -> Any:
    is_json = name in ("messages", "chat_template_kwargs") and value is not None
    return json.dumps(value, ensure_ascii=False) if is_json else value


def _read_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the column values of a request.

    Raises:
        _RefusedError: the request is not a chat request or has an unsupported field.
    """
    given = {key: value for key, value in request.items() if value is not None}
    _refuse_unknown(given.keys() - _LINE_FIELDS, "the request")
    url, method, body = (given.get(key) for key in ("url", "method", "body"))
    if url is not None and not str(url).endswith(_ENDPOINT):
        raise _RefusedError(f"url is not one that ends in {_ENDPOINT}")
    if method is not None and method != "POST":
        raise _RefusedError("method is not POST")
    if not isinstance(body, dict):
        raise _RefusedError("the request has no body")
    body = {key: value for key, value in body.items() if value is not None}
    read: dict[str, Any] = {
        key: body.pop(key, None) for key in ("model", "chat_template_kwargs", *_SETTINGS)
    }
    if read["top_k"] == -1:
        read["top_k"] = 0  # vLLM writes "all tokens" as either
    longest = body.pop("max_completion_tokens", None)
    if longest is not None:
        read["max_tokens"] = longest
    if not isinstance(read["model"], str | None):
        raise _RefusedError("body.model is no text")
    read["messages"] = _read_messages(body.pop("messages", None))
    _mark_continued(body, read["messages"])
    read["json_schema"] = _schema_of(body)
    for key in _IGNORED_FIELDS:
        body.pop(key, None)
    for key, values in _UNSUPPORTED_FIELDS.items():
        # Compared as text, because in Python 0 == False.
        if key in body and json.dumps(body[key]) in map(json.dumps, values):
            del body[key]
    _refuse_unknown(body, "body")
    return read


def _refuse_unknown(names: Iterable[str], where: str) -> None:
    for name in sorted(names):
        raise _RefusedError(f"{where}: {ascii(name)[:80]} is not supported")


def _read_messages(value: Any) -> Any:
    """Return chat messages for `prompts.messages`; fields that it would ignore are refused."""
    if not isinstance(value, list):
        raise _RefusedError("body.messages is no list")
    messages = []
    for i, message in enumerate(value):
        if isinstance(message, dict):
            message = {key: item for key, item in message.items() if item is not None}
            _refuse_unknown(message.keys() - _MESSAGE_FIELDS, f"body.messages[{i}]")
            if message.get("role") == "developer":  # OpenAI's newer name of that role
                message = {**message, "role": "system"}
        messages.append(message)
    return messages


def _mark_continued(body: dict[str, Any], messages: list[Any]) -> None:
    """Replace vLLM's fields for the continuation of the last message by the message's `prefix`.

    Raises:
        _RefusedError: the fields contradict each other or the messages.
    """
    is_continued = body.pop("continue_final_message", False)
    begins = body.pop("add_generation_prompt", not is_continued)
    if not isinstance(is_continued, bool) or begins is not (not is_continued):
        raise _RefusedError(
            "body.continue_final_message and body.add_generation_prompt must be true and false, or "
            "false and true"
        )
    if not is_continued:
        return
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise _RefusedError("body.continue_final_message: the last message is not the assistant's")
    messages[-1] = {**last, "prefix": True}


def _schema_of(body: dict[str, Any]) -> str | None:
    """Remove the JSON schema from a request's body and return it as text; None if it has none.

    OpenAI has it in `response_format`, vLLM also in `structured_outputs` or `guided_json`.
    """
    read = {
        "response_format": _in_response_format,
        "structured_outputs": _in_structured_outputs,
        "guided_json": _as_text,
    }
    found = {key: read[key](body.pop(key)) for key in read if key in body}
    schemas = {key: schema for key, schema in found.items() if schema is not None}
    if len(schemas) > 1:
        raise _RefusedError(f"body: {' and '.join(schemas)} both ask for a schema")
    return next(iter(schemas.values()), None)


def _in_response_format(given: Any) -> str | None:
    match given:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return _ANY_OBJECT
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
            return json.dumps(schema)
    raise _RefusedError(
        "body.response_format is none of text, json_object, and json_schema with a schema"
    )


def _in_structured_outputs(given: Any) -> str:
    if isinstance(given, dict):
        given = {key: value for key, value in given.items() if value not in (None, False)}
    match given:
        case {"json": schema, **others} if not others:
            return _as_text(schema)
        case {"json_object": True, **others} if not others:
            return _ANY_OBJECT
    raise _RefusedError("body.structured_outputs is neither json nor json_object alone")


def _as_text(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)
