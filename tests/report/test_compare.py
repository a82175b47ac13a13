"""Two outputs held against each other: what agrees, what changed, what only one has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.errors import ErrorType, InputError
from batchvlm.records import FinishReason
from batchvlm.report.compare import (
    BOTH,
    CHANGED,
    ONLY_A,
    ONLY_B,
    SAME,
    Comparison,
    compare,
    drawn_rows,
)
from batchvlm.report.differ import changes, page, table
from batchvlm.report.outputs import Output
from tests.report.conftest import EVIL, write_input
from tests.report.make import answered, extracted, failed, make_output
from tests.report.test_report import rows_of, visible


def first(row: int) -> dict[str, Any]:
    if row in (1, 2):
        return failed(ErrorType.DECODE, "no image")
    return answered(f"a red cat number {row}")


def second(row: int) -> dict[str, Any]:
    if row in (2, 3):
        return failed(ErrorType.OOM, "too large")
    if row in (1, 4):
        return answered(f"a blue cat {EVIL}" if row == 4 else "", completion_tokens=100)
    return answered(f"a red cat number {row}", completion_tokens=100)


@pytest.fixture(scope="module")
def pair(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Output, Output]:
    root = tmp_path_factory.mktemp("pair")
    a = make_output(root / "a", source, first, "output.rows_per_shard=16")
    b = make_output(root / "b", source, second, "task.prompt='And now?'")
    return a, b


@pytest.fixture(scope="module")
def found(pair: tuple[Output, Output]) -> Comparison:
    return compare(*pair, num_sampled=100)


def test_every_row_has_one_outcome(found: Comparison) -> None:
    assert found.outcomes == {SAME: 56, CHANGED: 1, ONLY_A: 1, ONLY_B: 1, BOTH: 1}
    drawn = {outcome: draw.rows for outcome, draw in found.drawn.items() if outcome != SAME}
    assert drawn == {CHANGED: [4], ONLY_A: [1], ONLY_B: [3], BOTH: [2]}
    assert found.b.tokens["completion_tokens"].total == 5800


def test_the_table(pair: tuple[Output, Output], found: Comparison) -> None:
    lines = table(*pair, found).splitlines()
    assert "rows in both       60, matched by row_index" in lines
    assert "same answer        56 (93.3%)" in lines
    assert "error only in B    1 (1.7%)" in lines
    cells = [line.split() for line in lines]
    assert ["rows", "in", "both:", "errors", "2", "2"] in cells
    assert ["whole", "output:", "rows", "60", "60"] in cells
    assert "  task.prompt: 'Describe the image.' -> 'And now?'" in lines
    assert ["decode", "2", "0"] in cells and ["oom", "0", "2"] in cells


def test_the_page(pair: tuple[Output, Output], found: Comparison) -> None:
    html = page(*pair, found)
    assert "<script>alert" not in html
    text = visible(html)
    assert "Same answer 98.2% of 57 answered by both" in text
    assert "task.prompt: 'Describe the image.' -> 'And now?'" in text
    rows = {row["row"]: row for row in rows_of(html)}
    assert rows[4]["status"] == CHANGED and rows[4]["images"]
    one, two = rows[4]["answers"]
    assert [part for flag, part in one["parts"] if flag] == ["red", "number", "4"]
    assert "blue" in [part for flag, part in two["parts"] if flag]
    assert rows[2]["message"] == "A: decode, no image\nB: oom, too large"
    assert [answer["empty"] for answer in rows[1]["answers"]] == ["no answer", "empty"]


def test_json_by_field(tmp_path: Path, source: Path) -> None:
    schema = "task.output.json_schema={type: object}"

    def make(name: str, color: str) -> Output:
        def fields(row: int) -> dict[str, Any]:
            shown = color if row < 15 else "red"
            left_out: dict[str, Any] = {} if name == "a" else {"note": None}
            return extracted({"is": {"color": shown}, "parts": [1, 2], "\x1b[2J": 1, **left_out})

        return make_output(tmp_path / name, source, fields, schema, name="extract")

    a, b = make("a", "red"), make("b", "blue")
    found = compare(a, b, num_sampled=5)
    assert found.fields["is.color"] == [45, 60] and found.fields["parts"] == [60, 60]
    assert found.fields["note"] == [60, 60]
    assert (found.num_json_same, found.num_json) == (45, 60)
    text = table(a, b, found)
    assert "  is.color     75%  45 of 60" in text
    assert "\x1b" not in text
    rows = rows_of(page(a, b, found))
    changed = next(row for row in rows if row["status"] == CHANGED)
    assert changed["fields"][0] == ["is.color", '"red"', '"blue"']
    assert changed["fieldTitle"] == "Fields (1 of 4 differ)"


def test_every_answer_of_a_row_is_held_against_the_others(tmp_path: Path, source: Path) -> None:
    """The last turn of a dialog may be the same where the others are not."""

    def make(name: str, first: str) -> Output:
        def fields(row: int) -> dict[str, Any]:
            if row == 0:
                return answered("alone")
            texts = (first if row < 15 else "red", "a cat")
            reasons = (FinishReason.STOP, FinishReason.STOP)
            return answered("a cat", generated_texts=texts, finish_reasons=reasons)

        return make_output(tmp_path / name, source, fields, generated_texts=True)

    a, b = make("a", "red"), make("b", "blue")
    found = compare(a, b, num_sampled=5)
    assert (found.outcomes[SAME], found.outcomes[CHANGED]) == (46, 14)
    assert found.b.num_answers == 119
    assert found.b.num_chars == len("alone") + 59 * len("a cat") + 14 * len("blue") + 45 * len(
        "red"
    )
    rows = rows_of(page(a, b, found))
    changed = next(row for row in rows if row["status"] == CHANGED)
    assert [answer["label"] for answer in changed["answers"]] == [
        *("Answer 1 of A", "Answer 1 of B", "Answer 2 of A", "Answer 2 of B")
    ]
    assert [answer["text"] for answer in changed["answers"]] == ["red", "blue", "a cat", "a cat"]
    assert changed["difference"] == 0.5
    # Against an output of one answer a row, the first one counts: its column generated_text.
    assert compare(a, make_one(tmp_path, source), num_sampled=5).outcomes[SAME] == 59


def make_one(tmp_path: Path, source: Path) -> Output:
    return make_output(tmp_path / "one", source, answered_alike)


def test_other_inputs_are_matched_by_id(tmp_path: Path, source: Path) -> None:
    a = make_output(tmp_path / "a", source, lambda row: answered(f"answer {row}"))
    fewer = write_input(tmp_path / "fewer.parquet", 40)
    b = make_output(tmp_path / "b", fewer, lambda row: answered(f"answer {row if row else 'none'}"))
    found = compare(a, b, num_sampled=10)
    assert found.is_by_id and found.num_both == 40
    assert found.outcomes[CHANGED] == 1 and drawn_rows(found, [CHANGED]) == [0]
    assert "matched by id" in table(a, b, found)
    assert "their rows are matched by id" in visible(page(a, b, found))
    assert found.rows_b.keys() == set(drawn_rows(found))
    by_place = make_output(tmp_path / "c", fewer, answered_alike, "data.columns.id=null")
    assert "is a row's place in its file" in table(a, by_place, found)


def test_an_id_of_several_rows_matches_none(tmp_path: Path, source: Path) -> None:
    a = make_output(tmp_path / "a", source, answered_alike)
    twice = tmp_path / "twice.parquet"
    rows = pq.read_table(source)
    pq.write_table(pa.concat_tables([rows.slice(0, 20), rows.slice(10, 1)]), twice)
    b = make_output(tmp_path / "b", twice, answered_alike)
    for pair in ((a, b), (b, a)):
        with pytest.raises(InputError, match=r"b: 1 repeated id, and the inputs differ"):
            compare(*pair, num_sampled=10)


def answered_alike(row: int) -> dict[str, Any]:
    return answered("a cat")


def test_unfinished_outputs_share_what_they_have(tmp_path: Path, source: Path) -> None:
    rows = "output.rows_per_shard=16"
    a = make_output(tmp_path / "a", source, first, rows, leave_out=[0])
    b = make_output(tmp_path / "b", source, second, rows, leave_out=[3])
    found = compare(a, b, num_sampled=10)
    assert found.num_both == 32 and found.a.num_rows == 44 and found.b.num_rows == 48
    none = make_output(tmp_path / "none", source, second, rows, leave_out=[0, 1, 2, 3])
    with pytest.raises(InputError, match="no finished shard yet"):
        compare(a, none, num_sampled=10)
    only_first = make_output(tmp_path / "c", source, second, rows, leave_out=[1, 2, 3])
    with pytest.raises(InputError, match="no row in common"):
        compare(a, only_first, num_sampled=10)


words = st.text(alphabet="ab \n.", max_size=40)


@given(words, words)
def test_changes_keep_every_character(a: str, b: str) -> None:
    parts_a, parts_b, difference = changes(a, b)
    assert "".join(text for _, text in parts_a) == a
    assert "".join(text for _, text in parts_b) == b
    assert (difference == 0) == (a == b) and 0 <= difference <= 1
    unchanged = ["".join(text for flag, text in parts if not flag) for parts in (parts_a, parts_b)]
    assert unchanged[0] == unchanged[1]


def test_long_answers_differ_between_their_ends() -> None:
    a, b = "x " * 2000 + "cat" + " y" * 2000, "x " * 2000 + "dog" + " y" * 2000
    parts_a, parts_b, _ = changes(a, b)
    assert [text for flag, text in parts_a if flag] == ["cat"]
    assert [text for flag, text in parts_b if flag] == ["dog"]
    assert json.dumps(parts_a)
