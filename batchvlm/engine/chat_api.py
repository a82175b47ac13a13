"""The OpenAI chat protocol: a sample as a request, and what a server's reply means for its row."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from batchvlm.config import EndpointConfig, ResponseFormat
from batchvlm.errors import ErrorType
from batchvlm.records import (
    ChatRequest,
    Completion,
    Failure,
    FinishReason,
    Form,
    FormKind,
    Generation,
    Sample,
    Usage,
)

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "eos_token": FinishReason.STOP,  # TGI's own words
    "stop_sequence": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "repetition": FinishReason.REPETITION,
}
_TOO_LONG = re.compile(
    r"context length|max_model_len|max_total_tokens|maximum (model )?length|inputs.{0,40}tokens",
    re.IGNORECASE,
)
_PAYLOAD = re.compile(r"data:image[^\s\"']*")
_MAX_MESSAGE_CHARS = 200
_AS_THEY_ARE = {
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    # vLLM's and SGLang's; only a row's own columns bring these.
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "ignore_eos": "ignore_eos",
}
"""Names in a request of settings that are sent where they ask for something."""
_DEFAULTS = {f.name: f.default for f in fields(Generation)}


class MalformedReplyError(Exception):
    """A reply with status 200 that is no chat completion."""


_JSON_AND_TEXTS = frozenset({FormKind.JSON_SCHEMA, FormKind.CHOICE, FormKind.REGEX})
SENT_KINDS: Mapping[ResponseFormat, frozenset[FormKind]] = {
    ResponseFormat.json_schema: frozenset({FormKind.JSON_SCHEMA}),
    ResponseFormat.tgi: _JSON_AND_TEXTS,
    ResponseFormat.vllm: frozenset(FormKind),
    ResponseFormat.vllm_guided: frozenset(FormKind),
    ResponseFormat.none: frozenset(FormKind),
}
"""Forms that a server can be told in each way, or that are left to validation on purpose."""
_VLLM_WORDS = {
    FormKind.JSON_SCHEMA: "json",
    FormKind.CHOICE: "choice",
    FormKind.REGEX: "regex",
    FormKind.GRAMMAR: "grammar",
}


def form_fields(form: Form, response_format: ResponseFormat) -> dict[str, Any]:
    """The fields of a request that ask for a form.

    Args:
        form: of a kind in `SENT_KINDS`.
        response_format: how the server is told.
    """
    assert form.kind in SENT_KINDS[response_format]
    is_json = form.kind in (FormKind.JSON_SCHEMA, FormKind.CHOICE)
    said = json.loads(form.text) if is_json else form.text
    match response_format:
        case ResponseFormat.json_schema:
            named = {"name": "answer", "schema": said}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        case ResponseFormat.tgi:
            if form.kind is FormKind.JSON_SCHEMA:
                return {"response_format": {"type": "json_object", "value": said}}
            pattern = "|".join(map(re.escape, said)) if form.kind is FormKind.CHOICE else said
            return {"response_format": {"type": "regex", "value": pattern}}
        case ResponseFormat.vllm:
            return {"structured_outputs": {_VLLM_WORDS[form.kind]: said}}
        case ResponseFormat.vllm_guided:
            return {f"guided_{_VLLM_WORDS[form.kind]}": said}
    return {}


def request_body(sample: Sample, cfg: EndpointConfig, *, model: str, form: Form | None) -> bytes:
    """The JSON text of a row's request.

    Args:
        sample: with a `request`.
        cfg: what is sent along.
        model: the model's name on the server.
        form: that the server is to hold the answer to, of a kind that it can be told.
    """
    assert sample.request is not None
    row = sample.generation
    body: dict[str, Any] = {
        "model": model,
        "messages": list(_messages(sample.request)),
        "max_tokens": row.max_new_tokens,
        "temperature": row.temperature,
    }
    if row.temperature > 0:
        body["seed"] = row.seed
        if row.top_p < 1:
            body["top_p"] = row.top_p
    if row.stop:
        body["stop"] = list(row.stop)
    if row.logprobs:
        body["logprobs"] = True
    for name, setting in _AS_THEY_ARE.items():
        value = getattr(row, setting)
        if value != _DEFAULTS[setting]:
            body[name] = value
    if form is not None:
        body |= form_fields(form, cfg.response_format)
    return json.dumps(body | cfg.extra_body).encode()


def _messages(request: ChatRequest) -> Iterator[dict[str, Any]]:
    images = iter(request.images)
    for message in request.messages:
        parts = message["content"]
        # As a string where it can be one: some templates take no list for other roles than users'.
        content: Any = [_image_part(next(images)) if p["type"] == "image" else p for p in parts]
        if all(part["type"] == "text" for part in parts):
            content = "".join(part["text"] for part in parts)
        yield {"role": message["role"], "content": content}


def _image_part(data: bytes) -> dict[str, Any]:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    text = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{text}"}}


def read_reply(text: bytes, sample: Sample, latency_s: float) -> Completion | Failure:
    """What a reply with status 200 says.

    Raises:
        MalformedReplyError: it is no chat completion, as of a gateway that shows a page of its own.
    """
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        message = choice["message"]
        answer, refused = message.get("content") or "", message.get("refusal") or ""
        reason = choice.get("finish_reason")
        usage = reply.get("usage") or {}
        counts = {key: _count(usage.get(key)) for key in ("prompt_tokens", "completion_tokens")}
        logprobs = _logprobs(choice.get("logprobs")) if sample.generation.logprobs else None
        if not isinstance(answer + refused, str) or not isinstance(reason, str | None):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedReplyError from error
    if reason is not None and reason not in _FINISH_REASONS:
        # content_filter, abort, tool_calls, ...: half an answer, or none.
        return Failure(
            error_type=ErrorType.ENGINE,
            message=f"the server ended the answer for another reason: {one_line(reason)}",
        )
    if refused and not answer:
        # Where a schema was asked for, a refusal stands apart, and the reason is `stop`.
        return Failure(
            error_type=ErrorType.ENGINE,
            message=f"the model refused: {one_line(refused)}",
        )
    if sample.generation.logprobs and logprobs is None:
        return Failure(
            error_type=ErrorType.ENGINE,
            message="the server gave no logprobs; generation.logprobs=false does without",
        )
    return Completion(
        row_index=sample.row_index,
        token_ids=(),
        logprobs=logprobs,
        text=_storable(answer),
        finish_reason=_FINISH_REASONS[reason or "stop"],
        latency_s=latency_s,
        usage=Usage(**counts),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else None


def _logprobs(value: Any) -> tuple[float, ...] | None:
    if not value or not value.get("content"):
        return None
    return tuple(float(token["logprob"]) for token in value["content"])


def _storable(text: str) -> str:
    # JSON can say half a surrogate pair, which no text column can hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def refusal(status: int, reason: str) -> Failure:
    """The failure of a row whose request a server refused with a 4xx."""
    kind = ErrorType.PROMPT_TOO_LONG if _TOO_LONG.search(reason) else ErrorType.ENGINE
    return Failure(error_type=kind, message=f"the server answered {status}: {reason}")


def reason_of(text: bytes, *, secrets: Iterable[str] = ()) -> str:
    """What the body of an error says, in one line without images and tokens.

    Args:
        text: the body, JSON or not.
        secrets: words that a server may repeat and that nobody shall read.
    """
    line = text[:4096].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        line = _message_in(json.loads(text))
    for secret in secrets:
        line = line.replace(secret, "***")
    return one_line(line) or "no reason given"


def _message_in(value: Any) -> str:
    # {"error": {"message"}}, {"error"}, {"detail"}, {"message"}, {"detail": [{"msg"}]}
    while isinstance(value, Mapping | list) and value:
        if isinstance(value, list):
            value = value[0]
            continue
        keys = [key for key in ("error", "message", "detail", "msg") if value.get(key)]
        if not keys:
            return json.dumps(value)
        value = value[keys[0]]
    return str(value or "")


def one_line(text: str) -> str:
    return " ".join(_PAYLOAD.sub("data:...", text).split())[:_MAX_MESSAGE_CHARS]
