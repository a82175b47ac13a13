"""A dtype for each part of a model: what is cast, and what the parts then make of the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchvlm import demo
from batchvlm.before.footprint import estimate_footprint
from batchvlm.config import ImageBackend, ModelConfig
from batchvlm.demo.questions import held_out
from batchvlm.engine.generate import GenerateEngine
from batchvlm.engine.select import select_engine
from batchvlm.errors import ModelError
from batchvlm.model.loading import load_model
from batchvlm.settings.compose import compose

from ..demo.test_accuracy import ROOM, answer
from .loaded import Loaded

NARROW_TEXT = {"vision_config": "float32", "text_config": "bfloat16"}
NARROW_VISION = {"vision_config": "bfloat16", "text_config": "float32", "rest": "float32"}


def load(dtype: Any, path: str | Path = demo.MODEL_DIR) -> Any:
    return load_model(ModelConfig(path=str(path), dtype=dtype), device="cpu")


def dtypes_of(module: torch.nn.Module, kept: Iterable[int] = ()) -> set[torch.dtype]:
    """Dtypes of a module's weights but those with these ids."""
    return {weight.dtype for weight in module.parameters() if id(weight) not in kept}


def kept_in_float32(model: Any) -> set[int]:
    """The ids of the weights that transformers keeps in float32."""
    parts = [f".{name}." for name in model._keep_in_fp32_modules_strict]
    return {
        id(weight)
        for name, weight in model.named_parameters()
        if any(part in f".{name}." for part in parts)
    }


def parts(model: Any, key: str) -> list[torch.nn.Module]:
    """The modules of a sub-config, the outer ones first."""
    config = getattr(model.config, key)
    return [m for m in model.modules() if m is not model and getattr(m, "config", 0) is config]


def part(model: Any, key: str) -> torch.nn.Module:
    """The outermost module of a sub-config."""
    return parts(model, key)[0]


@pytest.mark.parametrize("dtype", [NARROW_TEXT, NARROW_VISION], ids=["text", "vision"])
def test_every_family_runs_in_two_dtypes(loaded: Loaded, dtype: dict[str, str]) -> None:
    if loaded.family.name == "kosmos2":
        with pytest.raises(ModelError, match="type kosmos-2 has one dtype for all its parts"):
            load(dtype, loaded.path)
        return
    missing = [key for key in dtype if key not in {*loaded.model.config.sub_configs, "rest"}]
    if missing:
        with pytest.raises(ModelError, match=f"names {missing[0]}, which is no part"):
            load(dtype, loaded.path)
        return
    if loaded.family.name == "gemma4_unified":
        with pytest.raises(ModelError, match="names vision_config, which is no module of its own"):
            load(dtype, loaded.path)
        return
    model = load(dtype, loaded.path)
    kept = kept_in_float32(model)
    for key in ("vision_config", "text_config"):
        assert dtypes_of(part(model, key), kept) <= {getattr(torch, dtype[key])}
    last = model.get_output_embeddings() or model.get_decoder()
    of_text = getattr(torch, dtype["text_config"])
    assert dtypes_of(last, kept) <= {of_text}
    angles = [b.dtype for name, b in model.named_buffers() if name.endswith("inv_freq")]
    assert set(angles) <= {torch.float32}
    seen: list[torch.dtype] = []
    for key in ("vision_config", "text_config"):
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        for outer in parts(model, key):  # of Video-LLaVA's two encoders one has no input
            weighing = [m for m in outer.modules() if isinstance(m, kinds)]
            for module in weighing[:1]:
                module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    engine = GenerateEngine(model, loaded.processor.tokenizer, pixel_dtype=torch.float32)
    samples = loaded.samples()
    answers = dict(engine.run(samples))
    assert {type(answers[s.row_index]).__name__ for s in samples} == {"Completion"}
    # Apertus 1.5 keeps all that sees in float32.
    assert set(seen) == {torch.float32} | dtypes_of(model)


def test_images_are_seen_in_float32_by_a_model_that_answers_in_bfloat16() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1, 1, 3, 96, 96)
    with torch.inference_mode():
        plain, narrow = (
            part(load(dtype), "vision_config")(pixels[0].float()).last_hidden_state
            for dtype in ("float32", NARROW_TEXT)
        )
        coarse = part(load("bfloat16"), "vision_config")(pixels[0].bfloat16()).last_hidden_state
    assert torch.equal(plain, narrow)
    assert (coarse.float() - plain).abs().max() > 1e-3


def test_weights_keep_what_their_part_can_hold() -> None:
    """Those saved in float32 do not go through bfloat16 on their way."""
    plain, mixed = load("float32"), load({"vision_config": "float32", "rest": "bfloat16"})
    for name, weight in part(mixed, "vision_config").named_parameters():
        assert torch.equal(weight, part(plain, "vision_config").get_parameter(name))
    assert dtypes_of(part(mixed, "text_config")) == {torch.bfloat16}
    assert mixed.get_input_embeddings().weight is mixed.get_output_embeddings().weight


def test_a_part_that_the_model_has_not() -> None:
    with pytest.raises(ModelError) as caught:
        load({"audio_config": "float32"})
    assert str(caught.value) == (
        "model.dtype names audio_config, which is no part of this model; "
        "there are text_config, vision_config, rest"
    )


def test_which_engine_and_how_many_bytes() -> None:
    mixed = "model.dtype={text_config: bfloat16, vision_config: float32, rest: auto}"
    cfg = compose("run", [mixed, "model.image_backend=pil"])
    assert cfg.model.image_backend is ImageBackend.pil
    assert isinstance(select_engine(cfg, device="cpu"), GenerateEngine)
    found, plain = (
        estimate_footprint(cfg, row_tokens=100),
        estimate_footprint(compose("run"), row_tokens=100),
    )
    assert plain.weight_bytes / 2 < found.weight_bytes < plain.weight_bytes
    assert (plain.dtype, set(found.dtype.split(" and "))) == ("float32", {"float32", "bfloat16"})
    assert found.token_bytes == plain.token_bytes / 2


@pytest.mark.parametrize(
    "dtype", ["{text_config: bfloat16, vision_config: float32}", "{vision_config: bfloat16}"]
)
def test_the_demo_model_still_answers_truly(tmp_path: Path, dtype: str) -> None:
    items = [item for item in held_out(8) if item.kind not in ROOM]
    texts = answer(items, tmp_path / "job", f"model.dtype={dtype}", "generation.max_new_tokens=16")
    right = [text == item.answer for text, item in zip(texts, items, strict=True)]
    assert sum(right) / len(right) > 0.95
