"""Weights in fewer bits, adapters and device maps, on the demo model, whose answers are known."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from batchvlm import demo
from batchvlm.config import ImageBackend, ModelConfig, Quantization
from batchvlm.demo.questions import held_out
from batchvlm.engine.generate import GenerateEngine
from batchvlm.engine.select import select_engine
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.errors import ModelError
from batchvlm.model import quantization
from batchvlm.model.adapters import pin_adapter
from batchvlm.model.loading import load_model, load_processor
from batchvlm.model.quantization import check_quantized, is_quantized
from batchvlm.settings.compose import compose

from ..demo.test_accuracy import ROOM, answer

LOGIT_ERROR = {
    Quantization.quanto_int8: 0.01,
    Quantization.quanto_int4: 0.15,
    Quantization.quanto_float8: 0.03,
    Quantization.bnb_int8: 0.015,
    Quantization.bnb_nf4: 0.12,
    Quantization.torchao_int8: 0.01,
    Quantization.torchao_int8_dynamic: 0.02,
    Quantization.torchao_float8: 0.03,
}
"""How far the demo model's logits may move, as a share of their length: twice what was seen."""


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(
        path=str(demo.MODEL_DIR), dtype="float32", image_backend=ImageBackend.pil, **settings
    )


def load(**settings: Any) -> Any:
    return load_model(config(**settings), device="cpu")


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """A padded batch of questions about one image each."""
    conversations = []
    for item in [item for item in held_out(2) if len(item.images) == 1][:8]:
        image = Image.open(io.BytesIO(item.images[0])).convert("RGB")
        content = [{"type": "image", "image": image}, {"type": "text", "text": item.question}]
        conversations.append([{"role": "user", "content": content}])
    encoded = load_processor(config()).apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    return dict(encoded)


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1].float()  # type: ignore[no-any-return]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def plain(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return logits(load(), inputs)


def needs(kind: Quantization) -> None:
    pytest.importorskip({"quanto": "optimum.quanto", "bnb": "bitsandbytes"}.get(
        kind.value.split("_")[0], "torchao"
    ))  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        # Quanto compiles a kernel for it, which takes a minute.
        pytest.param(kind, marks=[pytest.mark.soak] if kind is Quantization.quanto_int4 else [])
        for kind in Quantization
    ],
)
class TestEachKind:
    def test_moves_the_logits_by_little(
        self, kind: Quantization, inputs: dict[str, torch.Tensor], plain: torch.Tensor
    ) -> None:
        needs(kind)
        model = load(quantization=kind)
        assert 1e-4 < distance(logits(model, inputs), plain) < LOGIT_ERROR[kind]
        quantized = [path for path, module in model.named_modules() if is_quantized(module)]
        assert len(quantized) == 28  # seven in each of the language model's four layers
        assert all(path.startswith("model.text_model.layers.") for path in quantized)

    @pytest.mark.soak
    def test_leaves_the_demo_model_its_answers(self, kind: Quantization, tmp_path: Path) -> None:
        needs(kind)
        items = [item for item in held_out(8) if item.kind not in ROOM]
        settings = (f"model.quantization={kind.value}", "generation.max_new_tokens=16")
        texts = answer(items, tmp_path / "job", *settings, "runtime.num_workers=0")
        right = [text == item.answer for item, text in zip(items, texts, strict=True)]
        print(kind.value, sum(right), len(right))
        least = 0.85 if kind in (Quantization.quanto_int4, Quantization.bnb_nf4) else 0.97
        assert sum(right) >= least * len(right), f"{sum(right)} of {len(right)}"


class TestModulesToSkip:
    def test_a_name_that_matches_nothing_is_refused(self) -> None:
        with pytest.raises(ModelError, match="names 'vision_tower', which is no module") as caught:
            load(quantization=Quantization.torchao_int8, quantization_skip=["vision_tower"])
        assert "model.vision_model" in caught.value.hint

    def test_the_last_part_of_a_name_will_do(self) -> None:
        skip = ["vision_model", "model.connector", "lm_head", "down_proj"]
        model = load(quantization=Quantization.torchao_int8, quantization_skip=skip)
        quantized = [path for path, module in model.named_modules() if is_quantized(module)]
        assert len(quantized) == 24 and not any("down_proj" in path for path in quantized)

    def test_an_empty_list_leaves_nothing_out(self) -> None:
        model = load(quantization=Quantization.torchao_int8, quantization_skip=[])
        assert any("vision_model" in p for p, m in model.named_modules() if is_quantized(m))

    def test_a_library_that_does_not_heed_them_is_found_out(self) -> None:
        model = load(quantization=Quantization.torchao_int8)
        with pytest.raises(ModelError, match="must stay unquantized"):
            check_quantized(model, ["model.text_model"])
        with pytest.raises(ModelError, match="quantized nothing"):
            check_quantized(load(), [])


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("quanto_int8", "quanto"), ("bnb_nf4", "bitsandbytes"), ("torchao_int8", "torchao")],
)
def test_a_library_that_is_missing(kind: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=rf"not installed; pip install 'batchvlm\[{extra}\]'"):
        quantization.check_installed(Quantization(kind))


Engines = Callable[[str], Any]


@pytest.fixture(scope="module")
def engine_of() -> Iterator[Engines]:
    yield cache(lambda kind: select_engine(compose("run", [kind]), device="cpu"))


def test_which_engine_runs_them(engine_of: Engines) -> None:
    assert isinstance(engine_of("model.quantization=torchao_int8"), SlotEngine)
    assert isinstance(engine_of("model.quantization=quanto_int4"), GenerateEngine)
    assert isinstance(engine_of("model.device_map=auto"), GenerateEngine)


def test_a_device_map_changes_no_answer(
    inputs: dict[str, torch.Tensor], plain: torch.Tensor
) -> None:
    spread = {"model.vision_model": "cpu", "model.connector": "cpu", "model.text_model": "cpu"}
    for device_map in ("auto", spread | {"lm_head": "cpu"}):
        assert distance(logits(load(device_map=device_map), inputs), plain) < 1e-6


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes the demo model visibly."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=4, target_modules=r".*text_model.*(q_proj|down_proj)", init_lora_weights=False
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    for name in ("lora", "dora"):
        lora.use_dora = name == "dora"
        peft.get_peft_model(load(), lora).save_pretrained(folder / name)
    return folder


class TestAdapters:
    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_are_merged_and_exact(
        self, kind: str, adapter: Path, inputs: dict[str, torch.Tensor], plain: torch.Tensor
    ) -> None:
        from peft import PeftModel

        model = load(adapter=str(adapter / kind))
        assert {
            type(module).__name__ for module in model.modules() if "Lora" in str(type(module))
        } == set()
        expected = logits(PeftModel.from_pretrained(load(), adapter / kind), inputs)
        assert distance(logits(model, inputs), expected) < 1e-5
        assert distance(expected, plain) > 0.01
        by_folder = load(adapter=str(adapter), adapter_subfolder=kind)
        assert distance(logits(by_folder, inputs), expected) < 1e-5

    def test_stay_apart_from_quantized_weights(
        self, adapter: Path, inputs: dict[str, torch.Tensor]
    ) -> None:
        merged = logits(load(adapter=str(adapter / "lora")), inputs)
        model = load(adapter=str(adapter / "lora"), quantization=Quantization.torchao_int8)
        assert distance(logits(model, inputs), merged) < 0.02

    def test_are_merged_where_a_quantized_model_is_whole(self, tmp_path: Path) -> None:
        import peft

        whole = r".*vision_model.*q_proj"
        dora = peft.LoraConfig(r=4, target_modules=whole, init_lora_weights=False, use_dora=True)
        peft.get_peft_model(load(), dora).save_pretrained(tmp_path)
        model = load(adapter=str(tmp_path), quantization=Quantization.torchao_int8)
        assert not any("lora" in name for name, _ in model.named_parameters())

    @pytest.mark.parametrize("damage", ["missing", "shape"])
    def test_that_are_not_whole_are_refused(
        self, damage: str, adapter: Path, tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file, save_file

        name = "adapter_model.safetensors"
        weights = load_file(adapter / "lora" / name)
        first = min(weights)
        if damage == "missing":
            weights["another" + first] = weights.pop(first)
        else:
            weights[first] = weights[first][:, :3].contiguous()
        save_file(weights, tmp_path / name)
        text = (adapter / "lora" / "adapter_config.json").read_text()
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=r"lacks 1 weights .* such as model\.text_model"):
            load(adapter=str(tmp_path))

    def test_of_another_model_are_refused(self, adapter: Path, tmp_path: Path) -> None:
        text = (adapter / "lora" / "adapter_config.json").read_text()
        changed = json.loads(text) | {"target_modules": ["no_such_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        weights = "adapter_model.safetensors"
        (tmp_path / weights).write_bytes((adapter / "lora" / weights).read_bytes())
        with pytest.raises(ModelError) as caught:
            load(adapter=str(tmp_path))
        assert "\n" not in str(caught.value) and "no_such_proj" in str(caught.value)

    def test_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no such folder"):
            pin_adapter(config(adapter="./none"))
        with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
            pin_adapter(config(adapter=str(tmp_path)))
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
            pin_adapter(config(adapter=str(tmp_path)))
        with pytest.raises(ModelError, match=r"cannot load model\.adapter=user/none"):
            pin_adapter(config(adapter="user/none"))
