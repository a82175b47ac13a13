"""What an answer depends on changes the identity; what it does not depend on leaves it alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from batchvlm import identity
from batchvlm.identity import answer_identity, model_name, output_layout, served_model
from batchvlm.records import InputFile
from batchvlm.settings.compose import compose

FILES = [InputFile(name="a.parquet", num_rows=3, row_groups=(3,), identity="0" * 64)]


def write_model(folder: Path, changed: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {f"layer.{i}": np.zeros((64, 64), np.float32) for i in range(20)}
    if changed:
        tensors[changed] += 1
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def of_model(folder: Path) -> object:
    return answer_identity(compose("run", ["model=hub", f"model.path={folder}"]), FILES)["model"]


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
        ("task.answer_prefix=A", True),
        ("task.answer_prefix=null", False),
        ("model.dtype=bfloat16", True),
        ("model.dtype={vision_config: bfloat16}", True),
        ("generation.top_k=3", True),
        ("generation.stop_on_repetition=false", True),
        ("generation.logprobs=true", True),
        ("data.columns.image=[image]", True),
        ("data.columns.image_optional=true", True),
        ("data.columns.image_optional=false", False),
        ("data.columns.chat_template_kwargs=more", True),
        ("data.columns.chat_template_kwargs=null", False),
        ("model.quantization=torchao_int8", True),
        ("model.chat_template_kwargs.thinks=false", True),
        ("model.chat_template_kwargs={}", False),
        ('model.prompt_tokens=["<a>"]', True),
        ("model.prompt_tokens=[]", False),
        ("generation.skip_special_tokens=false", True),
        ("generation.skip_special_tokens=true", False),
        ("model.attn_implementation=eager", False),
        ("model.device_map=auto", False),
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


def test_a_continued_message_is_another_prompt() -> None:
    chat = "data.columns.messages=chat"
    plain, continued = (
        answer_identity(compose("run", [chat, f"task.continue_final_message={value}"]), FILES)
        for value in ("false", "true")
    )
    assert plain != continued


def test_settings_that_came_later_leave_old_outputs_valid() -> None:
    identity = answer_identity(compose("run", []), FILES)
    assert identity["data"]["columns"].keys() == {"id", "image", "messages", "turns"}
    assert not {"chat_template_kwargs", "prompt_tokens"} & {*identity["model"]}
    assert "skip_special_tokens" not in identity["generation"]


def test_variables_in_batch_files_leave_their_outputs_valid() -> None:
    """A request with variables was an error; an output without one is the same either way."""
    batch, column = ["data=openai", "data.path=x"], "data.columns.chat_template_kwargs"
    usual = answer_identity(compose("run", batch), FILES)
    assert "chat_template_kwargs" not in usual["data"]["columns"]
    for other in ("null", "other"):
        assert answer_identity(compose("run", [*batch, f"{column}={other}"]), FILES) != usual


@pytest.mark.parametrize(
    ("override", "is_other"),
    [
        ("engine.endpoint.url=http://elsewhere:9000", False),
        ("engine.endpoint.max_concurrency=1", False),
        ("engine.endpoint.token_env=OTHER", False),
        ("model.dtype=bfloat16", False),  # the server's to choose
        ("engine.endpoint.model=other", True),
        ("engine.endpoint.image_format=jpeg", True),
        ("engine.endpoint.response_format=none", True),
        ("engine.endpoint.extra_body.top_k=3", True),
        ("model.max_image_pixels=1000", True),
        ("generation.temperature=0.5", True),
    ],
)
def test_what_a_servers_answer_depends_on(override: str, is_other: bool) -> None:
    def identity_of(*overrides: str) -> object:
        server = ("engine=endpoint", "engine.endpoint.url=http://node7")
        cfg = compose("run", [*server, *overrides])
        model = served_model(cfg.model, cfg.engine.endpoint)
        return answer_identity(replace(cfg, model=model), FILES)

    assert (identity_of() != identity_of(override)) is is_other


def test_an_adapter_is_known_by_content_or_commit(tmp_path: Path) -> None:
    def identity_of(*overrides: str) -> object:
        return answer_identity(compose("run", overrides), FILES)["model"]

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    same = [identity_of(f"model.adapter={tmp_path}/{name}") for name in ("a", "b")]
    assert same[0] == same[1] != identity_of()
    (tmp_path / "b" / "adapter_config.json").write_text('{"r": 4}')
    assert identity_of(f"model.adapter={tmp_path}/b") != same[0]
    by_hub = ("model.adapter=user/lora", "model.adapter_revision=abc")
    assert identity_of(*by_hub) != identity_of(*by_hub, "model.adapter_subfolder=vision")


def test_which_modules_are_quantized_is_part_of_it() -> None:
    def identity_of(*overrides: str) -> object:
        return answer_identity(compose("run", ["model.quantization=bnb_nf4", *overrides]), FILES)

    assert identity_of() != identity_of("model.quantization_skip=[lm_head]")


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
