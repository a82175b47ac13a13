"""Which engine a model gets, and what is said about it."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from batchvlm import config
from batchvlm.config import EngineConfig, EngineName, JobConfig, ModelConfig
from batchvlm.engine import select
from batchvlm.engine.generate import _ALONE, GenerateEngine
from batchvlm.engine.select import select_engine, why_not_slots
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.errors import ExitCode, ModelError

from .families import VERSION, needs_slots
from .loaded import Loaded
from .outcomes import run


def job(folder: Path, name: EngineName) -> JobConfig:
    return JobConfig(model=ModelConfig(path=str(folder)), engine=EngineConfig(name=name))


@pytest.fixture
def changed(model: Any) -> Any:
    """The tiny LLaVA with another config."""

    def make(**settings: Any) -> Any:
        other = copy.copy(model)
        other.config = copy.deepcopy(model.config)
        for name, value in settings.items():
            setattr(other.config, name, value)
        return other

    return make


@needs_slots
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (EngineName.auto, SlotEngine),
        (EngineName.slots, SlotEngine),
        (EngineName.generate, GenerateEngine),
    ],
)
def test_a_family_that_was_tried(
    name: EngineName, kind: type, folder: Path, make_samples: Any, reference: Any
) -> None:
    engine = select_engine(job(folder, name), device="cpu")
    assert isinstance(engine, kind)
    outcomes = run(engine, make_samples({}, {}))
    assert [list(outcome.token_ids) for outcome in outcomes] == [reference(0), reference(1)]


@pytest.mark.parametrize("name", [EngineName.slots, EngineName.generate])
def test_special_tokens_are_part_of_the_text_where_that_is_asked_for(
    name: EngineName,
    folder: Path,
    tmp_path: Path,
    make_samples: Any,
    reference: Any,
    tokenizer: Any,
) -> None:
    """Here a token of the answer is made a special one, as `<|box_start|>` is."""
    ids = reference(0)
    marks = {i: tokenizer.convert_ids_to_tokens(i) for i in ids}
    mark_id = next(i for i in ids if marks[i].isalpha() and marks[i].isascii())
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    settings = json.loads((own / "tokenizer.json").read_text())
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    mark = {"id": mark_id, "content": marks[mark_id], "special": True}
    settings["added_tokens"].append(mark | entry)
    (own / "tokenizer.json").write_text(json.dumps(settings))
    for skips, expected in ((True, [i for i in ids if i != mark_id]), (False, ids)):
        asked = config.GenerationConfig(skip_special_tokens=skips)
        engine = select_engine(replace(job(own, name), generation=asked), device="cpu")
        (outcome,) = run(engine, make_samples({}))
        assert list(outcome.token_ids) == ids
        assert outcome.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_defaults_of_the_repository_that_are_not_used_are_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    settings = json.loads((own / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.05, "num_beams": 1}
    (own / "generation_config.json").write_text(json.dumps(settings))

    def said(**generation: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="batchvlm"):
            cfg = job(own, EngineName.auto)
            select_engine(
                replace(cfg, generation=config.GenerationConfig(**generation)), device="cpu"
            )
        messages = (r.getMessage() for r in caplog.records)
        return [m.partition(", which")[0] for m in messages if m.startswith("generation_config")]

    sets = "generation_config.json of the model sets "
    assert said() == [f"{sets}do_sample=True, temperature=0.5, repetition_penalty=1.05"]
    assert said(temperature=0.5) == [f"{sets}repetition_penalty=1.05"]
    assert said(temperature=0.5, repetition_penalty=1.05) == []


def test_every_family_of_the_tests(loaded: Loaded) -> None:
    family = loaded.family
    assert type(loaded.model).__name__ == family.model_class
    assert why_not_slots(loaded.model) == family.why_not_slots_here
    if VERSION >= (5, 19):
        assert (loaded.model.config.model_type in _ALONE) == family.is_alone


@needs_slots
class TestTypesThatWereNotTried:
    @pytest.fixture(autouse=True)
    def none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(select, "_VERIFIED", frozenset())

    def test_they_run_by_generate_and_the_log_says_so(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, logger="batchvlm"):
            engine = select_engine(job(folder, EngineName.auto), device="cpu")
        assert isinstance(engine, GenerateEngine)
        (line,) = [r.getMessage() for r in caplog.records if r.name == "batchvlm.engine.select"]
        assert line.startswith("LlavaForConditionalGeneration runs by generate(): model type llava")

    def test_they_run_over_slots_where_that_is_asked_for(self, folder: Path) -> None:
        assert isinstance(select_engine(job(folder, EngineName.slots), device="cpu"), SlotEngine)


@needs_slots
class TestModelsThatCannot:
    @pytest.mark.parametrize("is_asked_for", [False, True])
    def test_an_encoder_decoder(self, changed: Any, is_asked_for: bool) -> None:
        other = changed(is_encoder_decoder=True)
        assert "encoder-decoder" in why_not_slots(other, is_asked_for=is_asked_for)

    def test_layers_of_another_kind(self, changed: Any) -> None:
        other = changed()
        other.config.text_config.layer_types = ["linear_attention", "full_attention"]
        assert why_not_slots(other) == "it has layers of linear_attention"
        other.config.text_config.layer_types = ["sliding_attention", "full_attention"]
        assert why_not_slots(other) == ""

    @pytest.mark.parametrize(
        "settings", [{"begin_suppress_tokens": [7]}, {"bad_words_ids": [[7]]}], ids=str
    )
    def test_settings_of_the_repository_that_slots_do_not_know(
        self, changed: Any, settings: dict[str, Any]
    ) -> None:
        other = changed()
        other.generation_config = GenerationConfig(**settings)
        assert why_not_slots(other) == f"its repository sets {next(iter(settings))}"

    def test_quantized_weights_on_a_gpu_unless_asked_for(self, changed: Any) -> None:
        other = changed(quantization_config={"quant_method": "awq"})
        assert why_not_slots(other) == ""

        class OnGpu:
            device = torch.device("cuda")

            def __getattr__(self, name: str) -> Any:
                return getattr(other, name)

        assert why_not_slots(OnGpu()).startswith("quantized weights were tried over slots on a CPU")
        assert why_not_slots(OnGpu(), is_asked_for=True) == ""

    def test_a_model_without_images(self, changed: Any) -> None:
        other = changed()

        class Bare:
            base_model = object()
            config = other.config

        assert why_not_slots(Bare()) == "it gives no image features of its own"

    def test_asked_for_all_the_same_it_is_refused_with_the_reason(
        self, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*args: Any, **kwargs: Any) -> Any:
            other = copy.copy(model)
            other.generation_config = GenerationConfig(begin_suppress_tokens=[7])
            return other

        monkeypatch.setattr(select, "load_model", load)
        with pytest.raises(ModelError, match=r"cannot run Llava.*begin_suppress_tokens") as caught:
            select_engine(job(folder, EngineName.slots), device="cpu")
        assert caught.value.exit_code is ExitCode.USAGE
        assert "engine=generate" in caught.value.hint
        assert isinstance(select_engine(job(folder, EngineName.auto), device="cpu"), GenerateEngine)


@needs_slots
def test_ids_that_the_repository_forbids_stay_unsaid_over_slots(
    folder: Path, model: Any, make_samples: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsaid = reference(0)[:2]

    def load(*args: Any, **kwargs: Any) -> Any:
        other = copy.copy(model)
        other.generation_config = GenerationConfig(suppress_tokens=unsaid)
        return other

    monkeypatch.setattr(select, "load_model", load)
    engine = select_engine(job(folder, EngineName.auto), device="cpu")
    assert isinstance(engine, SlotEngine)
    (outcome,) = run(engine, make_samples({}))
    assert list(outcome.token_ids) == reference(0, suppress_tokens=unsaid)
