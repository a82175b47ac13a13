"""One tiny LLaVA for the tests of the engine, and what transformers answers with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

from batchvlm.engine.generate import GenerateEngine
from batchvlm.records import Generation, Sample

from .families import FAMILIES, Family
from .families.llava import llava
from .loaded import Loaded, load
from .tiny import save

QUESTIONS = (
    "what is this?",
    "describe the image in one word and then explain it in detail",
    "how is the lazy dog today?",
    "a cat or a dog",
)

IN_EVERY_RUN = {
    *("blip_2", "deepseek_ocr2", "ernie4_5_vl_moe", "florence2", "gemma3", "gemma4", "got_ocr2"),
    *("hunyuan_vl", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mllama"),
    *("molmo2", "paligemma", "pixtral", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe"),
}
"""Families of which each has what no other has, and the most used. `make soak` runs the others."""


def pytest_itemcollected(item: pytest.Item) -> None:
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec is not None else ()
    if any(isinstance(v, Family) and v.name not in IN_EVERY_RUN for v in values):
        item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="session")
def load_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Loaded]:
    """Loads a family where that was not done before; skips where it cannot be."""
    return cache(lambda family: load(family, tmp_path_factory.mktemp(family.name)))


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def loaded(request: pytest.FixtureRequest, load_once: Callable[[Family], Loaded]) -> Loaded:
    """Each family in turn."""
    return load_once(request.param)


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """One family, for what does not depend on it."""
    family = Family(build=llava, image_tokens=(16, 16, 32))
    return load(family, tmp_path_factory.mktemp("small"))


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full garbage collection for each failure would take most of a test's time."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are divided among streams from two rows on; else a test would need dozens of them."""
    monkeypatch.setattr("batchvlm.engine.forward.streams._PART_ROWS", 1)


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA that answers in printable ASCII alone, so that its text can be cut anywhere."""
    model, processor = llava()
    decode = processor.tokenizer.decode
    with torch.no_grad():
        for token in range(model.config.text_config.vocab_size):
            text = decode([token])
            if token in processor.tokenizer.all_special_ids or not text.strip().isprintable():
                model.lm_head.weight[token] = 0.0
            if not text.isascii() or not text:
                model.lm_head.weight[token] = 0.0
    return save(tmp_path_factory.mktemp("llava"), model, processor)


@pytest.fixture(scope="package")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="package")
def model(folder: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture
def engine_with(model: Any, tokenizer: Any) -> Callable[..., GenerateEngine]:
    """An engine over the model as if its repository had these generation defaults."""

    def make(**defaults: Any) -> GenerateEngine:
        changed = copy.copy(model)
        changed.generation_config = GenerationConfig(**defaults)
        return GenerateEngine(changed, tokenizer)

    return make


@pytest.fixture
def make_samples(tokenizer: Any) -> Callable[..., list[Sample]]:
    def make(*rows: dict[str, Any], max_new_tokens: int = 8) -> list[Sample]:
        return [
            Sample(
                row_index=i,
                features={"input_ids": prompt(tokenizer, QUESTIONS[i % len(QUESTIONS)]).numpy()},
                image_tokens=0,
                image_sizes=(),
                generation=Generation(**{"max_new_tokens": max_new_tokens, **row}),
            )
            for i, row in enumerate(rows)
        ]

    return make


@pytest.fixture(scope="package")
def reference(model: Any, tokenizer: Any) -> Callable[..., list[int]]:
    """What transformers answers to one question alone, with nothing from any repository."""

    def answer(i: int, max_new_tokens: int = 8, **changes: Any) -> list[int]:
        ids_BT = prompt(tokenizer, QUESTIONS[i % len(QUESTIONS)])
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **{"eos_token_id": None, "pad_token_id": tokenizer.pad_token_id, **changes},
        )
        plain = copy.copy(model)
        plain.generation_config = config
        out_BT = plain.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
        return out_BT[0, ids_BT.shape[1] :].tolist()

    return answer


def prompt(tokenizer: Any, question: str) -> torch.Tensor:
    return tokenizer(f"user: {question}\nassistant: ", return_tensors="pt")["input_ids"]
