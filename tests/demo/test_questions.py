import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from batchvlm.demo import questions
from batchvlm.demo.questions import KINDS, PAIR_KINDS, SINGLE_KINDS, Question
from batchvlm.demo.world import Object, Scene

SCENE = Scene(
    objects=(
        Object(shape="star", color="red", size="small", cell=0),
        Object(shape="star", color="blue", size="large", cell=4),
        Object(shape="cross", color="red", size="large", cell=7),
    ),
    background="dark",
)
ONE_STAR = Scene(objects=SCENE.objects[:1], background="light")


def ask_often(scene: Scene, kind: str, num_draws: int = 400) -> list[Question]:
    rng = np.random.default_rng(0)
    drawn = [questions.ask(scene, kind, rng) for _ in range(num_draws)]
    return [question for question in drawn if question is not None]


def answers_about(asked: list[Question], words: str) -> set[str]:
    return {question.answer for question in asked if words in question.text}


def test_caption_and_json_list_every_object_in_order() -> None:
    assert questions.caption(SCENE) == (
        "A small red star at the top left, a large blue star in the center and a large red cross "
        "at the bottom."
    )
    assert questions.caption(ONE_STAR) == "A small red star at the top left."
    assert questions.objects_json(ONE_STAR) == (
        '{"objects":[{"shape":"star","color":"red","size":"small","position":"top left"}],'
        '"count":1}'
    )
    assert json.loads(questions.objects_json(SCENE))["count"] == 3


def test_only_one_object_fits_a_reference() -> None:
    asked = ask_often(SCENE, "where")
    assert answers_about(asked, "the cross") == {"bottom"}
    assert answers_about(asked, "the red star") == {"top left"}
    assert answers_about(asked, "the large star") == {"center"}
    assert answers_about(asked, "the blue shape") == {"center"}
    assert not answers_about(asked, "the star")
    assert not answers_about(asked, "the red shape")


def test_a_question_never_says_its_answer_unless_it_offers_a_choice() -> None:
    for kind in ("color", "where", "shape_of"):
        assert all(q.answer not in q.text.split() for q in ask_often(SCENE, kind))


def test_a_kind_without_an_unambiguous_question_is_left_out() -> None:
    twins = Scene(
        objects=tuple(Object(shape="star", color="red", size="small", cell=i) for i in (0, 8)),
        background="light",
    )
    rng = np.random.default_rng(0)
    fitting = {kind for kind in SINGLE_KINDS if questions.ask(twins, kind, rng) is not None}
    assert set(SINGLE_KINDS) - fitting == {"color", "shape_of", "where", "size"}


@pytest.mark.parametrize(
    ("kind", "words", "answer"),
    [
        ("count", "", "3"),
        ("background", "", "dark"),
        ("color_at", "in the center", "blue"),
        ("shape_at", "at the bottom", "cross"),
        ("shape_of", "blue", "star"),
        ("size", "blue star", "large"),
        ("color", "small star", "red"),
        ("count_x", "stars", "2"),
        ("count_x", "crosses", "1"),
        ("count_x", "red shapes", "2"),
        ("count_x", "circles", "0"),
        ("exists", "a blue star", "yes"),
        ("exists", "a blue cross", "no"),
        ("exists", "an orange shape", "no"),
    ],
)
def test_answers_are_true(kind: str, words: str, answer: str) -> None:
    assert answers_about(ask_often(SCENE, kind), words) == {answer}


def test_answers_about_pairs_are_true() -> None:
    rng = np.random.default_rng(0)
    which = [questions.ask_pair(SCENE, ONE_STAR, "which", rng) for _ in range(400)]
    assert answers_about(which, "a star") == {"both"}
    assert answers_about(which, "a cross") == {"first"}
    assert answers_about(which, "a triangle") == {"neither"}
    swapped = [questions.ask_pair(ONE_STAR, SCENE, "which", rng) for _ in range(400)]
    assert answers_about(swapped, "a blue shape") == {"second"}
    for first, second, answer in (
        (SCENE, ONE_STAR, "first"),
        (ONE_STAR, SCENE, "second"),
        (SCENE, SCENE, "same"),
    ):
        assert questions.ask_pair(first, second, "more", rng).answer == answer


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="color_of"):
        questions.ask(SCENE, "color_of", np.random.default_rng(0))


def test_the_held_out_set_is_fixed_and_covers_everything() -> None:
    items = questions.held_out(60)
    assert items[: len(questions.held_out(20))] == questions.held_out(20)
    assert items != questions.held_out(60, seed=1)
    by_kind = Counter(item.kind for item in items)
    assert set(by_kind) == set(KINDS)
    assert by_kind["caption"] == by_kind["json"] == by_kind["count"] == 60
    assert sum(by_kind[kind] for kind in PAIR_KINDS) == 59
    assert abs(by_kind["more"] - by_kind["which"]) <= 1
    for item in items:
        assert len(item.images) == (2 if item.kind in PAIR_KINDS else 1)
    captions = [item for item in items if item.kind == "caption"]
    pictures = [Image.open(io.BytesIO(item.images[0])) for item in captions]
    assert Counter(picture.format for picture in pictures) == {"JPEG": 30, "PNG": 30}
    assert 12 <= sum(picture.width != picture.height for picture in pictures) <= 36


def test_training_and_held_out_streams_differ() -> None:
    streams = (
        questions.TRAINING_STREAM,
        questions.HELD_OUT_STREAM,
        questions.SAMPLES_STREAM,
        questions.CORPUS_STREAM,
    )
    draws = {np.random.default_rng([stream]).integers(2**62) for stream in streams}
    assert len(draws) == len(streams)


def test_the_corpus_never_changes() -> None:
    assert list(questions.corpus(5)) == list(questions.corpus(5))
