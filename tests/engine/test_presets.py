"""Each preset of `conf/model/`, with a tiny random model in place of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image

from batchvlm.engine.generate import GenerateEngine
from batchvlm.engine.select import select_engine
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.preprocess.preprocessor import Preprocessor, PreprocessSpec
from batchvlm.records import Completion, Record, Sample
from batchvlm.settings.compose import compose, conf_dir

from ..conftest import encode
from .families import FAMILIES, Family
from .loaded import Loaded, noise

OTHERS = {"demo", "hub"}
OWN = ("eager", "sdpa")
"""What transformers chooses if it is not told."""
PRESETS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))


def test_every_family_has_a_preset() -> None:
    assert {*PRESETS} - OTHERS == {family.name for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_preset_fits_its_family(family: Family, load_once: Callable[[Family], Loaded]) -> None:
    loaded = load_once(family)
    preset = compose("run", [f"model={family.name}", "generation.max_new_tokens=2"])
    assert "/" in preset.model.path and preset.model.dtype in ("bfloat16", "float16")
    # An adapter belongs to the published weights.
    none = {"revision": None, "adapter": None, "adapter_revision": None, "adapter_subfolder": None}
    model = replace(preset.model, path=loaded.path, **none)
    cfg = replace(preset, model=model)
    engine = select_engine(cfg, device="cpu")
    assert isinstance(engine, GenerateEngine if family.why_not_slots_here else SlotEngine)
    held = engine._model
    assert type(held).__name__ == family.model_class
    assert held.get_decoder().dtype is getattr(torch, model.dtype)
    assert model.attn_implementation == family.attention
    assert held.config._attn_implementation in ([family.attention] if family.attention else OWN)
    preprocessor = Preprocessor(
        PreprocessSpec(
            model=model,
            task=cfg.task,
            columns=cfg.data.columns,
            generation=cfg.generation,
            image_root=None,
            max_source_pixels=1 << 24,
        )
    )
    samples = []
    for i, image in enumerate([noise((90, 60), 0), Image.new("RGB", (1700, 1500))]):
        values = {"image": encode(image)}
        record = Record(row=i, row_index=i, source_file="in", id="", values=values)
        sample = preprocessor.prepare(record)
        assert isinstance(sample, Sample), sample
        assert all(width * height <= model.max_image_pixels for width, height in sample.image_sizes)
        samples.append(sample)
    ((row, outcome),) = engine.run(samples[:1])
    assert row == 0 and isinstance(outcome, Completion), outcome
