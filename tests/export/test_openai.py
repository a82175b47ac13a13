"""Answers as an OpenAI batch output file; the round trip is in tests/demo/test_openai_batch.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchvlm.cli import main
from batchvlm.errors import BatchvlmError, ExitCode
from batchvlm.records import FinishReason, Sample, Usage
from tests.conftest import picture
from tests.pipeline.test_pipeline import FakeEngine, run

Writer = Callable[..., Path]


class Looping(FakeEngine):
    """Every answer goes round in a cycle."""

    def run(self, samples: Iterable[Sample]) -> Any:
        for index, outcome in super().run(samples):
            yield index, replace(outcome, finish_reason=FinishReason.REPETITION)


def export(out: Path, *flags: str) -> list[dict[str, Any]]:
    path = out / "answers.jsonl"
    assert main(["export", str(out), "--to", "openai", "--path", str(path), *flags]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_any_output_is_exported(tmp_path: Path, write_parquet: Writer) -> None:
    source = write_parquet([picture(), b"no image", picture()])
    run(tmp_path / "out", source, engine=FakeEngine(failing=[2]))
    first, undecodable, failed = export(tmp_path / "out")
    assert first["custom_id"] == "in.parquet:0"
    (choice,) = first["response"]["body"]["choices"]
    assert choice["message"]["content"] == "row 0"
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    codes = [line["response"]["status_code"] for line in (first, undecodable, failed)]
    assert codes == [200, 400, 500]
    assert undecodable["error"]["code"] == "decode"
    assert failed["error"] == {"code": "engine", "message": "told to fail"}
    assert failed["response"]["body"]["error"]["type"] == "server_error"


def test_an_answer_that_breaks_its_schema_is_there_with_its_error(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source = write_parquet([picture()])
    schema = "task.output.json_schema={type: object}"
    run(tmp_path / "out", source, schema, name="extract")
    (line,) = export(tmp_path / "out")
    assert line["response"]["status_code"] == 200
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "row 0"
    assert line["error"]["code"] == "invalid_json"


def test_a_cycle_is_a_length_that_says_why(tmp_path: Path, write_parquet: Writer) -> None:
    run(tmp_path / "out", write_parquet([picture()]), engine=Looping())
    (choice,) = export(tmp_path / "out")[0]["response"]["body"]["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "repetition")


def test_answers_of_a_server_that_counts_no_tokens(tmp_path: Path, write_parquet: Writer) -> None:
    class Served(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Any:
            for index, outcome in super().run(samples):
                yield index, replace(outcome, token_ids=(), usage=Usage())

    run(tmp_path / "out", write_parquet([picture()]), engine=Served())
    body = export(tmp_path / "out")[0]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "row 0"
    assert body["usage"] is None


def test_a_job_that_is_not_done_is_exported_where_asked(
    tmp_path: Path, write_parquet: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ending(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Any:
            yield from sorted(super().run(samples), key=lambda pair: pair[0])[:10]
            raise BatchvlmError("the end")

    out = tmp_path / "out"
    source = write_parquet([picture()] * 20)
    with pytest.raises(BatchvlmError, match="the end"):
        run(out, source, engine=Ending())
    command = ["export", str(out), "--to", "openai", "--path", str(tmp_path / "a.jsonl")]
    assert main(command) == ExitCode.FAILED
    assert "1 of 3 shards are finished" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()
    assert [line["custom_id"] for line in export(out, "--unfinished")] == [
        f"in.parquet:{i}" for i in range(8)
    ]


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, write_parquet: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "out", write_parquet([picture()]))
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "answers.jsonl")
    code = main(["export", str(tmp_path / "out"), "--to", "openai", "--path", path])
    assert code == ExitCode.FAILED
    assert "cannot write" in capsys.readouterr().err
