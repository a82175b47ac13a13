"""Whole jobs whose choices are scored, with the demo model."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchvlm.demo.questions import HeldOutItem, held_out
from batchvlm.errors import ConfigError
from batchvlm.pipeline.pipeline import run_job
from batchvlm.settings.compose import compose
from tests.conftest import IMAGE

SCORES = pa.list_(
    pa.struct([("choice", pa.string()), ("logprob", pa.float32()), ("probability", pa.float32())])
)
KINDS = ("color", "shape_at", "count", "size", "where", "background", "which")


def write(items: list[HeldOutItem], path: Path, **columns: Any) -> None:
    images = [[{"bytes": data, "path": None} for data in item.images] for item in items]
    table = pa.table({"images": pa.array(images, pa.list_(IMAGE)), **columns})
    pq.write_table(table, path, row_group_size=8)


def run(folder: Path, name: str, *overrides: str) -> pa.Table:
    """The output of a job over the folder's input, in `folder / name`."""
    out = folder / name
    cfg = compose(
        "extract",
        [
            *("data=parquet", f"data.path={folder / 'in.parquet'}", "data.columns.image=images"),
            *(f"output.dir={out}", "task.prompt='{{ question }}'"),
            *("task.output.json_schema=null", "runtime.num_workers=0", *overrides),
        ],
    )
    run_job(cfg)
    return ds.dataset(out / "data").to_table().sort_by("row_index")


@pytest.fixture(scope="module")
def items() -> list[HeldOutItem]:
    return [item for item in held_out(60) if item.kind in KINDS]


@pytest.fixture(scope="module")
def choices(items: list[HeldOutItem]) -> list[list[str]]:
    """For each row, the answers that there are to questions of its kind."""
    by_kind: dict[str, set[str]] = defaultdict(set)
    for item in items:
        by_kind[item.kind].add(item.answer)
    return [sorted(by_kind[item.kind]) for item in items]


@pytest.fixture(scope="module")
def folder(
    items: list[HeldOutItem], choices: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    questions = [item.question for item in items]
    write(items, folder / "in.parquet", question=questions, choices=choices)
    return folder


def test_classification_by_scores_is_as_right_as_by_guided_answers(
    items: list[HeldOutItem], choices: list[list[str]], folder: Path
) -> None:
    own = "task.output.choice_column=choices"
    scored = run(folder, "scored", own, "task.scores=true")
    guided = run(folder, "guided", own)
    assert "scores" not in guided.column_names
    right = [
        sum(
            a == item.answer for a, item in zip(t["generated_text"].to_pylist(), items, strict=True)
        )
        for t in (scored, guided)
    ]
    print(f"{len(items)} rows: {right[0]} right by scores, {right[1]} by guided answers")
    assert right[0] >= right[1] >= 0.97 * len(items)
    for row, asked in zip(scored.to_pylist(), choices, strict=True):
        assert [score["choice"] for score in row["scores"]] == asked
        assert sum(score["probability"] for score in row["scores"]) == pytest.approx(1, abs=1e-5)
        best = max(row["scores"], key=lambda score: score["logprob"])
        assert row["parsed"] == row["generated_text"] == best["choice"]
        assert row["finish_reason"] == "stop" and row["constraint"] == "strict"


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_every_part_has_the_same_typed_column_and_a_rerun_gives_the_same(
    folder: Path, engine: str
) -> None:
    few = ["data.max_rows=20", "output.rows_per_shard=8", f"engine={engine}"]
    asked = ["task.output.choice=[red,green,blue,yellow]", "task.scores=true", *few]
    whole = run(folder, engine, *asked)
    assert whole.schema.field("scores").type == SCORES
    assert whole.schema.field("parsed").type == pa.dictionary(pa.int32(), pa.string())
    parts = sorted((folder / engine / "data").glob("*.parquet"))
    assert len(parts) == 3
    schemas = [pq.read_schema(part) for part in parts]
    assert all(schema.equals(schemas[0]) for schema in schemas)
    parts[1].unlink()
    again = run(folder, engine, *asked)
    columns = ["row_index", "parsed", "scores", "generated_text"]
    assert again.select(columns).equals(whole.select(columns))


def test_a_row_without_choices_and_one_that_cannot_be_read_are_errors_and_are_retried(
    items: list[HeldOutItem], tmp_path: Path
) -> None:
    own = [["red", "blue"], None, [], ["red", "red", "blue"]]
    write(
        items[:4],
        tmp_path / "in.parquet",
        question=["What color is it?"] * 4,
        choices=pa.array(own, pa.list_(pa.string())),
    )
    asked = ["task.output.choice_column=choices", "task.scores=true"]
    for attempts in (1, 2):
        table = run(tmp_path, "out", *asked, *["retry.errors=[prompt]"] * (attempts - 1))
        rows = table.to_pylist()
        assert [row["error_type"] for row in rows] == [None, "prompt", "prompt", None]
        assert [row["scores"] and len(row["scores"]) for row in rows] == [2, None, None, 2]
        assert [row["attempts"] for row in rows] == [1, attempts, attempts, 1]
    assert "no choices to score" in rows[1]["error_message"]


def test_a_literal_type_has_choices_too(items: list[HeldOutItem], tmp_path: Path) -> None:
    write(items[:2], tmp_path / "in.parquet", question=["What color is it?"] * 2)
    where = "task.output.pydantic=tests.test_scores:Color"
    for row in run(tmp_path, "out", where, "task.scores=true").to_pylist():
        assert [score["choice"] for score in row["scores"]] == ["red", "dark red", "blue"]
    with pytest.raises(ConfigError, match="scores choices, and the run asks for another form"):
        run(tmp_path, "other", "task.output.pydantic=tests.test_scores:Other", "task.scores=true")


Color = Literal["red", "dark red", "blue"]
Other = list[int]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task.output.json_schema=any"], "task.output.json_schema"),
        (["task.output.regex=a"], "task.output.regex"),
        (["task=caption"], "task=caption"),
        (["engine=endpoint", "engine.endpoint.url=http://x/v1"], "engine=endpoint"),
        (["model.tp_plan=auto"], "model.tp_plan"),
        (["task.output.guided=off"], "task.output.guided=off"),
        (["generation=sample"], "generation.temperature"),
        (["generation.stop=[a]"], "generation.stop"),
        (["generation.columns.top_p=p"], "generation.columns.top_p"),
        (
            ["generation.num_return_sequences=3", "generation.temperature=1"],
            "generation.temperature=1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_does_not_go_with_scores_is_refused_in_one_line(
    overrides: list[str], says: str
) -> None:
    form = (
        []
        if overrides[0].startswith(("task.output.j", "task.output.r", "task="))
        else ["task.output.choice=[a,b]"]
    )
    with pytest.raises(ConfigError) as caught:
        compose("extract", ["task.output.json_schema=null", *form, "task.scores=true", *overrides])
    assert says in caught.value.message and "task.scores=true" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_run_without_scores_has_the_fingerprint_that_it_had(folder: Path) -> None:
    run(folder, "plain", "task.output.choice=[red,blue]", "data.max_rows=1")
    run_file = json.loads((folder / "plain" / "_batchvlm" / "run.json").read_text())
    assert "scores" not in run_file["identity"]["task"]
