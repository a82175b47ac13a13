"""The dataset card: what the Hub reads, what people read, and what must not be in it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard

from batchvlm.config import TaskName
from batchvlm.output.schema import output_schema
from batchvlm.report.card import (
    MARK,
    MEANINGS,
    card,
    complete_card,
    write_card,
    write_finished_card,
    write_first_card,
)
from batchvlm.report.outputs import Output
from tests.report.conftest import answer
from tests.report.make import make_output
from tests.report.test_report import make, visible

NEEDED = {
    TaskName.caption: [],
    TaskName.vqa: [],
    TaskName.extract: ["task.output.choice=[yes,no]"],
    TaskName.dialog: ["data.columns.turns=talk"],
}
"""Settings that a task does not go without."""


def test_the_header_is_what_the_hub_expects(output: Output) -> None:
    data = DatasetCard(card(output)).data.to_dict()
    assert data["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    assert data["task_categories"] == ["image-to-text"]
    assert data["size_categories"] == ["n<1K"]
    assert data["pretty_name"] == "parquet: caption by batchvlm-demo"


def test_load_dataset_reads_the_folder(output: Output, tmp_path: Path) -> None:
    assert write_card(output) == output.folder.root / "README.md"
    rows = datasets.load_dataset(str(output.folder.root), split="train", cache_dir=str(tmp_path))
    assert rows["row_index"] == list(range(60))


def test_it_says_what_is_there(output: Output) -> None:
    text = card(output)
    assert "60 rows, one for every row of the input `in.parquet`" in text
    assert "| Errors | 7 rows: 6 `decode`, 1 `oom` |" in text
    assert "```text\n{{ question }}\n```" in text
    assert "| `generation.max_new_tokens` | 256 |" in text
    assert "| `generated_text` | `string` | the answer; null where there is none |" in text


@pytest.mark.parametrize("task", TaskName)
def test_every_task_has_a_card(tmp_path: Path, source: Path, task: TaskName) -> None:
    output = make_output(
        tmp_path / "out", source, answer, f"task={task.value}", *NEEDED[task], name="run"
    )
    text = card(output)
    assert len(DatasetCard(text).data.to_dict()["task_categories"]) == 1
    assert f"| Task | {task.value} |" in text
    turns = "Prompts are the user turns of the column `talk`."
    assert (turns in text) == (task is TaskName.dialog) != ("## Prompt" in text)


def test_every_column_has_a_meaning() -> None:
    columns = ("generated_texts", "token_ids", "logprobs", "scores", "constraint")
    schema = output_schema([], **dict.fromkeys(columns, True))
    assert set(schema.names) <= MEANINGS.keys()


def test_hostile_words_stay_words(tmp_path: Path, source: Path) -> None:
    evil = 'a: "b"\\n---\\n```\\n<img src=x> | [x](y)'
    output = make_output(
        tmp_path / "out",
        source,
        answer,
        f"task.prompt='{evil}'",
        "model.name='x: | <b> `y`'",
    )
    text = card(output)
    data = DatasetCard(text).data.to_dict()
    assert data["pretty_name"] == "parquet: caption by x: | <b> `y`"
    assert "| Model | x: \\| \\<b\\> \\`y\\` |" in text


def test_a_fence_in_the_prompt_does_not_end_the_block(tmp_path: Path, source: Path) -> None:
    output = make_output(tmp_path / "out", source, answer, "task.prompt='say ```` and <b>'")
    assert "`````text\nsay ```` and <b>\n`````" in card(output)


def test_the_text_that_answers_continue(tmp_path: Path, source: Path) -> None:
    output = make_output(tmp_path / "out", source, answer, "task.answer_prefix='I see'")
    assert "Each answer continues this text" in card(output)
    assert "```text\nI see\n```" in card(output)
    assert "Answers continue I see" in visible(make(output))


def test_neither_passwords_nor_paths_of_this_machine(tmp_path: Path, source: Path) -> None:
    output = make_output(tmp_path / "out", source, answer)
    path = output.folder.run_json
    run = json.loads(path.read_text())
    assert str(tmp_path.parent) not in card(output)
    run["settings"]["data"]["path"] = "s3://key:secret@bucket/in.parquet?sig=abc"
    run["settings"]["model"]["processor_kwargs"] = {"token": "hf_" + "x" * 30}
    path.write_text(json.dumps(run))
    from batchvlm.report.outputs import open_output

    text = card(open_output(tmp_path / "out"))
    assert "s3://bucket/in.parquet" in text
    assert "secret" not in text and "sig=" not in text and "xxx" not in text


def test_only_a_finished_job_gets_one_and_somebody_elses_stays(
    tmp_path: Path, source: Path
) -> None:
    rows = "output.rows_per_shard=16"
    unfinished = make_output(tmp_path / "a", source, answer, rows, leave_out=[1])
    write_finished_card(unfinished.folder)
    readme = tmp_path / "a" / "README.md"
    assert not readme.exists()
    finished = make_output(tmp_path / "a", source, answer, rows)
    write_finished_card(finished.folder)
    assert MARK in readme.read_text()
    readme.write_text("mine")
    assert write_card(finished) is None and readme.read_text() == "mine"


def test_the_first_card_reads_what_is_there_so_far(tmp_path: Path, source: Path) -> None:
    rows = "output.rows_per_shard=16"
    root = tmp_path / "out"
    output = make_output(root, source, answer, rows, leave_out=[1])
    write_first_card(output.folder, output.run, output_schema([]))
    readme = root / "README.md"
    text = readme.read_text()
    assert "not finished when this was written: rows so far, 0 of 60" in text
    assert "| `generated_text` | `string` |" in text
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(str(root), split="train", cache_dir=cache)
    assert len(found) == 44
    complete_card(output.folder)
    assert readme.read_text() == text
    finished = make_output(root, source, answer, rows)
    complete_card(finished.folder)
    whole = readme.read_text()
    assert "60 rows, one for every row" in whole
    # Started again, to answer failed rows, say.
    write_first_card(finished.folder, finished.run, output_schema([]))
    assert readme.read_text() == whole


def test_the_first_card_takes_the_place_of_another_runs_and_of_nobody_elses(
    tmp_path: Path, source: Path
) -> None:
    output = make_output(tmp_path / "out", source, answer)
    readme = tmp_path / "out" / "README.md"
    readme.write_text(f"{MARK}\nof the run that was overwritten")
    write_first_card(output.folder, output.run, output_schema([]))
    assert output.run.fingerprint in readme.read_text()
    readme.write_text("mine")
    write_first_card(output.folder, output.run, output_schema([]))
    complete_card(output.folder)
    assert readme.read_text() == "mine"


def test_a_folder_that_cannot_be_read_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from batchvlm.output.folder import OutputFolder

    write_finished_card(OutputFolder(tmp_path / "nothing"))
    assert "no dataset card" in caplog.text


def test_a_card_that_cannot_be_made_is_a_warning_too(
    output: Output, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(found: Output) -> None:
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr("batchvlm.report.card.write_card", fail)
    write_finished_card(output.folder)
    assert "no dataset card: what nobody thought of" in caplog.text
