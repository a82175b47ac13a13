import pytest

from batchvlm.demo import MODEL_DIR, evaluate
from batchvlm.demo.evaluate import Answerer, Scores
from batchvlm.demo.questions import HeldOutItem, held_out


def item(kind: str, answer: str) -> HeldOutItem:
    return HeldOutItem(scene_index=0, kind=kind, question="?", answer=answer, images=())


def test_scores_count_exact_matches_by_kind() -> None:
    scores = Scores(
        items=[item("count", "1"), item("count", "2"), item("more", "same"), item("json", "{}")],
        answers=["1", "2.", "same", "{}"],
        duration_s=2.0,
        num_same_alone=3,
    )
    assert scores.kinds()["count"] == {"exact_match": 0.5, "num_items": 2}
    assert scores.vqa_mean() == pytest.approx(0.75)
    assert "2 prompts/s" in scores.table()
    assert "3 of 4" in scores.table()


def test_the_bundled_model_answers_alike_alone_and_in_a_batch() -> None:
    scores = evaluate.evaluate(MODEL_DIR, num_scenes=3, seed=1, is_compared_alone=True)
    assert scores.num_same_alone == len(scores.items)
    right = sum(a == i.answer for a, i in zip(scores.answers, scores.items, strict=True))
    assert right / len(scores.items) > 0.9


def test_the_bundled_model_looks_at_the_image() -> None:
    """The same question about other pictures must get other answers."""
    captions = [i for i in held_out(6) if i.kind == "caption"]
    asked = [
        HeldOutItem(
            scene_index=i.scene_index,
            kind=i.kind,
            question="Describe the image.",
            answer=i.answer,
            images=i.images,
        )
        for i in captions
    ]
    answers = Answerer(MODEL_DIR).answer(asked)
    assert len(set(answers)) == len({i.answer for i in captions})


def test_the_bundled_model_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.rglob("*")) < 8_000_000
