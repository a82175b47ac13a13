"""A model that cannot be loaded is one line, whichever library found out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from batchvlm import demo, identity
from batchvlm.config import ModelConfig
from batchvlm.errors import ModelError
from batchvlm.identity import answer_identity, pin_model
from batchvlm.loading import load_model, load_processor
from batchvlm.settings import compose


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
    cfg = compose("run", [f"model.path={model}"])
    assert "cannot load the files of model.path" in refused(answer_identity, cfg, [])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    for path in ("/nonexistent", "./none", "~/none", f"{tmp_path}/none", f"{tmp_path}/model.gguf"):
        assert f"model.path={path}: no such folder" in refused(pin_model, ModelConfig(path=path))
