"""Pixels that travel as bytes become the very numbers that the processor makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from batchvlm.engine.collate import collate
from batchvlm.preprocess.pixels import find_table, to_numbers
from batchvlm.preprocess.preprocessor import Preprocessor
from batchvlm.records import Sample

from ..engine.families import FAMILIES, VERSION, Family
from ..engine.loaded import ABOUT_TWO, Loaded, load


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava", "internvl", "idefics3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    (family,) = (f for f in FAMILIES if f.name == request.param)
    return load(family, tmp_path_factory.mktemp(family.name))


def as_bytes(loaded: Loaded) -> Loaded:
    """The same with a preprocessor for a GPU."""
    spec = loaded.preprocessor._spec
    return replace(loaded, preprocessor=Preprocessor(replace(spec, device="cuda")))


def test_bytes_become_the_same_numbers(loaded: Loaded) -> None:
    for question in loaded.questions:
        numbers = loaded.sample(0, question)
        pixels = as_bytes(loaded).sample(0, question)
        assert pixels.features.keys() == numbers.features.keys()
        if not question.sizes:
            assert pixels.pixel_table is None
            continue
        assert pixels.features["pixel_values"].dtype == np.uint8
        assert pixels.features["pixel_values"].shape == numbers.features["pixel_values"].shape
        mine, its = (collate([sample], pad_id=0) for sample in (pixels, numbers))
        for name, tensor in its.items():
            assert torch.equal(mine[name], tensor), name


def test_the_engine_answers_the_same(loaded: Loaded) -> None:
    sample = as_bytes(loaded).sample(0, ABOUT_TWO)
    ((_, completion),) = loaded.slots(eos=[]).run([sample])
    assert list(completion.token_ids) == loaded.known(ABOUT_TWO)[: len(completion.token_ids)]


def mllama() -> Family:
    return next(f for f in FAMILIES if f.name == "mllama")


def test_a_processor_that_pads_behind_the_last_step_keeps_its_numbers(tmp_path: Path) -> None:
    padded = load(mllama(), tmp_path)
    assert find_table(padded.processor.image_processor) is None
    sample = as_bytes(padded).sample(0, padded.questions[0])
    assert isinstance(sample, Sample)
    assert sample.pixel_table is None
    assert sample.features["pixel_values"].dtype == np.float32


@pytest.mark.skipif(VERSION < (5, 20), reason="no such processor before")
def test_a_processor_with_pixels_elsewhere_too_keeps_its_numbers() -> None:
    # Of images larger than 768 pixels it returns tiles, as an array of their own.
    assert find_table(transformers.DeepseekOcr2ImageProcessorPil()) is None


def test_a_processor_without_the_last_step_keeps_its_numbers(loaded: Loaded) -> None:
    processor = loaded.processor.image_processor
    before = processor.do_normalize
    processor.do_normalize = False
    try:
        assert find_table(processor) is None
    finally:
        processor.do_normalize = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_made_in_the_type_asked_for(loaded: Loaded, dtype: torch.dtype) -> None:
    table = find_table(loaded.processor.image_processor)
    if table is None:
        assert loaded.family.name == "idefics3"
        return
    shape = (5, 12) if table.is_patched else (5, 3, 2, 2)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    exact, rounded = (to_numbers(table, pixels, t) for t in (torch.float32, dtype))
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))
