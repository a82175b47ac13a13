"""Answers that begin with given text: the demo model goes on as it does by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.demo.questions import held_out
from batchvlm.pipeline.pipeline import run_job
from batchvlm.settings.compose import compose
from tests.conftest import IMAGE
from tests.pipeline.test_pipeline import rows_of

NUM_ROWS = 8


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_an_answer_goes_on_where_its_beginning_ends(tmp_path: Path, engine: str) -> None:
    items = [item for item in held_out(NUM_ROWS) if item.kind == "caption"]
    images = pa.array([{"bytes": item.images[0], "path": None} for item in items], IMAGE)
    questions = [item.question for item in items]

    def run(name: str, columns: dict[str, pa.Array], *settings: str) -> list[str]:
        source, out = tmp_path / f"{name}.parquet", tmp_path / name
        pq.write_table(pa.table({"image": images, **columns}), source)
        settings = ("data=parquet", f"data.path={source}", f"output.dir={out}", *settings)
        run_job(compose("run", [*settings, f"engine={engine}", "runtime.num_workers=0"]))
        rows = rows_of(out)
        assert {row["error_message"] for row in rows} == {None}
        return [row["generated_text"] for row in rows]

    whole = run("whole", {"question": pa.array(questions)}, "task=vqa")
    assert len(set(whole)) > NUM_ROWS // 2
    begun = [text[: text.index(" ", 1 + i)] for i, text in enumerate(whole)]
    rest = [text.removeprefix(start) for text, start in zip(whole, begun, strict=True)]

    columns = {"question": pa.array(questions), "begun": pa.array(begun)}
    assert run("prefix", columns, "task=vqa", "task.answer_prefix='{{ begun }}'") == rest

    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": start}]
        for question, start in zip(questions, begun, strict=True)
    ]
    columns = {"chat": pa.array(map(json.dumps, chats))}
    settings = ("data.columns.messages=chat", "task.continue_final_message=true")
    assert run("messages", columns, *settings) == rest
