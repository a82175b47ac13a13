"""Samples as chat requests, and what the replies mean."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchvlm.config import EndpointConfig, ImageFormat, ResponseFormat
from batchvlm.engine.chat_api import (
    SENT_KINDS,
    MalformedReplyError,
    read_reply,
    reason_of,
    refusal,
    request_body,
)
from batchvlm.errors import ErrorType
from batchvlm.preprocess.images import image_file
from batchvlm.records import (
    ChatRequest,
    Completion,
    Failure,
    FinishReason,
    Form,
    FormKind,
    Generation,
    Sample,
)

from .stand_in import chat


def ask(
    *images: bytes, system: str | None = None, schema: str | None = None, **generation: Any
) -> Sample:
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return Sample(
        row_index=7,
        features={},
        image_tokens=0,
        image_sizes=(),
        generation=Generation(**({"max_new_tokens": 8} | generation)),
        json_schema=schema,
        request=ChatRequest(messages=messages, images=images),
    )


def body_of(sample: Sample, *, form: Form | None = None, **cfg: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        request_body(sample, EndpointConfig(**cfg), model="m", form=form)
    )
    return body


def noise() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_images_are_sent_as_they_are_seen_here() -> None:
    picture = noise()
    picture.info["exif"] = b"secret"
    body = body_of(ask(image_file(picture, ImageFormat.png), system="Be brief."))
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    image, text = user["content"]
    assert text == {"type": "text", "text": "What?"}
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert sent.mode == "RGB" and sent.tobytes() == picture.tobytes()
    assert "exif" not in sent.info


def test_jpeg_is_smaller_and_near() -> None:
    gradient = Image.linear_gradient("L").convert("RGB")
    as_jpeg = image_file(gradient, ImageFormat.jpeg)
    assert body_of(ask(as_jpeg))["messages"][0]["content"][0]["image_url"]["url"].startswith(
        "data:image/jpeg;base64,"
    )
    difference = np.asarray(Image.open(io.BytesIO(as_jpeg)), int) - np.asarray(gradient, int)
    assert abs(difference).max() <= 4


def test_settings_mean_what_they_mean_there() -> None:
    greedy = {"max_tokens": 8, "temperature": 0.0, "model": "m"}
    body = body_of(ask())
    assert body.pop("messages") == [{"role": "user", "content": "What?"}]
    assert body == greedy  # a greedy row draws nothing, and has no seed
    drawn = body_of(ask(temperature=0.5, top_p=0.9, seed=3, stop=("a", "b"), logprobs=True))
    del drawn["messages"]
    assert drawn == greedy | {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["a", "b"],
        "logprobs": True,
    }
    rows_own = {"top_k": 3, "min_new_tokens": 2, "ignore_eos": True, "frequency_penalty": -0.5}
    body = body_of(ask(**rows_own))
    assert (body["top_k"], body["min_tokens"], body["ignore_eos"]) == (3, 2, True)
    assert body["frequency_penalty"] == -0.5 and "presence_penalty" not in body
    assert body_of(ask(), extra_body={"top_k": 5, "max_tokens": 9})["max_tokens"] == 9


def test_a_server_is_told_to_continue_the_last_message() -> None:
    body = body_of(replace(ask(), is_continued=True))
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert not body_of(ask()).keys() & {"continue_final_message", "add_generation_prompt"}


def test_a_rows_variables_of_the_chat_template_lie_over_those_of_the_run() -> None:
    sample = ask()
    assert sample.request is not None
    own = replace(sample.request, template_variables={"thinks": False, "a": 1})
    sample = replace(sample, request=own)
    assert body_of(sample)["chat_template_kwargs"] == {"thinks": False, "a": 1}
    runs = {"chat_template_kwargs": {"thinks": True, "b": 2}}
    merged = {"thinks": False, "a": 1, "b": 2}
    assert body_of(sample, extra_body=runs)["chat_template_kwargs"] == merged
    assert body_of(ask(), extra_body=runs)["chat_template_kwargs"] == {"thinks": True, "b": 2}
    assert "chat_template_kwargs" not in body_of(ask())


SCHEMA = {"type": "object", "properties": {"a": {"const": None}}}
FORMS = {
    "json": Form(FormKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    "choice": Form(FormKind.CHOICE, '["no", "why (not)?"]'),
    "regex": Form(FormKind.REGEX, "^[0-9]{2}$"),
    "grammar": Form(FormKind.GRAMMAR, 'start: "a" | "b"'),
}
SAID: dict[str, Any] = {
    "json": SCHEMA,
    "choice": ["no", "why (not)?"],
    "regex": "^[0-9]{2}$",
    "grammar": 'start: "a" | "b"',
}


@pytest.mark.parametrize(
    ("response_format", "name", "sent"),
    [
        (
            *("json_schema", "json"),
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": SCHEMA},
                }
            },
        ),
        ("tgi", "json", {"response_format": {"type": "json_object", "value": SCHEMA}}),
        ("tgi", "regex", {"response_format": {"type": "regex", "value": "^[0-9]{2}$"}}),
        (
            *("tgi", "choice"),
            {"response_format": {"type": "regex", "value": r"no|why\ \(not\)\?"}},
        ),
        *(("vllm", name, {"structured_outputs": {name: SAID[name]}}) for name in FORMS),
        *(("vllm_guided", name, {f"guided_{name}": SAID[name]}) for name in FORMS),
        *(("none", name, {}) for name in FORMS),
    ],
)
def test_a_form_is_sent_in_the_words_that_the_server_knows(
    response_format: str, name: str, sent: dict[str, Any]
) -> None:
    plain = body_of(ask())
    body = body_of(ask(), form=FORMS[name], response_format=ResponseFormat(response_format))
    assert body == plain | sent
    assert FORMS[name].kind in SENT_KINDS[ResponseFormat(response_format)]


def read(reply: Any, **generation: Any) -> Completion | Failure:
    text = reply if isinstance(reply, bytes) else json.dumps(reply.body).encode()
    return read_reply(text, ask(**generation), 0.5)


def test_a_reply_becomes_a_completion() -> None:
    completion = read(chat("yes"))
    assert isinstance(completion, Completion) and completion.usage is not None
    assert (completion.row_index, completion.text, completion.token_ids) == (7, "yes", ())
    assert (completion.usage.prompt_tokens, completion.num_tokens) == (11, 3)
    assert completion.finish_reason is FinishReason.STOP and completion.latency_s == 0.5
    unsaid = read(chat("yes", usage=None))
    assert isinstance(unsaid, Completion) and unsaid.num_tokens is None
    null = read(chat("", choice={"message": {"content": None}, "finish_reason": "length"}))
    assert isinstance(null, Completion)
    assert (null.text, null.finish_reason) == ("", FinishReason.LENGTH)
    half = read(b'{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": null}]}')
    assert isinstance(half, Completion) and half.text == "a\ufffdb"


def test_logprobs() -> None:
    content = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -2}]
    completion = read(chat("ab", choice={"logprobs": {"content": content}}), logprobs=True)
    assert isinstance(completion, Completion) and completion.logprobs == (-0.5, -2.0)
    failure = read(chat("ab"), logprobs=True)
    assert isinstance(failure, Failure) and "gave no logprobs" in failure.message


def test_a_refusal_is_no_answer() -> None:
    message = {"content": None, "refusal": "I cannot say\nwho this is."}
    failure = read(chat("", choice={"message": message, "finish_reason": "stop"}))
    assert isinstance(failure, Failure) and failure.error_type is ErrorType.ENGINE
    assert failure.message == "the model refused: I cannot say who this is."
    assert isinstance(
        read(chat("yes", choice={"message": {"content": "y", "refusal": None}})), Completion
    )


@pytest.mark.parametrize("reason", ["content_filter", "abort", "tool_calls"])
def test_half_an_answer_is_none(reason: str) -> None:
    failure = read(chat("ye", choice={"finish_reason": reason}))
    assert isinstance(failure, Failure) and failure.error_type is ErrorType.ENGINE
    assert reason in failure.message


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"<html>Welcome</html>", b"[]", b"{}", b'{"choices": []}', b"null", b"\xff"),
        *(b'{"choices": [{}]}', b'{"choices": [{"message": "yes"}]}', b"[" * 100_000),
        b'{"choices": [{"message": {"content": ["yes"]}}]}',
        b'{"choices": [{"message": {"content": "yes"}}], "usage": 3}',
    ],
    ids=lambda text: text[:30].decode("latin-1"),
)
def test_a_reply_that_is_none(text: bytes) -> None:
    with pytest.raises(MalformedReplyError):
        read(text)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": {"message": "too\n long", "code": 400}}, "too long"),
        ({"detail": [{"msg": "field required", "loc": ["body"]}]}, "field required"),
        ({"error": "no such model", "error_type": "x"}, "no such model"),
        ({"message": "got data:image/png;base64,AAAA here"}, "got data:... here"),
        ({"detail": "key sk-123 is wrong"}, "key *** is wrong"),
        ({"code": 3}, '{"code": 3}'),
        (b"Bad Gateway", "Bad Gateway"),
        (b"", "no reason given"),
    ],
    ids=str,
)
def test_the_reason_of_an_error_is_one_line_without_payload(body: Any, reason: str) -> None:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert reason_of(text, secrets=["sk-123"]) == reason


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (
            "This model's maximum context length is 4096 tokens. However, you requested 9000",
            ErrorType.PROMPT_TOO_LONG,
        ),
        ("`inputs` tokens + `max_new_tokens` must be <= 4096", ErrorType.PROMPT_TOO_LONG),
        ("cannot identify image file", ErrorType.ENGINE),
    ],
)
def test_what_a_refused_row_is_called(reason: str, kind: ErrorType) -> None:
    failure = refusal(400, reason)
    assert failure.error_type is kind and reason in failure.message
