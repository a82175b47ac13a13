"""What a batch that raises costs: the rows at fault, and no other."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.config import BatchingConfig
from batchvlm.engine.generate import GenerateEngine
from batchvlm.errors import DeviceError, ErrorType, ExitCode
from batchvlm.records import Failure, Generation, Sample

from .outcomes import run


@pytest.fixture
def failing(engine_with: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., GenerateEngine]:
    """An engine whose model raises on certain rows; `calls` collects the rows of each call.

    Rows are known by the last id of their prompt.
    """

    def make(
        rows: Sequence[int], error: Exception, calls: list[list[int]] | None = None
    ) -> GenerateEngine:
        def generate(
            *,
            input_ids: torch.Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            present = input_ids[:, -1].tolist()
            if calls is not None:
                calls.append(present)
            if set(rows) & set(present):
                raise error
            scores = torch.nn.functional.one_hot(input_ids[:, -1], 100).float()
            chosen = logits_processor(input_ids, scores).argmax(-1)
            ids = torch.cat([input_ids, chosen[:, None]], dim=1)
            assert stopping_criteria[0](ids, None).all()
            return ids

        engine = engine_with()
        monkeypatch.setattr(engine._model, "generate", generate, raising=False)
        # A full garbage collection for each failure would take most of the test's time.
        monkeypatch.setattr("batchvlm.engine.generate.free_memory", lambda device: None)
        return engine

    return make


def marked(num_rows: int) -> list[Sample]:
    return [
        Sample(
            row_index=i,
            features={"input_ids": torch.tensor([[2] * (3 + i % 3) + [i]]).numpy()},
            image_tokens=0,
            image_sizes=(),
            generation=Generation(max_new_tokens=1),
        )
        for i in range(num_rows)
    ]


@settings(max_examples=60)
@given(num_rows=st.integers(1, 20), data=st.data())
def test_only_the_rows_at_fault_fail(num_rows: int, data: st.DataObject, failing: Any) -> None:
    at_fault = data.draw(st.sets(st.integers(0, num_rows - 1)))
    engine = failing(sorted(at_fault), RuntimeError("shapes do not match"))
    for i, outcome in enumerate(run(engine, marked(num_rows))):
        if i in at_fault:
            assert outcome == Failure(
                error_type=ErrorType.ENGINE, message="RuntimeError: shapes do not match"
            )
        else:
            assert outcome.token_ids == (i,)
            assert outcome.row_index == i


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_no_numbers_fails_alone(
    temperature: float, engine_with: Any, make_samples: Any, tokenizer: Any
) -> None:
    samples = make_samples({}, {"temperature": temperature}, {})
    engine = engine_with()
    whole = run(engine, samples)
    model = engine._model
    embed = model.get_input_embeddings()
    # The row at fault says a token whose embedding overflowed; no other row says it.
    said = whole[1].token_ids
    others = {t for i in (0, 2) for t in whole[i].token_ids}
    others |= {int(t) for sample in samples for t in sample.features["input_ids"][0]}
    place = next(n for n, token in enumerate(said[:-1]) if token not in others)

    def overflow(module: Any, args: Any, output_BTD: torch.Tensor) -> torch.Tensor:
        is_bad_BT = args[0] == said[place]
        return output_BTD.masked_fill(is_bad_BT[..., None], torch.inf)

    handle = embed.register_forward_hook(overflow)
    try:
        before, failed, after = run(engine, samples)
    finally:
        handle.remove()
    assert before.token_ids == whole[0].token_ids
    assert after.token_ids == whole[2].token_ids
    assert failed.error_type is ErrorType.ENGINE
    assert f"not finite after {place + 1} tokens" in failed.message


def test_the_row_at_fault_is_found_by_halving(failing: Any) -> None:
    calls: list[list[int]] = []
    run(failing([11], RuntimeError(), calls), marked(64))
    # 64, then two halves at each of the six levels below.
    assert len(calls) == 13


def test_batches_after_a_failure_are_answered(failing: Any) -> None:
    engine = failing([1], RuntimeError("no"))
    samples = marked(6)
    engine._batching = BatchingConfig(max_batch_size=3)
    outcomes = dict(engine.run(samples))
    assert sorted(outcomes) == list(range(6))
    assert [row for row, o in outcomes.items() if isinstance(o, Failure)] == [1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
            "can't allocate memory: you tried to allocate 1000000000000 bytes."
        ),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_a_row_that_does_not_fit_is_told_apart(error: Exception, failing: Any) -> None:
    outcomes = run(failing([2], error), marked(4))
    assert [isinstance(o, Failure) for o in outcomes] == [False, False, True, False]
    assert outcomes[2].error_type is ErrorType.OOM


def test_the_message_is_one_short_line(failing: Any) -> None:
    (outcome,) = run(failing([0], ValueError("first\n\n  second " + "x" * 999)), marked(1))
    assert outcome.message.startswith("ValueError: first second xxx")
    assert len(outcome.message) < 250


def test_an_interrupt_is_no_failure_of_a_row(failing: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(failing([0], KeyboardInterrupt()), marked(2))


def test_memory_of_a_failed_attempt_is_free_before_the_next(
    engine_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[weakref.ref[torch.Tensor]] = []
    still_held: list[int] = []

    def generate(*, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        still_held.append(sum(ref() is not None for ref in attempts))
        activations = torch.zeros(1)
        attempts.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = engine_with()
    monkeypatch.setattr(engine._model, "generate", generate, raising=False)
    gc.disable()
    try:
        run(engine, marked(4))
    finally:
        gc.enable()
    assert len(attempts) == 7
    assert still_held == [0] * 7


def test_a_failed_accelerator_ends_the_run_and_charges_no_row(failing: Any) -> None:
    engine = failing([3], torch.AcceleratorError("device-side assert"))
    with pytest.raises(DeviceError, match="the accelerator failed") as caught:
        list(engine.run(marked(6)))
    assert caught.value.exit_code is ExitCode.INTERRUPTED


def test_a_family_that_cannot_be_batched_answers_row_by_row(
    failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []
    engine = failing([], ValueError(), calls)
    monkeypatch.setattr("batchvlm.engine.generate._ALONE", {engine._model.config.model_type})
    assert len(list(engine.run(marked(5)))) == 5
    assert [len(rows) for rows in calls] == [1] * 5
