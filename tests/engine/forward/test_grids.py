"""What encoders make of patch grids is the same worked out on the host, and only there."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from batchvlm.engine.forward import grids, image_attention
from batchvlm.engine.slots import vision
from batchvlm.engine.slots.vision import ImageFeatures

from ..families import FAMILIES, Family, needs_slots
from ..loaded import Loaded
from ..outcomes import run
from ..slots.test_slots import asked, mixed_rows, tokens

pytestmark = needs_slots

NAMES = {
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    *("glm4v", "glm4v_moe", "glm46v", "glm_ocr"),
    *("ernie4_5_vl_moe", "paddleocr_vl"),
}
WITH_GRIDS = [f for f in FAMILIES if not f.why_not_slots_here and f.name in NAMES]


@pytest.fixture(params=WITH_GRIDS, ids=lambda family: family.name)
def loaded(request: pytest.FixtureRequest, load_once: Callable[[Family], Loaded]) -> Loaded:
    return load_once(request.param)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids stay on the host, and the encoder's attention is that of a GPU."""
    monkeypatch.setattr(vision, "_ASYNC_DEVICES", {"cpu"})

    def configs(model: Any) -> tuple[str, list[Any]]:
        kind = type(model.config.vision_config)
        found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        return image_attention.NAME, [c for c in found.values() if type(c) is kind]

    monkeypatch.setattr(image_attention, "encoder_configs", configs)


@pytest.fixture
def asking(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what an encoder works out by itself, as it does so."""
    encoder = grids.find_encoder(loaded.tuned().base_model)
    assert encoder is not None
    module = sys.modules[type(encoder).__module__]
    asked_for: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(function).bind(*args, **kwargs)
            given = bound.arguments.get("kwargs")
            before = dict(given or {})
            result = function(*args, **kwargs)
            if given is not None and len(given) == len(before) and result is not None:
                asked_for.append(function.__name__)
            return result

        return noted

    for name, function in list(vars(module).items()):
        if name.startswith("get_vision_") or name == "get_max_seqlen":
            monkeypatch.setattr(module, name, noting(function))
    return asked_for


def test_rows_are_answered_as_before(loaded: Loaded, as_on_a_gpu: None) -> None:
    rows = mixed_rows(loaded, 16)
    expected = [loaded.known(question, seed)[:limit] for question, seed, limit in rows]
    engine = loaded.slots(eos=[], canary=True)
    assert tokens(run(engine, asked(loaded, rows))) == expected
    assert engine._prefill.images._grid_encoder is not None


def test_the_encoder_makes_nothing_by_itself(
    loaded: Loaded, as_on_a_gpu: None, asking: list[str]
) -> None:
    images = loaded.slots()._prefill.images
    first, *others = (
        unit for sample in loaded.samples() for unit in images.units(sample) if sample.image_sizes
    )
    images.encode([first])
    assert asking  # held against what it makes plainly
    asking.clear()
    images.encode(others)
    assert asking == []


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "ernie4_5_vl_moe", "paddleocr_vl"]
)
def test_nothing_is_read_back_from_the_device(
    name: str, load_once: Callable[[Family], Loaded], as_on_a_gpu: None
) -> None:
    loaded = load_once(next(family for family in WITH_GRIDS if family.name == name))
    units = [
        unit for sample in loaded.samples() for unit in loaded.slots()._prefill.images.units(sample)
    ]
    arrays = {name: torch.from_numpy(a) for name, a in units[0].arrays.items()}
    # A device without values: to read one is an error.
    model = loaded.own().to("meta")
    encoder = grids.find_encoder(model.base_model)
    assert encoder is not None
    with image_attention.attending(*image_attention.encoder_configs(model)):
        made = grids.grid_inputs(encoder, arrays["image_grid_thw"])
        pixels, sent = arrays["pixel_values"].to("meta"), arrays["image_grid_thw"].to("meta")
        there = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in made.items()}
        features = model.base_model.get_image_features
        out = features(pixels, arrays["image_grid_thw"], return_dict=True, **there)
        assert out.pooler_output[0].is_meta
        with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
            features(pixels, sent, return_dict=True)


def test_an_encoder_that_comes_to_something_else_works_as_it_did(
    loaded: Loaded, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid_inputs = grids.grid_inputs

    def wrong(encoder: torch.nn.Module, grids_I3: torch.Tensor) -> dict[str, Any]:
        made = grid_inputs(encoder, grids_I3)
        return {**made, "position_ids": made["position_ids"].flip(0)}

    monkeypatch.setattr(vision, "grid_inputs", wrong)
    rows = mixed_rows(loaded, 8)
    expected = [loaded.known(question, seed)[:limit] for question, seed, limit in rows]
    engine = loaded.slots(eos=[])
    assert tokens(run(engine, asked(loaded, rows))) == expected
    assert engine._prefill.images._grid_encoder is None


def test_other_encoders_get_what_they_got(
    load_once: Callable[[Family], Loaded], as_on_a_gpu: None
) -> None:
    (family,) = (family for family in FAMILIES if family.name == "llava")
    images: ImageFeatures = load_once(family).slots()._prefill.images
    assert images._grid_encoder is None
