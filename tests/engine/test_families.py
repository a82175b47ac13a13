"""Every family: rows of a mixed batch get the answers that each gets alone, from transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.utils import is_torchvision_available

from batchvlm.config import (
    BatchingConfig,
    ColumnsConfig,
    GenerationConfig,
    ImageBackend,
    ModelConfig,
    TaskConfig,
)
from batchvlm.engine.collate import collate
from batchvlm.engine.generate import GenerateEngine
from batchvlm.errors import ModelError
from batchvlm.loading import load_processor
from batchvlm.preprocess import Preprocessor, PreprocessSpec
from batchvlm.records import Completion, FinishReason, Record, Sample

from ..conftest import encode
from .families import FAMILIES, Family, idefics3
from .tiny import save

NUM_NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a row asks, and about which pictures."""

    text: str
    sizes: tuple[tuple[int, int], ...]
    """(width, height) of each picture."""


ABOUT_ONE = Question(text="what is this?", sizes=((90, 60),))
ABOUT_ONE_LONGER = Question(
    text="describe the image in one word and then explain it in detail", sizes=((70, 150),)
)
ABOUT_TWO = Question(text="compare these two images", sizes=((48, 48), (130, 100)))
ABOUT_NONE = Question(text="how is the lazy dog today?", sizes=())


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictures(question: Question, seed: int = 0) -> list[Image.Image]:
    return [noise(size, 10 * seed + i) for i, size in enumerate(question.sizes)]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One family, loaded as the package loads it and, apart from that, as transformers does."""

    family: Family
    questions: tuple[Question, ...]
    preprocessor: Preprocessor
    engine: GenerateEngine
    processor: Any
    model: Any

    def sample(self, row_index: int, question: Question, seed: int = 0) -> Sample:
        images = [{"bytes": encode(image)} for image in pictures(question, seed)]
        record = Record(
            row=row_index,
            row_index=row_index,
            source_file="in.parquet",
            id=str(row_index),
            values={"question": question.text, "image": images},
        )
        sample = self.preprocessor.prepare(record)
        assert isinstance(sample, Sample), sample
        return sample

    def samples(self) -> list[Sample]:
        return [self.sample(i, question) for i, question in enumerate(self.questions)]

    def answers(self, samples: Sequence[Sample]) -> list[Completion]:
        done = dict(self.engine.run(samples))
        completions = [done[sample.row_index] for sample in samples]
        assert all(isinstance(c, Completion) for c in completions), completions
        return completions

    def first_logits(self, samples: Sequence[Sample]) -> torch.Tensor:
        """What the model thinks of each row's first token, [B, V]."""
        inputs = collate(samples, pad_id=self.processor.tokenizer.pad_token_id)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.logits[0]

    def reference(self, question: Question, seed: int = 0) -> list[int]:
        """The answer of transformers by itself, end of sequence included."""
        images = pictures(question, seed)
        if self.processor.chat_template is None:
            slots = "<image>" * len(images)
            inputs = self.processor(
                text=[slots + question.text], images=[images], return_tensors="pt"
            )
        else:
            parts = [{"type": "image", "image": image} for image in images]
            content = [*parts, {"type": "text", "text": question.text}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        with torch.inference_mode():
            ids_BT = self.model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
        return ids_BT[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    family: Family = request.param
    folder = save(tmp_path_factory.mktemp(family.name), *family.build())
    cfg = ModelConfig(path=str(folder), dtype="float32", image_backend=ImageBackend.pil)
    spec = PreprocessSpec(
        model=cfg,
        task=TaskConfig(prompt="{{ question }}"),
        columns=ColumnsConfig(image="image"),
        generation=GenerationConfig(max_new_tokens=NUM_NEW_TOKENS),
        image_root=None,
        max_source_pixels=1 << 20,
    )
    # A row without images comes early, so that rows behind it would notice a shift.
    early = (ABOUT_NONE,) if family.takes_text_alone else ()
    return Loaded(
        family=family,
        questions=(ABOUT_ONE, *early, ABOUT_TWO, ABOUT_ONE_LONGER),
        preprocessor=Preprocessor(spec),
        engine=GenerateEngine.load(cfg, BatchingConfig(), device="cpu"),
        processor=load_processor(cfg),
        model=transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32
        ).eval(),
    )


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
    for sample, question in zip(loaded.samples(), loaded.questions, strict=True):
        assert sample.image_tokens == expected[question]
        assert len(sample.image_sizes) == len(question.sizes)


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision it may load")
def test_a_processor_that_needs_its_video_part_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, *idefics3())
    for name in ("processor_config.json", "tokenizer_config.json"):
        config = (tmp_path / name).read_text().replace("Idefics3Processor", "SmolVLMProcessor")
        (tmp_path / name).write_text(config)
    with pytest.raises(ModelError, match=f"cannot load the processor of model.path={tmp_path}"):
        load_processor(ModelConfig(path=str(tmp_path)))
