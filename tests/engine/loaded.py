"""A family, loaded as the package loads it, and what transformers answers to its questions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from batchvlm.config import (
    BatchingConfig,
    ColumnsConfig,
    EngineConfig,
    GenerationConfig,
    ModelConfig,
    TaskConfig,
)
from batchvlm.constraints.constraints import Constraints
from batchvlm.engine.choices import Choices
from batchvlm.engine.collate import as_arguments, collate
from batchvlm.engine.forward.replacements import tune
from batchvlm.engine.generate import _ALONE, GenerateEngine, eos_ids, generating
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.model.loading import load_model, load_processor
from batchvlm.model.workarounds import patch_model
from batchvlm.preprocess.preprocessor import Preprocessor, PreprocessSpec
from batchvlm.records import Completion, Failure, Record, Sample

from ..conftest import encode
from .families import Family
from .tiny import save

NUM_NEW_TOKENS = 8
MOST_NEW_TOKENS = 12


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
ABOUT_ONE_SMALL = Question(text="a cat or a dog", sizes=((48, 48),))
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
    path: str
    """The folder of the tiny model."""
    questions: tuple[Question, ...]
    preprocessor: Preprocessor
    text_preprocessor: Preprocessor
    """For rows without images: where there is a column of them, each row must have one."""
    engine: GenerateEngine
    processor: Any
    model: Any
    _samples: dict[tuple[Question, int], Sample] = field(default_factory=dict)
    _references: dict[tuple[Question, int], list[int]] = field(default_factory=dict)
    _tuned: list[Any] = field(default_factory=list)

    def slots(
        self,
        *,
        sort_window: int = 512,
        eos: Sequence[int] | None = None,
        constraints: Constraints | None = None,
        choices: Choices | None = None,
        **cfg: Any,
    ) -> SlotEngine:
        """An engine over slots, with these settings of `EngineConfig`; without a canary."""
        tokenizer = self.processor.tokenizer
        return SlotEngine(
            self.tuned(),
            tokenizer,
            BatchingConfig(sort_window=sort_window),
            EngineConfig(**{"canary": False, **cfg}),
            eos_ids=eos_ids(self.model, tokenizer) if eos is None else eos,
            constraints=constraints,
            choices=choices,
        )

    def tuned(self) -> Any:
        """A copy of the model in the cheaper form in which the package runs it."""
        if not self._tuned:
            self._tuned.append(copy.deepcopy(self.model))
            tune(self._tuned[0])
        return self._tuned[0]

    def own(self) -> Any:
        """A copy of the model, for an engine that takes the defaults out of its settings."""
        return copy.deepcopy(self.model)

    def ask(self, row_index: int, question: Question, seed: int = 0, **generation: Any) -> Sample:
        """`sample`, with settings of its own; each prompt is prepared once."""
        if (question, seed) not in self._samples:
            self._samples[question, seed] = self.sample(0, question, seed)
        sample = self._samples[question, seed]
        return replace(
            sample, row_index=row_index, generation=replace(sample.generation, **generation)
        )

    def known(self, question: Question, seed: int = 0) -> list[int]:
        """`reference`, `MOST_NEW_TOKENS` long whatever ends it; each prompt is answered once."""
        if (question, seed) not in self._references:
            self._references[question, seed] = self.reference(
                question, seed, max_new_tokens=MOST_NEW_TOKENS, eos_token_id=None
            )
        return self._references[question, seed]

    def sample(self, row_index: int, question: Question, seed: int = 0) -> Sample:
        sample = self.prepare(row_index, question, seed)
        assert isinstance(sample, Sample), sample
        return sample

    def prepare(self, row_index: int, question: Question, seed: int = 0) -> Sample | Failure:
        images = [{"bytes": encode(image)} for image in pictures(question, seed)]
        record = Record(
            row=row_index,
            row_index=row_index,
            source_file="in.parquet",
            id=str(row_index),
            values={"question": question.text, "image": images},
        )
        maker = self.preprocessor if images else self.text_preprocessor
        return maker.prepare(record)

    def samples(self) -> list[Sample]:
        return [self.sample(i, question) for i, question in enumerate(self.questions)]

    def answers(self, samples: Sequence[Sample]) -> list[Completion]:
        done = dict(self.engine.run(samples))
        completions = [done[sample.row_index] for sample in samples]
        assert all(isinstance(c, Completion) for c in completions), completions
        return completions

    def first_logits(self, samples: Sequence[Sample]) -> torch.Tensor:
        """What the model thinks of each row's first token, [B, V]."""
        if self.model.config.model_type in _ALONE and len(samples) > 1:
            return torch.cat([self.first_logits([sample]) for sample in samples])
        inputs = collate(
            samples,
            pad_id=self.processor.tokenizer.pad_token_id,
            pads_right=self.family.answers_apart,
        )
        with torch.inference_mode():
            out = self.model.generate(
                **as_arguments(inputs),
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.logits[0]

    def reference(self, question: Question, seed: int = 0, **changes: Any) -> list[int]:
        """The answer of transformers by itself, end of sequence included."""
        images = pictures(question, seed)
        template = self.processor.chat_template or self.processor.tokenizer.chat_template
        if template is None:
            # Those that take one image put its slot by themselves.
            slot = self.processor.image_token if self.family.takes_several else ""
            text = slot * len(images) + question.text
            given = [images] if images else None
            inputs = self.processor(text=[text], images=given, return_tensors="pt")
            inputs.pop("labels", None)
        else:
            parts = [{"type": "image", "image": image} for image in images]
            content = [*parts, {"type": "text", "text": question.text}]
            rendered = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                tokenize=not self.family.has_pages,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
            inputs = rendered
            if self.family.has_pages:
                inputs = self.processor(text=[rendered], images=images, return_tensors="pt")
        plain = copy.copy(self.model)
        # BLIP-2 hands on to its language model, which heeds its own settings.
        heeded = generating(plain)[-1]
        heeded.generation_config = copy.deepcopy(heeded.generation_config)
        heeded.generation_config.update(
            **{"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, **changes}
        )
        with torch.inference_mode():
            ids_BT = plain.generate(**inputs.to(plain.device, plain.dtype))
        num_before = 1 if self.family.answers_apart else inputs["input_ids"].shape[1]
        return ids_BT[0, num_before:].tolist()


def load(family: Family, folder: Path) -> Loaded:
    """Save a family's tiny model in a folder and load it from there; skip where that cannot be."""
    if family.missing:
        pytest.skip(f"{family.title} needs {' and '.join(family.missing)}")
    save(folder, *family.build())
    cfg = ModelConfig(path=str(folder), dtype="float32")
    spec = PreprocessSpec(
        model=cfg,
        task=TaskConfig(prompt="{{ question }}"),
        columns=ColumnsConfig(image="image"),
        generation=GenerationConfig(max_new_tokens=NUM_NEW_TOKENS),
        image_root=None,
        max_source_pixels=1 << 20,
    )
    processor = load_processor(cfg)
    # A row without images comes early, so that rows behind it would notice a shift.
    early = (ABOUT_NONE,) if family.takes_text_alone else ()
    several = (ABOUT_TWO,) if family.takes_several else (ABOUT_ONE_SMALL,)
    model = transformers.AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    patch_model(model)  # transformers could not answer by itself
    return Loaded(
        family=family,
        path=str(folder),
        questions=(ABOUT_ONE, *early, *several, ABOUT_ONE_LONGER),
        preprocessor=Preprocessor(spec),
        text_preprocessor=Preprocessor(replace(spec, columns=ColumnsConfig())),
        engine=GenerateEngine(load_model(cfg, device="cpu"), processor.tokenizer, BatchingConfig()),
        processor=processor,
        model=model.eval(),
    )
