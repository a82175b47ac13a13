"""A model whose layers two processes hold together, by gloo, against one that is whole."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from batchvlm.batching import BatchingConfig
from batchvlm.config import JobConfig, ModelConfig
from batchvlm.engine.generate import ChosenToken, GenerateEngine
from batchvlm.engine.select import select_engine
from batchvlm.errors import ModelError, ReplicaError
from batchvlm.records import Completion, Failure, Sample
from batchvlm.runtime import replicas
from batchvlm.runtime.replicas import Followers, Replica
from batchvlm.settings.compose import compose

from . import follower
from .families import FAMILIES, Family
from .loaded import Loaded

DIVIDED = tuple(
    family
    for family in FAMILIES
    if family.name
    not in {
        *("blip_2", "chameleon", "donut", "florence2", "gemma3n", "gemma4", "gemma4_moe"),
        *("gemma4_unified", "glm5_next", "inkling", "kosmos2", "mllama", "molmo2", "paligemma"),
        *("phi4_multimodal", "qwen3_vl_moe", "step3p7"),
    }
)
"""Families for which transformers has a plan, and which two processes can divide."""


class Second:
    """The other process, begun anew when it has ended."""

    process: Any = None
    port: int

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """The leader's listening thread kills it too, and the next test waits for that."""

    @property
    def replica(self) -> Replica:
        """Its leader's."""
        return follower.replica_of(0, self.port)

    def ensure(self) -> None:
        with self._lock:
            if self.process is None or not self.process.is_alive():
                self._start()

    def _start(self) -> None:
        # Both count the replicas that they were part of.
        replicas._meetings = itertools.count()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = multiprocessing.get_context("spawn").Process(
            target=follower.main, args=(self.port,), daemon=True
        )
        self.process.start()

    def kill(self) -> None:
        with self._lock:
            self.process.kill()
            self.process.join()


@pytest.fixture(scope="module")
def second() -> Iterator[Second]:
    second = Second()
    yield second
    if dist.is_initialized():
        dist.destroy_process_group()
    if second.process is not None:
        second.kill()


@pytest.fixture
def followers(second: Second) -> Iterator[Followers]:
    second.ensure()
    with Followers(second.replica) as followers:
        followers.on_loss = lambda reason: pytest.fail(reason)
        yield followers


def job(path: str, **batching: Any) -> JobConfig:
    cfg = compose("run", ["model=hub", f"model.path={path}", "model.dtype=float32"])
    model = ModelConfig(path=path, dtype="float32", tp_plan="auto", gpus_per_replica=2)
    return replace(cfg, model=model, batching=BatchingConfig(**batching))


Load = Callable[..., GenerateEngine]


@pytest.fixture
def load(followers: Followers) -> Load:
    def load(path: str, **batching: Any) -> GenerateEngine:
        engine = select_engine(job(path, **batching), device="cpu", followers=followers)
        assert isinstance(engine, GenerateEngine)
        return engine

    return load


def answers(engine: GenerateEngine, samples: Sequence[Sample]) -> list[Completion | Failure]:
    done = dict(engine.run(samples))
    return [done[sample.row_index] for sample in samples]


@pytest.mark.parametrize("family", DIVIDED, ids=lambda family: family.name)
def test_two_halves_answer_as_the_whole_does(
    family: Family, load_once: Callable[[Family], Loaded], request: pytest.FixtureRequest
) -> None:
    loaded = load_once(family)  # before the other process is waited for: it may skip
    engine = request.getfixturevalue("load")(loaded.path)
    sizes = {type(weight).__name__ for weight in engine._model.parameters()}
    assert "DTensor" in sizes
    assert "LOCAL_RANK" not in os.environ  # accelerate would take it for a launcher's
    for found, expected in zip(
        answers(engine, loaded.samples()), loaded.answers(loaded.samples()), strict=True
    ):
        assert isinstance(found, Completion)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mllama", "transformers has no plan that divides Mllama"),
        ("blip_2", "transformers has no plan that divides Blip2"),
        ("paligemma", "2 processes cannot divide the num_key_value_heads=1 of"),
        # transformers divides its experts first and transposes them then.
        ("qwen3_vl_moe", "cannot load the model of .*: transformers divides some of its weights"),
        ("gemma4_unified", "2 processes cannot divide the num_key_value_heads=1 of"),
        ("gemma4", "the plan of transformers is wrong for Gemma4.* with embeddings by layer"),
        ("glm5_next", "the plan of transformers is wrong for Glm5NextForConditionalGeneration"),
        ("inkling", "the plan of transformers is wrong for InklingForConditionalGeneration"),
        ("step3p7", "the plan of transformers is wrong for Step3p7ForConditionalGeneration"),
    ],
)
def test_a_model_that_cannot_be_divided(
    load: Load, load_once: Callable[[Family], Loaded], name: str, message: str
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    with pytest.raises(ModelError, match=message):
        load(load_once(family).path)


def test_after_weights_that_cannot_be_read_another_model_is_loaded(
    second: Second, small: Loaded, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(small.path, tmp_path / "model"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    for path, message in ((broken, "cannot load the model of model.path"), (small.path, None)):
        second.ensure()
        with Followers(second.replica) as followers:
            if message is None:
                assert select_engine(job(str(path)), device="cpu", followers=followers)
                continue
            with pytest.raises(ModelError, match=message):
                select_engine(job(str(path)), device="cpu", followers=followers)


def test_rows_with_settings_of_their_own_in_small_batches(load: Load, small: Loaded) -> None:
    question = small.questions[0]
    samples = [
        small.ask(i, question, seed=i % 3, max_new_tokens=2 + i % 5, temperature=i % 2 * 1.0)
        for i in range(12)
    ]
    engine = load(small.path, max_batch_size=5)
    found, expected = answers(engine, samples), answers(small.engine, samples)
    assert [f.token_ids for f in found] == [e.token_ids for e in expected]  # type: ignore[union-attr]
    assert engine.stats.num_batches == 4


def test_a_batch_that_the_leader_gives_up_is_given_up_by_all(
    load: Load, small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose choice of a token raises: its neighbours are answered all the same."""
    engine = load(small.path)
    choose, bad = ChosenToken.__call__, 2
    samples = [small.ask(i, small.questions[0], seed=i) for i in range(4)]
    expected = answers(small.engine, samples)
    bad_ids = torch.from_numpy(samples[bad].features["input_ids"][0])

    def raising(self: ChosenToken, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = len(bad_ids)
        if input_ids.shape[1] == width + 3 and samples[bad].row_index in self.rows:  # type: ignore[attr-defined]
            raise ValueError("this row's token cannot be chosen")
        return choose(self, input_ids, scores)

    generate = GenerateEngine._generate

    def noting(self: GenerateEngine, rows: Sequence[Sample]) -> Any:
        monkeypatch.setattr(ChosenToken, "rows", {r.row_index for r in rows}, raising=False)
        return generate(self, rows)

    monkeypatch.setattr(GenerateEngine, "_generate", noting)
    monkeypatch.setattr(ChosenToken, "__call__", raising)
    found = answers(engine, samples)
    assert isinstance(found[bad], Failure) and "cannot be chosen" in found[bad].message
    for i in {0, 1, 2, 3} - {bad}:
        assert found[i].token_ids == expected[i].token_ids  # type: ignore[union-attr]


def test_what_the_others_alone_cannot_do_ends_the_replica(
    load: Load, small: Loaded, monkeypatch: pytest.MonkeyPatch, second: Second
) -> None:
    """The leader is in the middle of a step that the other will not do."""
    ended: list[str] = []

    def end(reason: str) -> None:
        ended.append(reason)
        second.kill()  # as the leader's own end would let it end

    monkeypatch.setattr(replicas, "_NOTICE_S", 0.5)
    engine = load(small.path)
    channel = engine._team._channel  # type: ignore[union-attr]
    channel.on_loss = end  # type: ignore[attr-defined]
    sample = small.ask(0, small.questions[0], max_new_tokens=follower.TOLD_TO_FAIL)
    with pytest.raises(ReplicaError, match="run the same command again"):
        answers(engine, [sample])
    assert ended == [
        "process 1 of those that hold the model together failed: "
        "ValueError: this process alone fails"
    ]


def test_a_process_that_ends_is_noticed_and_no_row_pays(
    load: Load, small: Loaded, second: Second
) -> None:
    engine = load(small.path)
    second.kill()
    with pytest.raises(ReplicaError, match="process 1 of those that hold the model together has"):
        answers(engine, [small.ask(0, small.questions[0])])


def test_outside_of_a_launch_it_is_refused(small: Loaded) -> None:
    with pytest.raises(ModelError, match="processes of a launch; there is no"):
        select_engine(job(small.path), device="cpu")
