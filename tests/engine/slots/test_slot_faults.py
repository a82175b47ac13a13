"""What an exception costs an engine over slots: the rows at fault, and no other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.sampling import RowSampler
from batchvlm.engine.slots.vision import ImageFeatures
from batchvlm.engine.stops import RowStop
from batchvlm.errors import DeviceError, ErrorType, ExitCode
from batchvlm.records import Failure, Sample

from ..families import needs_slots
from ..faulty import (
    QUESTIONS,
    ROWS,
    TALE,
    Row,
    answers,
    asked,
    check,
    failing,
    refusing,
)
from ..loaded import MOST_NEW_TOKENS, Loaded
from ..outcomes import run

pytestmark = [needs_slots, pytest.mark.usefixtures("no_collection", "small_parts")]


class TestRowsAtFault:
    @settings(max_examples=40)
    @given(
        data=st.data(),
        rows=ROWS,
        max_slots=st.integers(1, 5),
        streams=st.integers(1, 3),
        lag=st.integers(0, 1),
    )
    def test_a_token_that_the_model_fails_on(
        self,
        small: Loaded,
        data: st.DataObject,
        rows: list[Row],
        max_slots: int,
        streams: int,
        lag: int,
    ) -> None:
        samples, expected = asked(small, rows), answers(small, rows)
        prompts = [sample.features["input_ids"][0].tolist() for sample in samples]
        # The last token of an answer is never read.
        read = [[*prompt, *ids[:-1]] for prompt, ids in zip(prompts, expected, strict=True)]
        token = data.draw(st.sampled_from(read[0][-MOST_NEW_TOKENS:]))
        engine = small.slots(
            max_slots=max_slots, max_prefill_tokens=60, cpu_streams=streams, eos=[]
        )
        engine._lag = lag
        error = RuntimeError("shapes do not match")
        with refusing(small, token, error):
            outcomes = run(engine, samples)
        check(outcomes, expected, [token in ids for ids in read])
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                assert outcome.error_type is ErrorType.ENGINE
                assert outcome.message == "RuntimeError: shapes do not match"

    @settings(max_examples=30)
    @given(data=st.data(), rows=ROWS, is_shared=st.booleans(), streams=st.integers(1, 3))
    def test_an_image_that_cannot_be_encoded(
        self,
        small: Loaded,
        data: st.DataObject,
        rows: list[Row],
        is_shared: bool,
        streams: int,
    ) -> None:
        samples = asked(small, rows)
        keys = sorted({key for sample in samples for key in sample.image_keys})
        bad = data.draw(st.sets(st.sampled_from(keys))) if keys else set()
        pixels = {
            sample.features["pixel_values"][i].tobytes()
            for sample in samples
            for i, key in enumerate(sample.image_keys)
            if key in bad
        }

        def is_bad(self: Any, units: Sequence[Any]) -> bool:
            shown = [image for unit in units for image in unit.arrays["pixel_values"]]
            return any(image.tobytes() in pixels for image in shown)

        engine = small.slots(max_slots=3, eos=[], share_images=is_shared, cpu_streams=streams)
        with failing(ImageFeatures, "encode", is_bad, ValueError("what a picture")):
            outcomes = run(engine, samples)
        check(outcomes, answers(small, rows), [bool(bad & {*s.image_keys}) for s in samples])

    def test_a_sample_that_is_like_no_other(self, small: Loaded) -> None:
        rows = [(question, 0, 3) for question in QUESTIONS]
        samples = asked(small, rows)
        broken = dict(samples[1].features)
        broken["pixel_values"] = np.zeros((1, 3, 5, 5), np.float32)
        samples[1] = Sample(**{**vars(samples[1]), "features": broken, "image_keys": ("bad",)})
        outcomes = run(small.slots(max_slots=2, eos=[]), samples)
        check(outcomes, answers(small, rows), [i == 1 for i in range(len(rows))])

    @pytest.mark.parametrize("lag", [0, 1])
    @pytest.mark.parametrize("max_slots", [1, 2, 8])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_logits_that_are_no_numbers_cost_their_row_alone(
        self, small: Loaded, value: float, max_slots: int, lag: int
    ) -> None:
        long, short = QUESTIONS[8], QUESTIONS[0]
        # Behind it, rows of shorter prompts take over its slot, beside one that goes further: what
        # it left in its slot lies ahead of theirs, within what the attention looks at.
        rows = [(long, 0, 7), (TALE, 0, 12), *[(short, 0, limit) for limit in (6, 5, 4, 6, 7)]]
        samples, expected = asked(small, rows), answers(small, rows)
        prompts = [sample.features["input_ids"][0].tolist() for sample in samples]
        read = [[*prompt, *ids[:-1]] for prompt, ids in zip(prompts, expected, strict=True)]
        others = {token for ids in read[1:] for token in ids}
        place = next(
            n for n, token in enumerate(expected[0]) if token not in {*prompts[0], *others}
        )
        said = expected[0][place]

        def overflow(module: Any, args: Any, output_BTD: torch.Tensor) -> torch.Tensor:
            return output_BTD.masked_fill((args[0] == said)[..., None], value)

        handle = small.tuned().get_input_embeddings().register_forward_hook(overflow)
        engine = small.slots(max_slots=max_slots, eos=[])
        engine._lag = lag
        try:
            outcomes = run(engine, samples)
        finally:
            handle.remove()
        check(outcomes, expected, [i == 0 for i in range(len(rows))])
        assert f"not finite after {place + 1} tokens" in outcomes[0].message

    def test_rows_after_a_failure_are_answered_by_the_same_engine(self, small: Loaded) -> None:
        rows = [(question, 0, 4) for question in QUESTIONS]
        engine = small.slots(max_slots=2, eos=[])
        with refusing(small, small.known(QUESTIONS[0])[0], RuntimeError("no")):
            assert any(isinstance(o, Failure) for o in run(engine, asked(small, rows)))
        check(run(engine, asked(small, rows)), answers(small, rows), [False] * len(rows))


class TestProcess:
    """What is no row's fault ends the run, wherever it shows."""

    PLACES = (
        (ImageFeatures, "encode"),
        (Decoder, "prefill"),
        (Decoder, "step"),
        # A GPU says so late: where its answer is waited for.
        (RowSampler, "choose"),
    )

    @pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda value: str(value))
    def test_a_failed_accelerator(self, small: Loaded, owner: Any, name: str) -> None:
        engine = small.slots(max_slots=2, eos=[])
        samples = asked(small, [(question, 0, 3) for question in QUESTIONS])
        error = torch.AcceleratorError("device-side assert")
        with (
            failing(owner, name, lambda *args, **kwargs: True, error),
            pytest.raises(DeviceError, match="the accelerator failed") as caught,
        ):
            list(engine.run(samples))
        assert caught.value.exit_code is ExitCode.INTERRUPTED

    @pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda value: str(value))
    def test_an_interrupt(self, small: Loaded, owner: Any, name: str) -> None:
        engine = small.slots(max_slots=2, eos=[])
        samples = asked(small, [(question, 0, 3) for question in QUESTIONS])
        with (
            failing(owner, name, lambda *args, **kwargs: True, KeyboardInterrupt()),
            pytest.raises(KeyboardInterrupt),
        ):
            list(engine.run(samples))

    def test_an_error_of_the_source_is_not_the_accelerators(self, small: Loaded) -> None:
        def samples() -> Iterator[Sample]:
            yield from asked(small, [(QUESTIONS[0], 0, 3)])
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            list(small.slots().run(samples()))


def test_a_tokenizer_that_raises_costs_its_row(
    small: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    completion = RowStop.completion

    def fails(self: RowStop, row_index: int, latency_s: float) -> Any:
        if row_index == 1:
            raise KeyError(99999)
        return completion(self, row_index, latency_s)

    monkeypatch.setattr(RowStop, "completion", fails)
    outcomes = run(small.slots(), small.samples())
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [
        i == 1 for i in range(len(outcomes))
    ]
