"""The canary is silent for whatever a repository sets, and not for a wrong answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from batchvlm.config import BatchingConfig, EngineConfig
from batchvlm.engine.forward.cache import SlotCache
from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.slots import canary
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.engine.slots.prefill import Prefill
from batchvlm.engine.slots.vision import Encoded, ImageFeatures, Unit
from batchvlm.errors import ExitCode, ModelError
from batchvlm.records import Failure, Sample

from ..families import needs_slots
from ..loaded import ABOUT_ONE, Loaded
from ..outcomes import run

pytestmark = needs_slots


@pytest.mark.parametrize(
    "defaults",
    [
        {},
        {"repetition_penalty": 20.0},
        {"suppress_tokens": list(range(0, 320, 2))},
        {"eos_token_id": list(range(1, 320))},
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_defaults_of_the_repository_are_no_difference(
    defaults: dict[str, Any], model: Any, tokenizer: Any, make_samples: Any
) -> None:
    changed = copy.copy(model)
    changed.generation_config = GenerationConfig(**defaults)
    engine = SlotEngine(changed, tokenizer, BatchingConfig(), EngineConfig(), eos_ids=[])
    run(engine, make_samples({}, {}, {}, {}))


def test_a_wrong_answer_ends_the_run_by_the_name_of_the_family(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = SlotCache.put

    def forgetful(self: SlotCache, slot: int, pieces: Any) -> None:
        put(self, slot, pieces)
        for layer in self._slotted:
            layer.slots[1][slot] = 0

    monkeypatch.setattr(SlotCache, "put", forgetful)
    engine = small.slots(canary=True)
    with pytest.raises(ModelError, match=r"LlavaFor.*token 2 of row") as caught:
        list(engine.run(small.samples()))
    assert caught.value.exit_code is ExitCode.USAGE
    assert "engine=generate" in caught.value.hint


def test_a_row_that_breaks_it_is_that_rows_failure(small: Loaded) -> None:
    samples = small.samples()
    features = dict(samples[0].features)
    features["pixel_values"] = np.zeros((1, 3, 2, 2), np.float32)
    bad = replace(samples[0], row_index=9, features=features, image_keys=("bad",))
    outcomes = run(small.slots(canary=True), [bad, *samples])
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [True] + [False] * 4


def over_slots_give_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args, **given: step(*args, **given) * torch.nan)


def test_what_is_no_number_is_a_difference_too(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    over_slots_give_nan(monkeypatch)
    with pytest.raises(ModelError, match="answers differently over slots"):
        list(small.slots(canary=True).run(small.samples()))


def test_rows_that_see_one_another_are_found_with_one_row(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One row of all tokens rather than one for each prompt.
    spans = property(lambda packed: [(0, packed.bounds[-1])])
    monkeypatch.setattr("batchvlm.engine.forward.attention.Packed.spans", spans)
    with pytest.raises(ModelError, match="answers differently over slots"):
        list(small.slots(canary=True).run(small.samples()[:1]))


def test_the_first_rows_with_images_are_compared_though_text_came_before(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[bool]] = []
    monkeypatch.setattr(
        canary,
        "check",
        lambda model, decoder, rows, images, **how: seen.append(
            [bool(r.image_sizes) for r in rows]
        ),
    )
    by_kind = sorted(small.samples(), key=lambda sample: bool(sample.image_sizes))
    engine = small.slots(canary=True)
    engine._batching = BatchingConfig(sort_window=1)
    list(engine.run(by_kind))
    assert seen == [[False], [True]]


def test_rows_that_become_ready_meanwhile_join_the_first_window(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        """The first sample is ready, the others once the canary has run."""

        def __init__(self) -> None:
            self.num_ready = 1

        def __iter__(self) -> Iterator[Sample]:
            for sample in small.samples():
                self.num_ready -= 1
                yield sample

        def is_ready(self) -> bool:
            return self.num_ready > 0

    stream = Stream()

    def check(model: Any, decoder: Any, rows: Sequence[Sample], *args: Any, **how: Any) -> None:
        assert len(rows) == 1
        stream.num_ready = len(small.samples())

    windows: list[int] = []
    add = Prefill.add
    monkeypatch.setattr(canary, "check", check)
    monkeypatch.setattr(
        Prefill, "add", lambda self, window: windows.append(len(window)) or add(self, window)
    )
    assert len(dict(small.slots(canary=True).run(stream))) == len(small.samples())
    assert windows == [len(small.samples())]


def test_what_slots_do_not_know_ends_the_run(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*args: Any, **how: Any) -> None:
        raise NotImplementedError("attention sinks")

    monkeypatch.setattr(canary, "check", check)
    with pytest.raises(ModelError, match="cannot run over slots: attention sinks"):
        list(small.slots(canary=True).run(small.samples()))


def test_what_it_encodes_is_not_encoded_again(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [small.ask(i, ABOUT_ONE, i) for i in range(4)]
    encoded: list[str] = []
    encode = ImageFeatures.encode

    def counted(self: ImageFeatures, units: Sequence[Unit]) -> Encoded:
        encoded.extend(unit.key for unit in units)
        return encode(self, units)

    monkeypatch.setattr(ImageFeatures, "encode", counted)
    engine = small.slots(canary=True)
    assert len(list(engine.run(samples))) == len(samples)
    assert sorted(encoded) == sorted(key for s in samples for key in s.image_keys)
    assert engine.stats.images_encoded == len(samples)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_quantized_model_may_round_the_other_way(
    small: Loaded, is_quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "relative_error", lambda mine, its: 0.06)
    engine = small.slots(canary=True)
    monkeypatch.setattr(small.tuned(), "is_quantized", is_quantized, raising=False)
    if is_quantized:
        assert len(list(engine.run(small.samples()))) == len(small.samples())
    else:
        with pytest.raises(ModelError, match="answers differently"):
            list(engine.run(small.samples()))
