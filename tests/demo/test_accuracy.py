"""The oracle: the demo model's answers about held-out scenes, through the whole pipeline.

A bug in padding, batching, ordering or resume shows here as wrong answers.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchvlm.demo.questions import PAIR_KINDS, HeldOutItem, held_out
from batchvlm.pipeline.pipeline import run_job
from batchvlm.settings.compose import compose
from tests.conftest import IMAGE

NUM_SCENES = 500
NUM_SCENES_ALONE = 12
ROOM = {"caption": 112, "json": 192}


def write_items(items: list[HeldOutItem], path: Path) -> None:
    images = [[{"bytes": data, "path": None} for data in item.images] for item in items]
    table = pa.table(
        {
            "images": pa.array(images, pa.list_(IMAGE)),
            "question": [item.question for item in items],
            "room": [ROOM.get(item.kind, 16) for item in items],
        }
    )
    pq.write_table(table, path)


def answer(items: list[HeldOutItem], folder: Path, *overrides: str) -> list[str]:
    folder.mkdir()
    write_items(items, folder / "in.parquet")
    cfg = compose(
        "vqa",
        [
            "data=parquet",
            f"data.path={folder / 'in.parquet'}",
            "data.columns.image=images",
            f"output.dir={folder / 'out'}",
            "output.rows_per_shard=1000",
            *overrides,
        ],
    )
    run_job(cfg)
    table = ds.dataset(folder / "out" / "data").to_table(["row_index", "status", "generated_text"])
    assert table["row_index"].to_pylist() == list(range(len(items)))
    assert set(table["status"].to_pylist()) == {"success"}
    texts: list[str] = table["generated_text"].to_pylist()
    return texts


@pytest.fixture(scope="module")
def items() -> list[HeldOutItem]:
    return held_out(NUM_SCENES)


@pytest.fixture(scope="module")
def answers(items: list[HeldOutItem], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("all") / "job"
    return answer(
        items, folder, "generation.columns.max_new_tokens=room", "batching.sort_window=2048"
    )


def test_held_out_exact_match(items: list[HeldOutItem], answers: list[str]) -> None:
    right: dict[str, list[bool]] = defaultdict(list)
    for item, text in zip(items, answers, strict=True):
        right[item.kind].append(text == item.answer)
    score = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    print({kind: (round(share, 4), len(right[kind])) for kind, share in sorted(score.items())})
    questions = [hit for kind, hits in right.items() if kind not in ROOM for hit in hits]
    assert len(right["caption"]) == len(right["json"]) == NUM_SCENES
    assert set(PAIR_KINDS) <= set(score)
    assert score["caption"] >= 0.97
    assert score["json"] >= 0.97
    assert sum(questions) / len(questions) >= 0.95
    assert min(share for kind, share in score.items() if kind not in ROOM) >= 0.90


def test_a_row_alone_and_in_mixed_batches(
    items: list[HeldOutItem], answers: list[str], tmp_path: Path
) -> None:
    some = [item for item in items if item.scene_index < NUM_SCENES_ALONE]
    assert {len(item.images) for item in some} == {1, 2}
    one_by_one = ("engine.max_slots=1", "engine.max_prefill_tokens=16", "engine.share_images=false")
    assert answer(some, tmp_path / "alone", *one_by_one) == answers[: len(some)]
    assert answer(some, tmp_path / "few", "engine.max_slots=7") == answers[: len(some)]


@pytest.mark.soak
def test_both_engines_say_the_same(
    items: list[HeldOutItem], answers: list[str], tmp_path: Path
) -> None:
    some = [item for item in items if item.scene_index < NUM_SCENES_ALONE]
    padded = answer(some, tmp_path / "padded", "engine=generate", "batching.max_batch_size=24")
    assert padded == answers[: len(some)]
