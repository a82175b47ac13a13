"""A whole job whose answers come from a server: the same output as ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import BaseModel

from batchvlm.demo.questions import held_out
from batchvlm.engine import endpoint
from batchvlm.errors import ConfigError, EndpointError, ExitCode
from batchvlm.pipeline.pipeline import run_job
from batchvlm.settings.compose import compose
from tests.conftest import IMAGE, encode, picture

from .engine.stand_in import Reply, Request, StandIn, chat, echo

Writer = Callable[..., Path]


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


def run(server: StandIn, source: Path, out: Path, *overrides: str, name: str = "run") -> None:
    settings = (
        f"engine.endpoint.url={server.url}",
        *("engine=endpoint", "model=hub", "model.path=user/model"),
        *("data=parquet", f"data.path={source}", f"output.dir={out}", "runtime.num_workers=0"),
    )
    run_job(compose(name, [*settings, *overrides]))


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ds.dataset(out / "data").to_table().to_pylist()
    return rows


def test_the_output_is_the_same_as_ever(
    tmp_path: Path,
    write_parquet: Writer,
    server: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BATCHVLM_ENDPOINT_TOKEN", "sk-secret")
    turned = encode(Image.new("RGB", (60, 20), "blue"), "JPEG", exif=_turned_by_90())
    source = write_parquet([picture(), b"no image", None, turned])
    run(server, source, tmp_path / "out", "generation.logprobs=false", "model.max_image_pixels=300")
    rows = rows_of(tmp_path / "out")
    assert [row["error_type"] for row in rows] == [None, "decode", "missing_image", None]
    good = rows[0]
    assert good["generated_text"] == "Describe the image. [1]"
    assert (good["prompt_tokens"], good["completion_tokens"]) == (11, 3)
    assert good["image_tokens"] is None and good["num_images"] == 1
    assert good["finish_reason"] == "stop" and good["model"] == "user/model"
    assert rows[3]["image_sizes"][0]["width"] < rows[3]["image_sizes"][0]["height"]
    assert good["image_sizes"][0]["width"] * good["image_sizes"][0]["height"] <= 300
    # Bad images end here; the server never sees them.
    assert len(server.requests) == 2
    assert server.requests[0].headers["authorization"] == "Bearer sk-secret"
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"sk-secret" not in path.read_bytes()


def _turned_by_90() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_worker_processes_prepare_without_torch(
    tmp_path: Path, write_parquet: Writer, server: StandIn
) -> None:
    source = write_parquet([picture()] * 5)
    run(server, source, tmp_path / "out", "runtime.num_workers=1")
    assert all(row["status"] == "success" for row in rows_of(tmp_path / "out"))
    code = (
        "import sys; from batchvlm.config import *; from batchvlm.preprocess.preprocessor import *;"
        "Preprocessor(PreprocessSpec(model=ModelConfig(path='m'), task=TaskConfig(prompt='a'),"
        "columns=ColumnsConfig(image='image'), generation=GenerationConfig(), image_root=None,"
        "max_source_pixels=99, sent_as=ImageFormat.png));"
        "sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_turn_of_a_dialog_is_asked(
    tmp_path: Path, write_parquet: Writer, server: StandIn
) -> None:
    turns = [["one", "two", "three"], ["alone"]]
    source = write_parquet([picture()] * 2, turns=turns)
    run(server, source, tmp_path / "out", "task=dialog", "data.columns.turns=turns")
    rows = rows_of(tmp_path / "out")
    assert [row["generated_texts"] for row in rows] == [
        ["one [1]", "two [0]", "three [0]"],
        ["alone [1]"],
    ]
    assert rows[0]["completion_tokens"] == 3 * 3
    (last,) = [r for r in server.rows if r.text == "three"]
    assert [m["role"] for m in last.body["messages"]] == ["user", "assistant"] * 2 + ["user"]


def test_answers_of_an_extract_task_are_judged_and_guided(
    tmp_path: Path, write_parquet: Writer, server: StandIn
) -> None:
    own = {"type": "object", "required": ["b"]}
    source = write_parquet([picture()] * 2, schema=[None, json.dumps(own)])
    server.reply = lambda request: chat('{"a": 1}')
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["a"]}))
    run(
        *(server, source, tmp_path / "out"),
        f"task.output.json_schema={schema}",
        "task.output.json_schema_column=schema",
        name="extract",
    )
    rows = rows_of(tmp_path / "out")
    assert [row["json_valid"] for row in rows] == [True, False]
    assert rows[0]["parsed"] == '{"a":1}' and rows[1]["error_type"] == "invalid_json"
    formats = [r.body["response_format"]["json_schema"]["schema"] for r in server.requests]
    assert sorted(schema["required"] for schema in formats) == [["a"], ["b"]]


class Animal(BaseModel):
    """For `task.output.pydantic`."""

    name: str
    legs: int


ANIMAL = {"name": "spider", "legs": 8}
HEX = r"#[0-9a-f]{6}"


@pytest.mark.parametrize(
    ("settings", "word", "asked", "good", "bad", "parsed"),
    [
        (["json_schema=any"], "json", {"type": "object"}, '{"a": 1}', "[]", '{"a":1}'),
        (
            [f"pydantic={__name__}:Animal"],
            *("json", Animal.model_json_schema()),
            *(json.dumps(ANIMAL), '{"name": "spider"}', ANIMAL),
        ),
        (["choice=[cat,dog]"], "choice", ["cat", "dog"], "dog", "a dog", "dog"),
        (["choice_column=choices"], "choice", ["x", "y"], "y", "z", "y"),
        ([f"regex='{HEX}'"], "regex", HEX, "#00ff7f", "#00ff7", "#00ff7f"),
        (
            ['grammar=\'start: "(" start ")" | "x"\''],
            *("grammar", 'start: "(" start ")" | "x"'),
            *("((x))", "((x)", "((x))"),
        ),
        (["type=integer"], "json", {"type": "integer"}, "12", '"12"', 12),
        (["type=date"], "regex", None, "2026-02-03", "3 Feb", "2026-02-03"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_every_form_is_sent_validated_and_typed(
    tmp_path: Path,
    write_parquet: Writer,
    server: StandIn,
    settings: list[str],
    word: str,
    asked: Any,
    good: str,
    bad: str,
    parsed: Any,
) -> None:
    source = write_parquet([picture()] * 2, question=["good", "bad"], choices=[["x", "y"]] * 2)
    server.reply = lambda request: chat(good if "good" in request.text else bad)
    run(
        *(server, source, tmp_path / "out", 'task.prompt="{{ question }}"'),
        *(f"task.output.{setting}" for setting in settings),
        *("task.instructions=off", "engine.endpoint.response_format=vllm"),
        name="extract",
    )
    sent = [request.body["structured_outputs"] for request in server.requests]
    assert all(set(fields) == {word} for fields in sent) and len(sent) == 2
    assert asked is None or sent == [{word: asked}] * 2
    first, second = rows_of(tmp_path / "out")
    assert (first["status"], first["json_valid"], first["parsed"]) == ("success", True, parsed)
    assert (second["error_type"], second["generated_text"]) == ("invalid_json", bad)
    # A server does not say how far it has held an answer.
    assert first["constraint"] is None


@pytest.mark.parametrize(
    ("setting", "response_format", "kind"),
    [
        ("choice=[cat,dog]", "json_schema", "choice"),
        ("choice_column=choices", "json_schema", "choice"),
        ("regex=a+", "json_schema", "regex"),
        ("type=date", "json_schema", "regex"),
        ("grammar='start: \"x\"'", "tgi", "grammar"),
    ],
)
def test_a_form_that_the_protocol_has_no_word_for_is_refused_before_the_first_row(
    tmp_path: Path,
    write_parquet: Writer,
    server: StandIn,
    setting: str,
    response_format: str,
    kind: str,
) -> None:
    source = write_parquet([picture()], choices=[["x", "y"]])
    settings = (f"task.output.{setting}", f"engine.endpoint.response_format={response_format}")
    with pytest.raises(ConfigError, match=rf"cannot express a form of kind {kind}.*vllm"):
        run(server, source, tmp_path / "out", *settings, name="extract")
    assert server.requests == []
    # Not to be held to it is another matter.
    server.reply = lambda request: chat("nothing of the kind")
    for i, free in enumerate(("task.output.guided=off", "engine.endpoint.response_format=none")):
        out = tmp_path / f"out-{i}"
        run(server, source, out, *settings, free, name="extract")
        (row,) = rows_of(out)
        assert row["error_type"] == "invalid_json"
    named = {"model", "messages", "max_tokens", "temperature"}
    assert all(set(request.body) == named for request in server.requests)


def test_no_server_says_how_far_an_answer_was_held(
    tmp_path: Path, write_parquet: Writer, server: StandIn
) -> None:
    source = write_parquet([picture()])
    settings = ("task.output.json_schema=any", "task.output.guided=strict")
    with pytest.raises(ConfigError, match=r"task\.output\.guided=strict"):
        run(server, source, tmp_path / "out", *settings, name="extract")


def test_a_batch_file_is_sent_on(tmp_path: Path, server: StandIn) -> None:
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "top_k": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": request}
    (tmp_path / "in.jsonl").write_text(json.dumps(line | {"body": request | {"model": "m"}}) + "\n")
    cfg = compose(
        "run",
        [
            *(
                "data=openai",
                f"data.path={tmp_path}/in.jsonl",
                "model=hub",
                "model.path=user/model",
            ),
            *("engine=endpoint", f"engine.endpoint.url={server.url}", "runtime.num_workers=0"),
            f"output.dir={tmp_path}/out",
        ],
    )
    run_job(cfg)
    (row,) = rows_of(tmp_path / "out")
    assert (row["id"], row["generated_text"], row["token_ids"]) == ("a", "Hi [0]", None)
    sent = server.requests[0].body
    assert (sent["max_tokens"], sent["top_k"], sent["model"]) == (5, 4, "user/model")


def test_a_server_that_is_gone_ends_the_run_and_the_rerun_goes_on(
    tmp_path: Path, write_parquet: Writer, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_MIN_BACKOFF_S", 0.0)
    source = write_parquet([picture()] * 30, question=[f"row {i}" for i in range(30)])
    one_by_one = (
        *("task.prompt='{{ question }}'", "engine.endpoint.max_concurrency=1"),
        "engine.endpoint.patience_s=0",
    )
    gone = Reply(status=503, body=b"gone")

    def reply(request: Request) -> Reply:
        if len(server.rows) > 10:
            server.probe = lambda request: gone
            return gone
        return echo(request)

    server.reply = reply
    with pytest.raises(EndpointError) as caught:
        run(server, source, tmp_path / "out", *one_by_one)
    assert caught.value.exit_code is ExitCode.INTERRUPTED
    # It has moved to another port; what is finished is not asked again.
    with StandIn() as other:
        run(other, source, tmp_path / "out", *one_by_one)
    rows = rows_of(tmp_path / "out")
    assert [row["generated_text"] for row in rows] == [f"row {i} [1]" for i in range(30)]
    assert len(other.rows) == 20


@pytest.mark.soak
def test_transformers_serve_and_a_local_run_say_the_same(tmp_path: Path) -> None:
    """The demo model behind a real server: captions, answers about one and two images, JSON."""
    pytest.importorskip("fastapi")
    items = held_out(2)
    images = [[{"bytes": data, "path": None} for data in item.images] for item in items]
    table = {"images": pa.array(images, pa.list_(IMAGE)), "question": [i.question for i in items]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    about = (
        *("task.prompt='{{ question }}'", "data=parquet", f"data.path={tmp_path}/in.parquet"),
        *("data.columns.image=images", "generation.max_new_tokens=200", "runtime.num_workers=1"),
    )
    run_job(compose("vqa", [*about, f"output.dir={tmp_path}/local"]))
    with StandIn() as free:
        port = free.port
    arguments = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", port]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *map(str, arguments)]
    server = subprocess.Popen(
        command,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        served = ("engine=endpoint", f"engine.endpoint.url=http://127.0.0.1:{port}")
        run_job(compose("vqa", [*about, *served, f"output.dir={tmp_path}/served"]))
    finally:
        server.kill()
        server.wait()
    same = ("status", "generated_text", "finish_reason", "prompt_tokens", "completion_tokens")
    local, answers = (rows_of(tmp_path / name) for name in ("local", "served"))
    assert [{k: row[k] for k in same} for row in answers] == [
        {k: row[k] for k in same} for row in local
    ]
    assert {row["num_images"] for row in answers} == {1, 2}
    right = [row["generated_text"] == i.answer for row, i in zip(answers, items, strict=True)]
    assert np.mean(right) > 0.9
    assert answers[0]["model"] == "batchvlm-demo"
