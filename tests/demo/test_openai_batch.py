"""An OpenAI batch file goes in as it is, and the answers come back as a hosted API writes them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from batchvlm import demo
from batchvlm.cli import main
from batchvlm.demo.questions import HeldOutItem, held_out
from batchvlm.errors import ExitCode
from batchvlm.pipeline.pipeline import run_job
from batchvlm.settings.compose import compose

BROKEN, REFUSED = 17, 61
SAMPLED, SURE, SHORT = 3, 4, 5
"""Rows that ask for several answers, for logprobs, and for one token."""
NUM_REQUESTS = 100


def request(item: HeldOutItem, number: int, folder: Path) -> dict[str, Any]:
    (data,) = item.images
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    if number % 10 == 0:
        (folder / f"{number}.png").write_bytes(data)
        url = f"{number}.png"
    content = [
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        {"type": "text", "text": item.question},
    ]
    body = {"model": "gpt-x", "messages": [{"role": "user", "content": content}], "max_tokens": 192}
    if item.kind == "json":
        schema = json.loads(demo.SCHEMA_PATH.read_text())
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "objects", "schema": schema, "strict": True},
        }
    body |= {
        SAMPLED: {"n": 3, "temperature": 50.0, "seed": 1},
        SURE: {"logprobs": True},
        SHORT: {"max_completion_tokens": 1},
        REFUSED: {"tools": [{"type": "function", "function": {"name": "f"}}]},
    }.get(number, {})
    line = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions"}
    return {**line, "body": body}


@pytest.fixture(scope="module")
def items() -> list[HeldOutItem]:
    single = (item for item in held_out(60) if len(item.images) == 1)
    return [item for item, _ in zip(single, range(NUM_REQUESTS), strict=False)]


@pytest.fixture(scope="module")
def answers(
    items: list[HeldOutItem], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("batch")
    lines = [json.dumps(request(item, i, folder)) for i, item in enumerate(items)]
    lines[BROKEN] = lines[BROKEN][:100]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    out = folder / "out"
    overrides = ["data=openai", f"data.path={folder / 'requests.jsonl'}", f"output.dir={out}"]
    run_job(compose("run", [*overrides, "runtime.num_workers=0", "output.rows_per_shard=30"]))
    path = folder / "new" / "answers.jsonl"
    assert main(["export", str(out), "--to", "openai", "--path", str(path)]) == ExitCode.DONE
    assert [p.name for p in path.parent.iterdir()] == ["answers.jsonl"]
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_request_has_its_answer_under_its_own_name(
    items: list[HeldOutItem], answers: list[dict[str, Any]]
) -> None:
    assert len(answers) == NUM_REQUESTS
    names = [f"request-{i}" for i in range(NUM_REQUESTS)]
    names[BROKEN] = f"requests.jsonl:{BROKEN}"
    assert [answer["custom_id"] for answer in answers] == names
    assert len({answer["id"] for answer in answers}) == NUM_REQUESTS
    bad = {BROKEN, REFUSED}
    right = 0
    for i, (item, answer) in enumerate(zip(items, answers, strict=True)):
        if i in bad:
            continue
        assert set(answer) == {"id", "custom_id", "response", "error"}
        assert (answer["response"]["status_code"], answer["error"]) == (200, None)
        body = answer["response"]["body"]
        assert (body["object"], body["model"]) == ("chat.completion", "batchvlm-demo")
        usage = body["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
        first = body["choices"][0]
        assert first["message"]["role"] == "assistant"
        if i not in (SAMPLED, SHORT):
            assert (len(body["choices"]), first["finish_reason"]) == (1, "stop")
            right += first["message"]["content"] == item.answer
    # The demo model's own accuracy is above 99%.
    assert right >= NUM_REQUESTS - 4 - 2


def test_bad_requests_are_errors_as_a_server_gives_them(answers: list[dict[str, Any]]) -> None:
    for number, code, words in ((BROKEN, "input", "no usable JSON"), (REFUSED, "prompt", "tools")):
        answer = answers[number]
        assert answer["response"]["status_code"] == 400
        assert answer["error"]["code"] == code
        assert words in answer["error"]["message"]
        assert answer["response"]["body"]["error"]["message"] == answer["error"]["message"]


def test_what_a_request_asks_for_is_done(answers: list[dict[str, Any]]) -> None:
    bodies = [answer["response"]["body"] for answer in answers]
    choices = bodies[SAMPLED]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) > 1
    assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)

    sure = bodies[SURE]
    content = sure["choices"][0]["logprobs"]["content"]
    assert len(content) == sure["usage"]["completion_tokens"]
    text = "".join(token["token"] for token in content[:-1])
    assert text.strip() == sure["choices"][0]["message"]["content"].strip()
    assert all(token["logprob"] <= 1e-4 for token in content)
    assert bodies[0]["choices"][0]["logprobs"] is None

    short = bodies[SHORT]
    assert short["usage"]["completion_tokens"] == 1
    assert short["choices"][0]["finish_reason"] == "length"
