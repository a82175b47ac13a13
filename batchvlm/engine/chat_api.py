"""The OpenAI chat completions API: samples to request bodies, and replies to completions."""

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
from batchvlm.words import one_line

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "eos_token": FinishReason.STOP,  # TGI's
    "stop_sequence": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "repetition": FinishReason.REPETITION,
}
_TOO_LONG = re.compile(
    r"context length|max_model_len|max_total_tokens|maximum (model )?length|inputs.{0,40}tokens",
    re.IGNORECASE,
)
_IMAGE_URI = re.compile(r"data:image[^\s\"']*")
_OPTIONAL_FIELDS = {
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    # Extensions of vLLM and SGLang; set only by a row's own columns.
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "ignore_eos": "ignore_eos",
}
"""Request field -> the setting whose value it has; sent if it differs from the default."""
_DEFAULTS = {f.name: f.default for f in fields(Generation)}


class MalformedReplyError(Exception):
    """A reply with status 200 that is not a chat completion."""


_JSON_AND_TEXTS = frozenset({FormKind.JSON_SCHEMA, FormKind.CHOICE, FormKind.REGEX})
SENT_KINDS: Mapping[ResponseFormat, frozenset[FormKind]] = {
    ResponseFormat.json_schema: frozenset({FormKind.JSON_SCHEMA}),
    ResponseFormat.tgi: _JSON_AND_TEXTS,
    ResponseFormat.vllm: frozenset(FormKind),
    ResponseFormat.vllm_guided: frozenset(FormKind),
    ResponseFormat.none: frozenset(FormKind),
}
"""Kinds of forms that each response format can express; `none` leaves all to validation."""
_VLLM_FIELDS = {
    FormKind.JSON_SCHEMA: "json",
    FormKind.CHOICE: "choice",
    FormKind.REGEX: "regex",
    FormKind.GRAMMAR: "grammar",
}


def form_fields(form: Form, response_format: ResponseFormat) -> dict[str, Any]:
    """Return the request fields that constrain the answer to a form.

    Args:
        form: of a kind in `SENT_KINDS[response_format]`.
        response_format: the server's dialect.
    """
    assert form.kind in SENT_KINDS[response_format]
    is_json = form.kind in (FormKind.JSON_SCHEMA, FormKind.CHOICE)
    value = json.loads(form.text) if is_json else form.text
    match response_format:
        case ResponseFormat.json_schema:
            named = {"name": "answer", "schema": value}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        case ResponseFormat.tgi:
            if form.kind is FormKind.JSON_SCHEMA:
                return {"response_format": {"type": "json_object", "value": value}}
            pattern = "|".join(map(re.escape, value)) if form.kind is FormKind.CHOICE else value
            return {"response_format": {"type": "regex", "value": pattern}}
        case ResponseFormat.vllm:
            return {"structured_outputs": {_VLLM_FIELDS[form.kind]: value}}
        case ResponseFormat.vllm_guided:
            return {f"guided_{_VLLM_FIELDS[form.kind]}": value}
    return {}


def request_body(sample: Sample, cfg: EndpointConfig, *, model: str, form: Form | None) -> bytes:
    """Return the JSON body of a sample's request.

    Args:
        sample: with a `request`.
        cfg: the response format, and `extra_body`, which overrides other fields.
        model: the model's name on the server.
        form: form to request, of a kind in `SENT_KINDS`, if any.
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
    for name, setting in _OPTIONAL_FIELDS.items():
        value = getattr(row, setting)
        if value != _DEFAULTS[setting]:
            body[name] = value
    if form is not None:
        body |= form_fields(form, cfg.response_format)
    if sample.is_continued:
        # Extensions of vLLM and SGLang.
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    body |= cfg.extra_body
    if own := sample.request.template_variables:
        body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), **own}
    return json.dumps(body).encode()


def _messages(request: ChatRequest) -> Iterator[dict[str, Any]]:
    images = iter(request.images)
    for message in request.messages:
        parts = message["content"]
        # Text-only content is sent as a string: some templates take lists from users only.
        content: Any = [_image_part(next(images)) if p["type"] == "image" else p for p in parts]
        if all(part["type"] == "text" for part in parts):
            content = "".join(part["text"] for part in parts)
        yield {"role": message["role"], "content": content}


def _image_part(data: bytes) -> dict[str, Any]:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    text = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{text}"}}


def read_reply(text: bytes, sample: Sample, latency_s: float) -> Completion | Failure:
    """Parse a reply with status 200.

    Raises:
        MalformedReplyError: it is not a chat completion, such as a gateway's HTML page.
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
        # content_filter, abort, tool_calls, ...: the answer is incomplete or missing.
        return Failure(
            error_type=ErrorType.ENGINE,
            message=f"the server ended the answer for another reason: {without_images(reason)}",
        )
    if refused and not answer:
        # With a requested schema, a refusal is in its own field, with finish reason `stop`.
        return Failure(
            error_type=ErrorType.ENGINE,
            message=f"the model refused: {without_images(refused)}",
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
    # JSON can encode a lone surrogate, which a text column cannot hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def refusal(status: int, reason: str) -> Failure:
    """Return the failure of a row whose request the server refused with a 4xx status."""
    kind = ErrorType.PROMPT_TOO_LONG if _TOO_LONG.search(reason) else ErrorType.ENGINE
    return Failure(error_type=kind, message=f"the server answered {status}: {reason}")


def reason_of(text: bytes, *, secrets: Iterable[str] = ()) -> str:
    """Return the message of an error body in one line, without images and secrets.

    Args:
        text: the body, JSON or not.
        secrets: strings to mask, such as the token, which a server may echo.
    """
    line = text[:4096].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        line = _message_in(json.loads(text))
    for secret in secrets:
        line = line.replace(secret, "***")
    return without_images(line) or "no reason given"


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


def without_images(text: str) -> str:
    """Return text of a server as one line, without the images that it repeats."""
    return one_line(_IMAGE_URI.sub("data:...", text))
