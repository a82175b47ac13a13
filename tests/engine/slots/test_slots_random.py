"""Random workloads over slots: every row exactly once, with the answer that it gets alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..families import Family, needs_slots
from ..families.gemma import gemma3
from ..families.llava import llava
from ..families.qwen import qwen2_vl
from ..loaded import MOST_NEW_TOKENS, Loaded, Question, load
from ..outcomes import run
from ..tiny import Built

pytestmark = [needs_slots, pytest.mark.usefixtures("small_parts")]

SIZES = (((90, 60),), ((90, 60), (48, 48)), ((48, 48),), ())
TEXTS = (
    "what is this?",
    "describe the image in one word and then explain it in detail",
    "describe the image in one word and then a dog",
    "compare these two images and explain the difference in detail, " * 3,
)
QUESTIONS = tuple(Question(text=text, sizes=sizes) for text in TEXTS for sizes in SIZES)


def gemma2_in_llava() -> Built:
    """Scores squashed, and every other layer with a window shorter than most prompts."""
    return llava(
        model_type="gemma2",
        head_dim=16,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
    )


def as_many_key_heads_as_query_heads() -> Built:
    return llava(num_key_value_heads=4)


def gemma3_of_short_sight() -> Built:
    return gemma3(sliding_window=6)


@pytest.fixture(
    scope="module",
    params=[gemma2_in_llava, as_many_key_heads_as_query_heads, qwen2_vl, gemma3_of_short_sight],
    ids=lambda build: build.__name__,
)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    family = Family(build=request.param, image_tokens=(0, 0, 0))
    return load(family, tmp_path_factory.mktemp(family.name))


ROWS = st.tuples(st.sampled_from(QUESTIONS), st.integers(0, 1), st.integers(1, MOST_NEW_TOKENS))


@settings(max_examples=30)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=12),
    cfg=st.fixed_dictionaries(
        {
            "max_slots": st.integers(1, 5),
            "max_prefill_tokens": st.integers(1, 200),
            "sort_window": st.integers(1, 20),
            "share_images": st.booleans(),
            "cpu_streams": st.integers(1, 3),
        }
    ),
    lag=st.integers(0, 1),
    place=st.integers(0, MOST_NEW_TOKENS - 1),
)
def test_every_row_once_and_as_alone(
    variant: Loaded, rows: list[Any], cfg: dict[str, Any], lag: int, place: int
) -> None:
    # The first row ends at this place, and whoever else says that token.
    eos = variant.known(*rows[0][:2])[place]
    expected = []
    for question, seed, limit in rows:
        ids = variant.known(question, seed)[:limit]
        expected.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
    engine = variant.slots(eos=[eos], **cfg)
    engine._lag = lag
    samples = [
        variant.ask(i, question, seed, max_new_tokens=limit)
        for i, (question, seed, limit) in enumerate(rows)
    ]
    assert [list(outcome.token_ids) for outcome in run(engine, samples)] == expected
    images = {(q.sizes, seed) for q, seed, _ in rows if q.sizes}
    if cfg["sort_window"] >= len(rows) and cfg["share_images"]:
        # 90 x 60 with seed 0 is one picture, alone or before another.
        assert engine.stats.images_encoded <= sum(len(sizes) for sizes, _ in images)
