"""Every family: rows of a mixed batch get the answers that each gets alone, from transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import is_torchvision_available

from batchvlm.config import ModelConfig
from batchvlm.errors import ErrorType, ModelError
from batchvlm.model.loading import load_processor
from batchvlm.records import Completion, Failure, FinishReason

from .families import FAMILIES, Family
from .families.llava import llava
from .loaded import (
    ABOUT_NONE,
    ABOUT_ONE,
    ABOUT_ONE_LONGER,
    ABOUT_ONE_SMALL,
    ABOUT_TWO,
    NUM_NEW_TOKENS,
    Loaded,
    Question,
)
from .tiny import save


def test_a_mixed_batch_answers_as_transformers_does_row_by_row(loaded: Loaded) -> None:
    eos_id = loaded.processor.tokenizer.eos_token_id
    answers = loaded.answers(loaded.samples())
    expected = [loaded.reference(question) for question in loaded.questions]
    assert [list(answer.token_ids) for answer in answers] == expected
    for answer, ids in zip(answers, expected, strict=True):
        is_stopped = ids[-1] == eos_id
        assert answer.finish_reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
        assert answer.text == loaded.processor.tokenizer.decode(ids, skip_special_tokens=True)
    # Answers of one repeated token would hide a wrong position or a wrong image.
    assert len({token for ids in expected for token in ids}) > NUM_NEW_TOKENS


def test_a_row_is_answered_alike_alone_and_in_any_order(loaded: Loaded) -> None:
    samples = loaded.samples()
    together = [answer.token_ids for answer in loaded.answers(samples)]
    reverse = [answer.token_ids for answer in loaded.answers(samples[::-1])]
    alone = [loaded.answers([sample])[0].token_ids for sample in samples]
    assert reverse[::-1] == together
    assert alone == together


def test_each_row_sees_its_own_images(loaded: Loaded) -> None:
    samples = loaded.samples()
    logits_BV = loaded.first_logits(samples)
    for i, question in enumerate(loaded.questions):
        (alone_V,) = loaded.first_logits([samples[i]])
        torch.testing.assert_close(logits_BV[i], alone_V, atol=2e-5, rtol=0)
        # Another picture in row i moves row i and no other.
        changed = [*samples]
        changed[i] = loaded.sample(i, question, seed=1)
        moved_B = (loaded.first_logits(changed) - logits_BV).abs().amax(-1)
        if question.sizes:
            assert moved_B[i] > 1e-2
        moved_B[i] = 0
        assert moved_B.max() < 2e-5


def test_image_tokens_are_counted(loaded: Loaded) -> None:
    one, longer, two = loaded.family.image_tokens
    expected = {ABOUT_ONE: one, ABOUT_ONE_LONGER: longer, ABOUT_TWO: two, ABOUT_NONE: 0}
    expected[ABOUT_ONE_SMALL] = one
    for sample, question in zip(loaded.samples(), loaded.questions, strict=True):
        assert sample.image_tokens == expected[question]
        assert len(sample.image_sizes) == len(question.sizes)


@pytest.mark.parametrize(
    "family",
    [f for f in FAMILIES if f.takes_several and not f.takes_text_alone],
    ids=lambda family: family.name,
)
def test_text_alone_is_an_error_of_its_row_where_a_family_does_not_take_it(
    family: Family, load_once: Callable[[Family], Loaded]
) -> None:
    outcome = load_once(family).prepare(0, ABOUT_NONE)
    assert isinstance(outcome, Failure) and outcome.error_type is ErrorType.PREPROCESS


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not f.takes_several], ids=lambda family: family.name
)
def test_a_row_that_does_not_have_one_image_is_its_error_where_a_family_takes_one(
    family: Family, load_once: Callable[[Family], Loaded]
) -> None:
    loaded = load_once(family)
    good = loaded.sample(0, ABOUT_ONE)
    others = [replace(good, row_index=i, image_sizes=((9, 9),) * n) for i, n in ((1, 2), (2, 0))]
    outcomes = dict(loaded.engine.run([others[0], good, others[1]]))
    assert isinstance(outcomes[0], Completion)
    failures = [outcomes[1], outcomes[2]]
    assert all(isinstance(failure, Failure) for failure in failures)
    kinds = [failure.error_type for failure in failures if isinstance(failure, Failure)]
    assert kinds == [ErrorType.PROMPT, ErrorType.MISSING_IMAGE]


def test_what_a_template_writes_for_an_image_stays_text_in_a_row(
    load_once: Callable[[Family], Loaded],
) -> None:
    """Qianfan-OCR's writes "<image>", which is no token of its vocabulary."""
    (found,) = (family for family in FAMILIES if family.name == "qianfan_ocr")
    question = Question(text="an <image>?", sizes=ABOUT_ONE.sizes)
    assert load_once(found).sample(0, question).image_tokens == found.image_tokens[0]


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision it may load")
def test_a_processor_that_needs_its_video_part_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, *llava())
    for name in ("processor_config.json", "tokenizer_config.json"):
        config = (tmp_path / name).read_text().replace("LlavaProcessor", "SmolVLMProcessor")
        (tmp_path / name).write_text(config)
    with pytest.raises(
        ModelError, match=f"cannot load the processor of model.path={tmp_path}"
    ) as caught:
        load_processor(ModelConfig(path=str(tmp_path)))
    assert "torchvision" in caught.value.hint
