"""What an answer depends on changes the identity; what it does not depend on leaves it alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from batchvlm import identity
from batchvlm.identity import answer_identity, model_name, output_layout
from batchvlm.records import InputFile
from batchvlm.settings import compose

FILES = [InputFile(name="a.parquet", num_rows=3, row_groups=(3,), identity="0" * 64)]


def write_model(folder: Path, changed: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {f"layer.{i}": np.zeros((64, 64), np.float32) for i in range(20)}
    if changed:
        tensors[changed] += 1
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def of_model(folder: Path) -> object:
    return answer_identity(compose("run", [f"model.path={folder}"]), FILES)["model"]


@pytest.mark.parametrize("max_whole_bytes", [1, 1 << 30])
def test_other_weights_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_whole_bytes: int
) -> None:
    monkeypatch.setattr(identity, "_MAX_WHOLE_BYTES", max_whole_bytes)
    write_model(tmp_path / "model")
    before = of_model(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("notes")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert of_model(tmp_path / "moved") == before
    write_model(tmp_path / "moved", changed="layer.7")
    assert of_model(tmp_path / "moved") != before


@pytest.mark.parametrize(
    ("override", "is_other"),
    [
        ("data.image_root=/elsewhere", True),
        ("task.system=Be brief.", True),
        ("model.dtype=bfloat16", True),
        ("generation.top_k=3", True),
        ("generation.stop_on_repetition=false", True),
        ("generation.logprobs=true", True),
        ("data.columns.image=[image]", True),
        ("model.attn_implementation=eager", False),
        ("model.name=other", False),
        ("engine.device=cpu", False),
        ("batching.max_batch_size=1", False),
        ("runtime.num_workers=3", False),
        ("output.flush_every_s=1", False),
        ("output.dir=elsewhere", False),
    ],
)
def test_which_settings_an_answer_depends_on(override: str, is_other: bool) -> None:
    plain, changed = (answer_identity(compose("run", o), FILES) for o in ([], [override]))
    assert (plain != changed) is is_other


def test_the_input_is_known_by_content() -> None:
    cfg = compose()
    other = [InputFile(name="a.parquet", num_rows=3, row_groups=(3,), identity="1" * 64)]
    assert answer_identity(cfg, FILES) != answer_identity(cfg, other)
    many = [
        InputFile(name=f"{i}.parquet", num_rows=1, row_groups=(1,), identity=f"{i:064}")
        for i in range(1000)
    ]
    assert len(answer_identity(cfg, many)["input"]["files"]) == 1
    assert answer_identity(cfg, many) != answer_identity(cfg, many[::-1])


def test_the_models_name_in_the_output(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    hub = compose("run", ["model=hub", "model.path=user/model", "model.revision=abc"]).model
    assert model_name(compose().model) == "batchvlm-demo"
    assert model_name(compose("run", ["model=hub", f"model.path={tmp_path}/mine"]).model) == "mine"
    assert model_name(hub) == "user/model@abc"
    assert output_layout(compose("run", ["model.name=x"]))["model.name"] == "x"
