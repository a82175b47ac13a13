"""The last lines of a run: never in the way of its exit code."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.errors import OutputError
from batchvlm.output.compact import compact
from batchvlm.output.folder import OutputFolder
from batchvlm.pipeline.pipeline import Summary
from batchvlm.pipeline.summary import print_summary
from batchvlm.runtime.metrics import Metrics
from tests.output.test_compact import job


def shown(root: Path, capsys: pytest.CaptureFixture[str], ids: list[str], text: str) -> str:
    folder = OutputFolder(root)
    folder.data.mkdir(parents=True)
    table = pa.table(
        {
            "id": ids,
            "status": ["success"] * len(ids),
            "error_type": pa.nulls(len(ids), pa.string()),
            "error_message": pa.nulls(len(ids), pa.string()),
            "generated_text": [text] * len(ids),
        }
    )
    pq.write_table(table, folder.part(0, 1))
    print_summary(
        Summary(
            folder=folder,
            num_rows=len(ids),
            num_shards=1,
            num_mine=len(ids),
            num_found=0,
            metrics=Metrics(num_rows=len(ids), num_success=len(ids), run_s=1.0),
        )
    )
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "7", "12", "x" * 500, "two\nlines"])
def test_names_of_any_length(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = shown(tmp_path, capsys, [name, name], "A cat.")
    assert out.count("A cat.") == 2
    assert "rows     2: 2 answered, 0 errors" in out


@pytest.mark.parametrize(
    "text", ['{"color":"red"}' * 30, "word " * 100, "x" * 17 + " " + "y" * 500]
)
def test_long_texts_are_cut_by_characters(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = shown(tmp_path, capsys, ["an/id/without/any/space/that/is/long.png"], text)
    (line,) = (line for line in out.splitlines() if line.startswith("  an/id"))
    assert line.startswith(f"  an/id/without/any/space/that/...  {text[:50]}")
    assert line.endswith("...") and 90 < len(line) <= 100


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_damaged_part_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: float
) -> None:
    shown(tmp_path, capsys, ["a"], "A cat.")
    folder = OutputFolder(tmp_path)
    content = folder.part(0, 1).read_bytes()
    folder.part(0, 1).write_bytes(content[: int(len(content) * keep)])
    summary = Summary(folder=folder, num_rows=1, num_shards=1, num_mine=1, num_found=1)
    with pytest.raises(OutputError, match=r"part-00000-of-00001\.parquet cannot be read") as caught:
        print_summary(summary)
    assert "\n" not in str(caught.value)


def test_an_answer_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(tmp_path, capsys, ["a"], "\x1b[2Jred\x07 \u202egnp.exe")
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out and "red" in out


def test_answers_of_merged_parts_are_shown_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job(tmp_path)
    compact(folder, target_rows=100)
    print_summary(Summary(folder=folder, num_rows=25, num_shards=7, num_mine=25, num_found=25))
    assert "in-0.parquet:0" in capsys.readouterr().out
