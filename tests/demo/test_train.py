import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from batchvlm.demo import evaluate, phases, train
from batchvlm.demo.phases import TrainConfig
from batchvlm.demo.questions import held_out

TINY = TrainConfig(
    num_images=24,
    num_steps_a=2,
    num_steps_b=4,
    images_per_step_a=8,
    images_per_step_b=4,
    pairs_per_step=1,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small are faster on one thread, far faster on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("model")
    train.train(TINY, output, checkpoint_every=2, log_every=1, num_eval_scenes=0)
    return output


def test_a_trained_folder_loads_and_answers(trained: Path) -> None:
    items = held_out(2)
    answers = evaluate.Answerer(trained).answer(items)
    assert len(answers) == len(items)
    weights = load_file(trained / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.bfloat16"}
    assert not any("head" in name and "lm_head" not in name for name in weights)


def test_the_report_says_how_it_was_made(trained: Path) -> None:
    report = json.loads((trained / "training.json").read_text())
    assert report["config"]["num_steps_b"] == 4
    assert report["config"]["seed"] == 0
    assert {"torch", "transformers"} <= set(report["versions"])
    assert set(report["last_training_accuracy"]) >= {"count", "which"}


def test_a_resumed_training_ends_with_the_same_weights(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint")  # of step 2 of 4
    train.train(TINY, tmp_path, is_resumed=True, num_eval_scenes=0)
    assert (tmp_path / "model.safetensors").read_bytes() == (
        trained / "model.safetensors"
    ).read_bytes()


def test_training_learns_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = TrainConfig(
        num_images=8, num_steps_a=0, num_steps_b=12, images_per_step_b=4, pairs_per_step=1
    )
    train.train(cfg, tmp_path, log_every=1, num_eval_scenes=0)
    losses = [
        float(line.split("loss ")[1].split()[0])
        for line in capsys.readouterr().out.splitlines()
        if "] B " in line
    ]
    assert len(losses) == cfg.num_steps_b
    assert losses[-1] < losses[0] * 0.7


def test_learning_rate_warms_up_and_falls() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer: Any = torch.optim.AdamW([weight], lr=1.0)
    rates = []
    for progress in (0.0, 0.015, 0.03, 0.5, 1.0):
        phases._set_learning_rate([optimizer], progress)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] > rates[3] > rates[4] > 0
