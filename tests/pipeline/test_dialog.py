"""Dialogs: each answer feeds the next turn, and a row is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.demo.questions import HeldOutItem, held_out
from batchvlm.errors import BatchvlmError, ErrorType, RowError
from batchvlm.pipeline.pipeline import run_job
from batchvlm.prompts.messages import read_turns
from batchvlm.records import Completion, Failure, Sample
from batchvlm.settings.compose import compose
from tests.conftest import IMAGE, picture
from tests.pipeline.test_pipeline import FakeEngine, rows_of, run

ONE_BY_ONE = ["data.columns.image=null", "generation.max_new_tokens=24"]


def write(path: Path, turns: list[Any], **columns: Any) -> Path:
    texts = [turn if turn is None else json.dumps(turn) for turn in turns]
    pq.write_table(pa.table({"turns": pa.array(texts, pa.string()), **columns}), path)
    return path


def dialog(out: Path, source: Path, *overrides: str, engine: Any = None) -> list[dict[str, Any]]:
    settings = ["task=dialog", "data.columns.turns=turns", *ONE_BY_ONE, *overrides]
    run(out, source, *settings, engine=engine)
    return rows_of(out)


class Counting(FakeEngine):
    """Says how long the prompt is; fails at the n-th turn of the rows it is told to."""

    def __init__(self, failing: Iterable[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.turns: dict[int, int] = {}
        self.told = set(failing)
        self.seeds: list[tuple[int, int]] = []

    def run(self, samples: Iterable[Sample]) -> Any:
        def watched() -> Any:
            for sample in samples:
                self.lengths[sample.row_index] = sample.prompt_tokens
                self.seeds.append((sample.row_index, sample.generation.seed))
                yield sample

        self.lengths: dict[int, int] = {}
        for index, outcome in super().run(watched()):
            turn = self.turns[index] = self.turns.get(index, 0) + 1
            assert isinstance(outcome, Completion)
            if (index, turn) in self.told:
                yield index, Failure(error_type=ErrorType.ENGINE, message="told to fail")
                continue
            yield index, replace(outcome, text=f"{index}.{turn} {self.lengths[index]}")


@pytest.mark.parametrize("workers", [0, 1])
def test_turns_are_answered_one_after_the_other(tmp_path: Path, workers: int) -> None:
    turns: list[Any] = [[f"turn {n}" for n in range(1 + row % 4)] for row in range(30)]
    turns[5], turns[6], turns[7] = None, [], [{"role": "assistant", "content": "x"}]
    source = write(tmp_path / "in.parquet", turns)
    engine = Counting(failing=[(11, 1), (15, 3)])
    rows = dialog(tmp_path / "out", source, f"runtime.num_workers={workers}", engine=engine)
    assert [row["row_index"] for row in rows] == list(range(30))
    for row in rows:
        index, said = row["row_index"], row["generated_texts"]
        if index in (5, 6, 7):
            assert (row["error_type"], said) == ("prompt", None)
            continue
        num_turns = {11: 0, 15: 2}.get(index, 1 + index % 4)
        assert [text.split()[0] for text in said or []] == [
            f"{index}.{n}" for n in range(1, num_turns + 1)
        ]
        lengths = [int(text.split()[1]) for text in said or []]
        assert lengths == sorted(set(lengths)), "each prompt holds the ones before"
        if index in (11, 15):
            assert (row["error_type"], row["generated_text"]) == ("engine", None)
            assert row["completion_tokens"] == (None if index == 11 else 3 * 2)
            continue
        assert (row["status"], row["generated_text"]) == ("success", said[-1])
        assert row["completion_tokens"] == 3 * num_turns
        assert row["finish_reasons"] == ["stop"] * num_turns
        assert row["latency_s"] == 0.5 * num_turns
        assert row["prompt_tokens"] == lengths[-1]
    assert len({seed for _, seed in engine.seeds}) == len(engine.seeds)


def test_a_dialog_that_was_broken_off_is_answered_from_its_first_turn(tmp_path: Path) -> None:
    class Ending(Counting):
        def run(self, samples: Iterable[Sample]) -> Any:
            for count, answer in enumerate(super().run(samples)):
                if count == 7:
                    raise BatchvlmError("the end")
                yield answer

    turns = [["a", "b", "c"], ["a"]] * 6
    source = write(tmp_path / "in.parquet", turns)
    with pytest.raises(BatchvlmError, match="the end"):
        dialog(tmp_path / "out", source, engine=Ending())
    engine = Counting()
    rows = dialog(tmp_path / "out", source, engine=engine)
    assert [len(row["generated_texts"]) for row in rows] == [3, 1] * 6
    # What was whole is not computed again, what was not is from its start.
    assert 0 < len(engine.turns) < 12
    assert all(turn == len(turns[row]) for row, turn in engine.turns.items())


def test_images_come_in_any_turn(tmp_path: Path) -> None:
    def image(name: str) -> dict[str, Any]:
        (tmp_path / name).write_bytes(picture(size=(20, 10)))
        return {"type": "image_url", "image_url": {"url": name}}

    turns: list[Any] = [
        [[image("a.png"), {"type": "text", "text": "one"}], ["two", image("b.png")]],
        ["one", {"role": "user", "content": [image("c.png"), {"type": "image"}, "two"]}],
        [{"role": "system", "content": "Be brief."}, "one", "two"],
        ["one", [{"type": "image"}], [image("gone.png")]],
    ]
    (tmp_path / "gone.png").unlink()
    data = [{"bytes": picture(), "path": None}]
    images = pa.array([[], data, [], data], pa.list_(IMAGE))
    source = write(tmp_path / "in.parquet", turns, images=images)
    rows = dialog(tmp_path / "out", source, "data.columns.image=images", engine=Counting())
    assert [row["num_images"] for row in rows] == [2, 2, 0, None]
    assert [row["error_type"] for row in rows] == [None, None, None, "missing_image"]
    # What was said before the turn that failed is kept.
    assert [len(row["generated_texts"]) for row in rows] == [2, 2, 2, 2]


@pytest.fixture(scope="module")
def items() -> list[HeldOutItem]:
    return [item for item in held_out(12) if len(item.images) == 1]


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_both_engines_answer_as_if_each_turn_came_alone(
    tmp_path: Path, items: list[HeldOutItem], engine: str
) -> None:
    turns, images, alone = [], [], []
    for row in range(12):
        of_row = [item for item in items if item.scene_index == row][: 1 + row % 3]
        turns.append([item.question for item in of_row])
        images.append({"bytes": of_row[0].images[0], "path": None})
    source = write(tmp_path / "in.parquet", turns, image=pa.array(images, IMAGE))
    settings = ["data=parquet", "runtime.num_workers=0", f"engine={engine}"]
    settings += ["generation.max_new_tokens=192", "batching.sort_window=5"]
    more = ["task=dialog", "data.columns.turns=turns", f"output.dir={tmp_path / 'out'}"]
    run_job(compose("run", [*settings, *more, f"data.path={source}"]))
    rows = rows_of(tmp_path / "out")
    assert {row["status"] for row in rows} == {"success"}
    first = [item.answer for row in range(12) for item in items if item.scene_index == row][:1]
    assert rows[0]["generated_texts"][0] == first[0]

    # The same conversations as chat messages, each with the answers so far.
    shown: list[Any] = []
    for row, image in zip(rows, images, strict=True):
        said = row["generated_texts"]
        for turn in range(len(said)):
            messages = []
            for question, answer in zip(turns[row["row_index"]], said[:turn], strict=False):
                messages += [{"role": "user", "content": question}]
                messages += [{"role": "assistant", "content": answer}]
            question = turns[row["row_index"]][turn]
            alone.append(json.dumps([*messages, {"role": "user", "content": question}]))
            shown.append(image)
    pq.write_table(
        pa.table({"chat": alone, "image": pa.array(shown, IMAGE)}), tmp_path / "alone.parquet"
    )
    more = ["data.columns.messages=chat", f"output.dir={tmp_path / 'alone'}"]
    run_job(compose("run", [*settings, *more, f"data.path={tmp_path / 'alone.parquet'}"]))
    expected = [row["generated_text"] for row in rows_of(tmp_path / "alone")]
    assert [text for row in rows for text in row["generated_texts"]] == expected


@pytest.mark.parametrize(
    "value",
    [
        *("no json", {}, [3], [{"role": "assistant", "content": "x"}], ["a", {"role": "system"}]),
        [{"role": "system", "content": "x"}],
    ],
)
def test_what_is_no_list_of_turns_is_refused(value: Any) -> None:
    with pytest.raises(RowError) as caught:
        read_turns(value, "turns")
    assert caught.value.error_type is ErrorType.PROMPT


def test_plain_text_is_no_list_of_turns() -> None:
    with pytest.raises(RowError) as caught:
        read_turns("What is this?", "question")
    assert caught.value.message == (
        "turns must be a list of texts, or JSON text of one; column 'question' holds plain text"
    )
