"""The report's page: what it says, and that no text from the data becomes anything but text."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.errors import OutputError
from batchvlm.report.outputs import Output, open_output
from batchvlm.report.plots import MissingLibraryError
from batchvlm.report.report import report
from tests.report.conftest import EVIL, NUM_ROWS, answer, write_input
from tests.report.make import answered, make_output


def make(output: Output, *, num_sampled: int = 500, num_failed: int = 500, **options: Any) -> str:
    return report(output, num_sampled=num_sampled, num_failed=num_failed, **options)


def rows_of(page: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.S)
    assert match is not None
    rows: list[dict[str, Any]] = json.loads(match[1])
    return rows


def visible(page: str) -> str:
    """The page's text without scripts, styles and tags."""
    page = re.sub(r"<(script|style|svg)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


@pytest.fixture(scope="module")
def page(output: Output) -> str:
    return make(output)


def test_the_summary(page: str) -> None:
    text = visible(page)
    assert "Rows 60 of 60 in the input" in text
    assert "Answered 88.3% 53 rows" in text
    assert "Errors 11.7% 7 rows" in text
    assert "Running time 100 s 1 process" in text
    assert "Rows per second 0.6" in text
    assert "Prompt template {{ question }}" in text
    assert "generation.max_new_tokens 256" in text


def test_errors_come_by_type_with_examples_and_without_passwords(page: str) -> None:
    assert "decode 6 row-003 6 bytes are no readable image" in visible(page)
    assert "oom 1 row-005 too large: https://host/x" in visible(page)
    assert "secret" not in page and "sig=1" not in page


def test_distributions_have_their_numbers_beside_them(page: str) -> None:
    text = visible(page)
    assert page.count("<svg") == 7
    for title in ("Rows per second", "Prompt tokens", "Answer tokens", "Latency"):
        assert f"{title} in numbers" in text
    assert "20 53" in text  # every answered row has 20 prompt tokens


def test_text_from_the_data_is_only_ever_text(page: str) -> None:
    assert "<script>alert" not in page and "<img src=x" not in page and "<b>bold" not in page
    # The page's own data and code, and nothing else.
    assert re.findall(r"<script[^>]*>", page) == [
        '<script type="application/json" id="rows">',
        "<script>",
    ]
    rows = {row["row"]: row for row in rows_of(page)}
    assert rows[7]["id"] == EVIL and rows[7]["answers"][0]["text"] == EVIL
    assert rows[8]["prompt"].endswith("x</script><b>bold</b>")


def test_the_browser_may_load_and_run_nothing_else(page: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert html.unescape(policy).startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href|action)=["']?(https?:)?//""", page)
    # Inline styles and handlers would be refused by that policy.
    assert not re.search(r"<[^>]*\s(style|on\w+)=", re.sub(r"<script.*?</script>", "", page))


def test_rows_have_prompt_answer_and_thumbnail(page: str) -> None:
    rows = {row["row"]: row for row in rows_of(page)}
    assert len(rows) == NUM_ROWS
    assert rows[4]["prompt"] == "[image 1]\nWhat is in 4?"
    assert rows[4]["answers"] == [{"label": "Answer", "text": "A cat number 4."}]
    assert rows[4]["images"][0].startswith("data:image/webp;base64,")
    assert rows[3]["images"] == [] and rows[3]["error"] == "decode"
    assert (rows[4]["tokens"], rows[4]["seconds"]) == (9, 0.5)


def test_a_sample_is_seeded_and_every_failed_row_is_in_it(output: Output) -> None:
    one, two, other = (rows_of(make(output, num_sampled=5, seed=seed)) for seed in (1, 1, 2))
    assert one == two and [row["row"] for row in one] != [row["row"] for row in other]
    assert sum(row["status"] == "error" for row in one) == 7
    assert 10 <= len(one) <= 12
    few = make(output, num_sampled=0, num_failed=3)
    assert len(rows_of(few)) == 3
    assert "3 of 60 rows: 0 drawn at random, and 3 of the 7 with an error." in visible(few)


def test_json_answers_by_field(extract_output: Output) -> None:
    page = make(extract_output)
    text = visible(page)
    assert "color 60 values, 2 different" in text and "red 40" in text and "blue 20" in text
    assert "count 60 values, 4 different; numbers from 0 to 3, mean 1.5" in text
    assert f"parts[].name 60 values, 1 different value times {EVIL} 60" in text
    assert "<script>alert" not in page
    assert ["parts[0].name", EVIL] in rows_of(page)[0]["fields"]


def test_frequent_answers(tmp_path: Path, source: Path) -> None:
    choice = make_output(tmp_path / "out", source, lambda row: answered("yn"[row % 4 == 0]))
    assert "Most frequent answers 60 values, 2 different value times y 45" in visible(make(choice))
    nothing = make_output(tmp_path / "nothing", source, lambda row: answered(""))
    assert "1 different value times empty 60" in visible(make(nothing))


def test_a_folder_without_a_time_line(source: Path, tmp_path: Path) -> None:
    output = make_output(tmp_path / "out", source, answer)
    output.folder.metrics.mkdir(parents=True)
    counts = {"num_rows": 60, "run_s": 30.0, "wait_s": 6.0, "engine": {"decode_s": 12.0}}
    (output.folder.metrics / "task-0.json").write_text(json.dumps(counts))
    text = visible(make(output))
    assert "no time line" in text and "Rows per second 2.0 of one process" in text
    assert "waiting for data: 6 s 20%" in text and "answers, token by token: 12 s 40%" in text


def test_a_dialog_shows_every_turn(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet")
    table = pq.read_table(source)
    turns = [[f"What is {row}?", "And where?"] for row in range(table.num_rows)]
    pq.write_table(table.append_column("turns", pa.array(turns)), source)
    out = make_output(
        tmp_path / "out",
        source,
        lambda row: answered("here", generated_texts=("a cat", "here")),
        "task=dialog",
        "data.columns.turns=turns",
        generated_texts=True,
    )
    page = report(out, num_sampled=60, num_failed=0)
    assert "User turns from column turns" in visible(page)
    row = rows_of(page)[4]
    assert row["prompt"] == "user: [image 1]\nWhat is 4?\n\nuser: And where?"
    assert [answer["text"] for answer in row["answers"]] == ["a cat", "here"]


def test_an_unfinished_job_says_so(source: Path, tmp_path: Path) -> None:
    few = make_output(
        tmp_path / "a", source, answer, "output.rows_per_shard=16", leave_out=[1, 2, 3]
    )
    assert "16 of 60 rows are in finished shards" in visible(make(few))
    none = make_output(tmp_path / "b", source, answer, leave_out=[0])
    assert "0 of 60 rows are in finished shards" in visible(make(none))


def test_an_input_that_is_gone_or_has_changed_is_said_and_shows_nothing(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet")
    output = make_output(tmp_path / "out", source, answer, "task.prompt='{{ question }}'")
    moved = shutil.move(source, tmp_path / "moved.parquet")
    page = make(output)
    assert "Prompts and images are not shown, since the input is not there any more" in page
    assert all(not row["images"] and row["prompt"] is None for row in rows_of(page))
    shutil.copy(moved, source)
    assert rows_of(make(output))[4]["images"]
    pq.write_table(pq.read_table(moved).slice(1), source)
    assert "is not what the run has read any more" in visible(make(output))


def test_an_input_that_has_moved_can_be_named(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet")
    output = make_output(tmp_path / "out", source, answer)
    (tmp_path / "new").mkdir()
    moved = shutil.move(source, tmp_path / "new" / "in.parquet")
    assert rows_of(make(output, input_path=str(moved)))[4]["images"]


def test_images_that_took_the_run_down_are_not_opened_again(tmp_path: Path) -> None:
    from batchvlm.errors import ErrorType
    from tests.report.make import failed

    source = write_input(tmp_path / "in.parquet", 2)
    kinds = (ErrorType.TIMEOUT, ErrorType.ENGINE)
    output = make_output(tmp_path / "out", source, lambda row: failed(kinds[row], "no"))
    rows = rows_of(make(output))
    assert [len(row["images"]) for row in rows] == [0, 1]
    assert "not opened again" in rows[0]["note"]


def test_images_are_not_fetched_from_addresses(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["a"], "image": ["https://127.0.0.1:9/a.png"]}), source)
    out = make_output(tmp_path / "out", source, answer, "data.allow_remote=true")
    (row,) = rows_of(make(out))
    assert row["prompt"] == "[image 1]\nDescribe the image." and row["images"] == []
    assert row["note"] == "images are not fetched from URLs"


def test_a_damaged_part_is_one_line(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet")
    output = make_output(tmp_path / "out", source, answer, "output.rows_per_shard=16")
    output.parts[2].write_bytes(b"PAR1 no more")
    with pytest.raises(OutputError, match=r"part-00002-of-00004.parquet cannot be read") as caught:
        make(open_output(output.folder.root))
    assert "\n" not in str(caught.value)


def test_without_matplotlib_it_is_one_line(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'batchvlm\[report\]'"):
        make(output)
