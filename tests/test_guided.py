"""Whole jobs whose answers are held to a form, with the demo model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from batchvlm.pipeline.form_retries import FormRetries
from batchvlm.pipeline.pipeline import run_job
from batchvlm.pipeline.summary import print_summary
from batchvlm.prompts.builder import instructions
from batchvlm.records import Completion, FinishReason, Generation, Sample
from batchvlm.report.outputs import open_output
from batchvlm.report.report import report
from batchvlm.settings.compose import compose

from .conftest import picture

ROOT = Path(__file__).parent.parent


def table_of(out: Path) -> pa.Table:
    return ds.dataset(out / "data").to_table()


def run(out: Path, *overrides: str, name: str = "extract") -> pa.Table:
    small = ["data.max_rows=3", "runtime.num_workers=0", "batching.sort_window=6"]
    run_job(compose(name, [f"output.dir={out}", *small, *overrides]))
    return table_of(out)


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_answers_are_typed_and_say_how_far_they_were_held(tmp_path: Path, engine: str) -> None:
    table = run(tmp_path / "out", f"engine={engine}")
    shapes = pa.struct([(name, pa.string()) for name in ("shape", "color", "size", "position")])
    kind = table.schema.field("parsed").type
    assert kind.field("count").type == pa.int64()
    assert kind.field("objects").type.value_type == shapes
    for row in table.to_pylist():
        assert row["status"] == "success"
        assert (row["constraint"], row["json_valid"]) == ("strict", True)
        assert row["parsed"] == json.loads(row["generated_text"])


def test_every_step_of_the_chain_is_said_and_counted_and_each_answer_is_validated(
    tmp_path: Path, write_parquet: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    color = {"type": "object", "properties": {"color": {"enum": ["red"]}}, "required": ["color"]}
    closed = color | {"additionalProperties": False}
    different = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 2}
    # llguidance wants patterns that cannot overlap; xgrammar leaves out the second half.
    overlapping = color | {"patternProperties": {"a": {"type": "null"}, "^.b": {"type": "null"}}}
    overlapping |= {"additionalProperties": False, "maxProperties": 1}
    partly = {"allOf": [overlapping, {"maxProperties": 0}]}
    none = {"type": "string", "minLength": 3, "maxLength": 1}
    schemas = [closed, different, overlapping, partly, none]
    source = write_parquet([picture("red", (32, 32))] * 5, schema=list(map(json.dumps, schemas)))
    cfg = compose(
        "extract",
        [
            *(f"output.dir={tmp_path / 'out'}", "data=parquet", f"data.path={source}"),
            *("model=demo", "runtime.num_workers=0", "generation.max_new_tokens=60"),
            *("task.output.json_schema=null", "task.output.json_schema_column=schema"),
        ],
    )
    summary = run_job(cfg)
    rows = table_of(tmp_path / "out").to_pylist()
    held = [row["constraint"] for row in rows]
    assert held == ["strict", "lenient", "xgrammar", "xgrammar", "none"]
    assert rows[0]["parsed"] == rows[2]["parsed"] == '{"color":"red"}'
    # It took two of these for none, and validation had the last word.
    assert (rows[3]["json_valid"], rows[3]["error_type"]) == (False, "invalid_json")
    assert rows[4]["json_valid"] is False
    counts = {"strict": 1, "lenient": 1, "xgrammar": 2, "none": 1}
    assert dict(summary.metrics.constraints) == counts
    (written,) = (tmp_path / "out" / "_batchvlm" / "metrics").glob("*.json")
    assert json.loads(written.read_text())["constraints"] == counts
    print_summary(summary)
    assert "guided   2 xgrammar, 1 lenient, 1 none, 1 strict" in capsys.readouterr().out
    page = report(open_output(tmp_path / "out"), num_sampled=4, num_failed=4)
    assert "2 xgrammar, 1 lenient, 1 none, 1 strict" in page


def test_guided_answers_are_right_where_free_ones_are(tmp_path: Path) -> None:
    guided = run(tmp_path / "guided").to_pylist()
    free = run(tmp_path / "free", "task.output.guided=off").to_pylist()
    assert [row["parsed"] for row in guided] == [row["parsed"] for row in free]
    assert {row["constraint"] for row in free} == {None}


def test_choices(tmp_path: Path) -> None:
    table = run(
        tmp_path / "out", "task.output.json_schema=null", "task.output.choice=[circle,square]"
    )
    assert table.schema.field("parsed").type == pa.dictionary(pa.int32(), pa.string())
    for row in table.to_pylist():
        assert row["parsed"] == row["generated_text"]
        assert row["parsed"] in ("circle", "square")


def test_an_answer_that_was_cut_is_answered_again_with_more_room(tmp_path: Path) -> None:
    """And one row each, with how often it was tried."""
    cut = run(tmp_path / "cut", "generation.max_new_tokens=20").to_pylist()
    again = run(
        tmp_path / "again", "generation.max_new_tokens=20", "retry.invalid_json=2"
    ).to_pylist()
    was_cut = [row["error_type"] == "invalid_json" for row in cut]
    assert any(was_cut)
    assert all(
        row["finish_reason"] == "length" for row, bad in zip(cut, was_cut, strict=True) if bad
    )
    for row, bad in zip(again, was_cut, strict=True):
        assert row["status"] == "success"
        assert (row["attempts"] > 1) == bad


def test_the_example_of_the_guide_runs_as_a_job_file(tmp_path: Path) -> None:
    """The demo model has never seen an animal; its answers have the form all the same."""
    table = run(
        tmp_path / "out", "data.max_rows=2", "generation.max_new_tokens=120", name="animals"
    )
    assert 'run_app("animals")' in (ROOT / "jobs" / "animals.py").read_text()
    assert table.schema.field("parsed").type == pa.struct(
        [
            ("location", pa.string()),
            ("activity", pa.string()),
            ("animals_seen", pa.int64()),
            ("animals", pa.list_(pa.field("element", pa.string()))),
        ]
    )
    for row in table.to_pylist():
        assert row["constraint"] == "strict"
        if row["status"] == "success":
            assert 1 <= row["parsed"]["animals_seen"] <= 5
        else:
            assert row["finish_reason"] in ("length", "repetition")


def test_the_prompt_ends_with_the_schema_in_a_compact_form() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {"id": {"type": "string", "description": "é", "examples": ["x"]}},
    }
    text = instructions(json.dumps(schema))
    assert text.endswith('\n{"properties":{"id":{"type":"string","description":"é"}}}')
    assert instructions(json.dumps({"enum": ["x" * 20_000]})) == ""
    # The demo's model knows its few questions to the letter; others are told.
    assert compose("extract").task.instructions.value == "off"
    hub = ["model=hub", "model.path=some/model"]
    assert compose("extract", hub).task.instructions.value == "auto"


def sample(**settings: Any) -> Sample:
    return Sample(
        row_index=3,
        features={},
        image_tokens=0,
        image_sizes=(),
        generation=Generation(max_new_tokens=8, **settings),
        room=12,
    )


def completion(reason: FinishReason) -> Completion:
    return Completion(row_index=3, token_ids=(), text="", finish_reason=reason, latency_s=0.0)


def test_a_row_is_answered_again_by_other_settings() -> None:
    retries = FormRetries(3, max_bytes=1 << 20)
    retries.keep(sample())
    assert retries.retry(3, completion(FinishReason.LENGTH))
    (longer,) = retries.take()
    assert (longer.generation.max_new_tokens, longer.generation.temperature) == (12, 0.0)
    # There is no more room, so it is drawn.
    assert retries.retry(3, completion(FinishReason.LENGTH))
    (drawn,) = retries.take()
    assert drawn.generation.temperature == 0.5
    assert retries.retry(3, completion(FinishReason.STOP))
    (other,) = retries.take()
    assert other.generation.seed != drawn.generation.seed
    assert not retries.retry(3, completion(FinishReason.STOP))
    assert retries.forget(3) == 4
    assert retries.forget(3) == 1
    assert not retries.retry(3, completion(FinishReason.STOP))


def test_rows_for_which_there_is_no_memory_are_answered_once() -> None:
    ids = np.zeros((1, 8), dtype=np.int64)
    first, second = (replace(sample(), row_index=i, features={"input_ids": ids}) for i in (3, 4))
    retries = FormRetries(3, max_bytes=2 * first.size_bytes - 1)
    retries.keep(first)
    retries.keep(second)
    assert not retries.retry(4, completion(FinishReason.STOP))
    assert retries.retry(3, completion(FinishReason.STOP))
    retries.forget(3)
    retries.keep(second)
    assert retries.retry(4, completion(FinishReason.STOP))
