"""A model that cannot be loaded is one line, whichever library found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from batchvlm import demo, identity
from batchvlm.config import ColumnsConfig, ModelConfig
from batchvlm.engine.select import select_engine, why_not_slots
from batchvlm.errors import ConfigError, ErrorType, ModelError
from batchvlm.identity import answer_identity, pin_model
from batchvlm.model.chat_template import ChatTemplate
from batchvlm.model.kinds import _OTHERWISE
from batchvlm.model.loading import load_limits, load_model, load_processor, load_skeleton, spread
from batchvlm.preprocess.preprocessor import Preprocessor, PreprocessSpec
from batchvlm.records import Failure, Record
from batchvlm.settings.compose import compose

from ..engine.families.omni import OMNI, qwen2_5_thinker
from ..engine.tiny import tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo.MODEL_DIR, tmp_path / "model"))


def refused(call: object, *args: object, **kwargs: object) -> str:
    assert callable(call)
    with pytest.raises(ModelError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("num_bytes", [0, 1, 100_000])
def test_weights_that_were_cut_off(model: Path, num_bytes: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    message = refused(load_model, ModelConfig(path=str(model)), device="cpu")
    assert message.startswith(f"cannot load the model of model.path={model}: ")
    assert not message.endswith(": ")


def test_weights_that_are_missing(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(model / "model.safetensors")
    lacking = [name for name in weights if "text_model.layers.1.mlp" in name]
    save_file({k: v for k, v in weights.items() if k not in lacking}, model / "model.safetensors")
    message = refused(load_model, ModelConfig(path=str(model)), device="cpu")
    assert f"lacks {len(lacking)} weights of the language model" in message
    assert "text_model.layers.1.mlp" in message
    unused = next(name for name in weights if "vision_model.post_layernorm" in name)
    save_file({k: v for k, v in weights.items() if k != unused}, model / "model.safetensors")
    load_model(ModelConfig(path=str(model)), device="cpu")
    assert f"{model} lacks 1 weights, which are initialized at random, such as" in caplog.text


def test_of_a_model_that_also_speaks_the_part_that_writes_is_loaded(tmp_path: Path) -> None:
    thinker = qwen2_5_thinker(tokenizer(list(OMNI.values()), **OMNI))
    whole = transformers.Qwen2_5OmniForConditionalGeneration(
        transformers.Qwen2_5OmniConfig(thinker_config=thinker.to_dict(), enable_audio_output=False)
    )
    whole.save_pretrained(tmp_path)
    cfg = ModelConfig(path=str(tmp_path), dtype="float32")
    model = load_model(cfg, device="cpu")
    assert type(model).__name__ == type(load_skeleton(cfg)).__name__
    assert type(model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, whole.thinker.get_parameter(name))
    limits = load_limits(cfg)
    assert (limits.image_token_id, limits.patch_size) == (thinker.image_token_id, 14)


def test_of_several_chat_templates_the_default_is_taken(model: Path) -> None:
    expected = load_processor(ModelConfig(path=str(model))).chat_template
    file = model / "chat_template.jinja"
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ tools }}")
    assert load_processor(ModelConfig(path=str(model))).chat_template == expected
    file.rename(folder / "rag.jinja")
    message = refused(load_processor, ModelConfig(path=str(model)))
    assert "chat templates named rag, tool_use and none as default" in message
    own = ModelConfig(path=str(model), processor_kwargs={"chat_template": "{{ messages }}"})
    assert load_processor(own).chat_template == "{{ messages }}"


THINKING = """
  {% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}
{% if thinks is defined and not thinks %}no{% else %}yes{% endif %}{{ words | join("-") }}"""


def test_variables_of_the_chat_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text(THINKING)

    def prompt_of(**variables: Any) -> str:
        cfg = ModelConfig(path=str(model), chat_template_kwargs=variables)
        said = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
        return ChatTemplate(load_processor(cfg), variables=variables).text(said, [])

    plain = prompt_of()
    assert plain == "\nHi.yes"
    assert prompt_of(thinks=True) == plain
    assert prompt_of(thinks=False) == "\nHi.no"
    assert prompt_of(thinks=None, words=["a", "it's %} {{ x }}"]) == "\nHi.noa-it's %} {{ x }}"
    for name in ("think", "messages", "m['content'"):
        with pytest.raises(ConfigError, match=r"^model\.chat_template_kwargs: .*variable"):
            prompt_of(**{name: True})
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no variable 'thinks'"):
        prompt_of(thinks=False)


def prepared_text(model: Path, given: Any, **variables: Any) -> str:
    """Return the prompt of a row with variables of its own, or the message of its error."""
    cfg = compose("run", ["task.prompt=Hi.", "data.columns.image=null"])
    own = ModelConfig(path=str(model), chat_template_kwargs=variables)
    maker = Preprocessor(
        PreprocessSpec(
            model=own,
            task=cfg.task,
            columns=ColumnsConfig(chat_template_kwargs="more"),
            generation=cfg.generation,
            image_root=None,
            max_source_pixels=1000,
        )
    )
    row = Record(row=0, row_index=0, source_file="f", id="0", values={"more": given})
    outcome = maker.prepare(row)
    if isinstance(outcome, Failure):
        assert outcome.error_type is ErrorType.PROMPT
        assert "\n" not in outcome.message
        return outcome.message
    tokenizer = load_processor(own).tokenizer
    return str(tokenizer.decode(outcome.features["input_ids"][0]))


def test_a_rows_variables_lie_over_the_models(model: Path) -> None:
    (model / "chat_template.jinja").write_text(THINKING)
    for given, variables, expected in (
        (None, {}, "yes"),
        ({"thinks": False}, {}, "no"),
        ({"thinks": True}, {"thinks": False}, "yes"),
        ({"thinks": None}, {"thinks": False}, "no"),
        ({"words": ["a", "b"]}, {"thinks": False}, "noa-b"),
        # What a row says never becomes a control token.
        ({"words": ["<end_of_utterance>"]}, {}, "yes< end_of_utterance>"),
        ({"words": {"<image>": 1}}, {}, "yes< image>"),
    ):
        assert prepared_text(model, given, **variables).strip() == f"Hi.{expected}"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"think": False}, "the model's chat template has no variable 'think'"),
        ({"th\nink": 1}, "has no variable 'th\\nink'"),
        ({"messages": []}, "'messages' is no variable to set"),
        ({"m['content": []}, "is no variable to set"),
        ({"true": 1}, "'true' is no variable to set"),
    ],
)
def test_a_variable_that_the_template_lacks_is_the_rows_error(
    model: Path, given: Any, words: str
) -> None:
    (model / "chat_template.jinja").write_text(THINKING + "{# true #}")
    message = prepared_text(model, given, thinks=False)
    assert words in message
    assert "data.columns.chat_template_kwargs" in message


def test_a_chat_template_that_is_missing_is_said(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model / "chat_template.jinja").unlink()
    cfg = compose("run", ["model=hub", f"model.path={model}", "data=demo"])
    with caplog.at_level("INFO"):
        select_engine(cfg, device="cpu")
    assert "the model has no chat template" in caplog.text


def test_a_processor_of_another_form(model: Path) -> None:
    (model / "processor_config.json").write_text("[]")
    message = refused(load_processor, ModelConfig(path=str(model)))
    assert "cannot load the processor of model.path" in message and "AttributeError" in message


@pytest.mark.parametrize("head", [b"", b"\x07\0\0\0\0\0\0\0no json"])
def test_large_weights_without_a_header(
    model: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    monkeypatch.setattr(identity, "_MAX_WHOLE_BYTES", -1)
    (model / "model.safetensors").write_bytes(head)
    cfg = compose("run", ["model=hub", f"model.path={model}"])
    assert "cannot load the files of model.path" in refused(answer_identity, cfg, [])


@pytest.mark.parametrize("model_type", sorted(_OTHERWISE))
def test_a_model_that_does_another_thing_than_answer(model: Path, model_type: str) -> None:
    assert model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    message = refused(load_processor, ModelConfig(path=str(model)))
    assert message == f"models of type {model_type} are not supported: {_OTHERWISE[model_type]}"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    for path in ("/nonexistent", "./none", "~/none", f"{tmp_path}/none", f"{tmp_path}/model.gguf"):
        assert f"model.path={path}: no such folder" in refused(pin_model, ModelConfig(path=path))


class TestAReplicaOfSeveralGpus:
    """Numbers 2 and 3 of a machine, which has none: what transformers is told of them."""

    @pytest.fixture(autouse=True)
    def free(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
        """Bytes that each GPU has free."""
        free = {2: 40_000_000, 3: 40_000_000}
        monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda gpu: (free[gpu], 0))
        return free

    def told(self, device_map: object) -> dict[str, object]:
        cfg = ModelConfig(path=str(demo.MODEL_DIR), device_map=device_map, gpus_per_replica=2)
        return spread(cfg, "cuda:2")

    @pytest.mark.parametrize("kind", ["auto", "balanced", "sequential"])
    def test_the_model_is_spread_over_them_alone(self, kind: str, free: dict[int, int]) -> None:
        """As accelerate then decides, for a model that fills most of both."""
        free |= {2: 4_000_000, 3: 4_000_000}
        told = self.told(kind)
        assert told == {"device_map": kind, "max_memory": free}
        model = load_skeleton(ModelConfig(path=str(demo.MODEL_DIR), dtype="float32"))
        assert 4_000_000 < sum(p.numel() * 4 for p in model.parameters()) < 8_000_000
        room = dict(free)
        if kind != "sequential":
            room = get_balanced_memory(model, room, model._no_split_modules)
        places = infer_auto_device_map(model, room, model._no_split_modules)
        assert set(places.values()) == {2, 3}

    def test_a_mapping_counts_from_the_first_of_them(self) -> None:
        told = self.told({"model.text_model": 1, "lm_head": "cuda:0", "": "cpu", "a": "1"})
        assert told == {"device_map": {"model.text_model": 3, "lm_head": 2, "": "cpu", "a": 3}}
        message = refused(self.told, {"": 2})
        assert "names GPU 2, and a replica has 2" in message

    def test_one_process_alone_leaves_it_to_transformers(self) -> None:
        cfg = ModelConfig(path="m", device_map="auto")
        assert spread(cfg, "cuda:2") == spread(cfg, "cpu") == {"device_map": "auto"}

    def test_a_model_that_is_too_large_is_not_begun(self, free: dict[int, int]) -> None:
        free[3] = 1_000_000
        free[2] = 1_000_000
        message = refused(self.told, "auto")
        assert "does not fit into the 2 GPUs of a replica: 3.26 MB of weights, 2 MB free" in message


CONFIGURATION = """
from transformers import Idefics3Config

class OwnConfig(Idefics3Config):
    model_type = "own_idefics3"
"""
MODELING = """
from transformers import Idefics3ForConditionalGeneration
from .configuration_own import OwnConfig

class OwnModel(Idefics3ForConditionalGeneration):
    config_class = OwnConfig
"""


class TestARepositoryWithCodeOfItsOwn:
    @pytest.fixture
    def own(self, model: Path) -> Path:
        """The demo model with classes of its own, as older MiniCPM-V, Qwen-VL-Chat or CogVLM2."""
        folder = model
        (folder / "configuration_own.py").write_text(CONFIGURATION)
        (folder / "modeling_own.py").write_text(MODELING)
        config = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "configuration_own.OwnConfig"}
        classes["AutoModelForCausalLM"] = "modeling_own.OwnModel"
        config |= {"model_type": "own_idefics3", "auto_map": classes}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def test_is_refused_with_what_turning_it_on_means(self, own: Path) -> None:
        cfg = ModelConfig(path=str(own), dtype="float32")
        for call in (load_limits, lambda cfg: load_model(cfg, device="cpu")):
            message = refused(call, cfg)
            assert "needs Python code that comes with its repository" in message
            assert "model.trust_remote_code=true runs that code with all your rights" in message
            assert "pin model.revision" in message

    def test_runs_where_it_is_trusted(self, own: Path) -> None:
        plain = load_model(ModelConfig(path=str(demo.MODEL_DIR), dtype="float32"), device="cpu")
        cfg = ModelConfig(path=str(own), dtype="float32", trust_remote_code=True)
        model = load_model(cfg, device="cpu")
        assert type(model).__name__ == "OwnModel"
        assert type(load_skeleton(cfg)) is type(model)
        assert load_limits(cfg).image_token_id == plain.config.image_token_id
        ids = torch.tensor([[5, 6, 7]])
        ours, theirs = (m(input_ids=ids).logits for m in (model, plain))
        assert torch.equal(ours, theirs)
        assert why_not_slots(model).startswith("model type own_idefics3 was not tried over slots")

    def test_an_unknown_kind_without_code_is_not_taken_for_one(self, own: Path) -> None:
        config = json.loads((own / "config.json").read_text())
        del config["auto_map"]
        (own / "config.json").write_text(json.dumps(config))
        message = refused(load_limits, ModelConfig(path=str(own)))
        assert "own_idefics3" in message and "trust_remote_code" not in message
