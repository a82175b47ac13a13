"""Decoding in one stream beside prefill in the others: when, and that it changes no answer."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.forward.streams import Streams
from batchvlm.engine.slots.clock import Clock
from batchvlm.engine.slots.decoding import Decoding
from batchvlm.engine.slots.overlap import AnswerLengths, num_packs_first
from batchvlm.engine.slots.pack_runner import PackRunner
from batchvlm.errors import DeviceError

from ..families import needs_slots
from ..faulty import QUESTIONS, answers, asked, check, failing
from ..loaded import MOST_NEW_TOKENS, Loaded
from ..outcomes import run


class TestLengths:
    def test_answers_are_taken_to_be_as_long_as_those_that_have_ended(self) -> None:
        lengths = AnswerLengths()
        assert lengths.expected(200) == 200
        lengths.count(30, 200)
        lengths.count(10, 200)
        assert lengths.expected(100) == 10
        assert lengths.expected(0) == 0

    def test_what_is_left_of_rows(self) -> None:
        rows: Any = [_Row(100, 0), _Row(100, 9), _Row(100, 30)]
        lengths = AnswerLengths()
        assert lengths.left(rows) == 100 + 91 + 70
        lengths.count(10, 100)
        # One that has gone further than expected goes on for at least one token.
        assert lengths.left(rows) == 10 + 1 + 1


class _Row:
    def __init__(self, max_new_tokens: int, num_chosen: int) -> None:
        self.max_new_tokens, self.num_chosen = max_new_tokens, num_chosen


class TestWhen:
    def test_the_last_packs_are_left_for_the_time_of_decoding(self) -> None:
        def packs(prompt_tokens: int, held_tokens: float, num_streams: int = 2) -> int:
            return num_packs_first(
                prompt_tokens, 100, held_tokens, pack_tokens=1000, num_streams=num_streams
            )

        # Answers of 1,000 tokens take as long as prompts of 4,000.
        assert packs(16_000, 900) == 12
        assert packs(9_000, 900) == 6
        assert packs(4_000, 900) == 0
        # Three streams prefill three times as much meanwhile.
        assert packs(9_000, 900, num_streams=4) == 0
        assert packs(13_000, 900, num_streams=4) == 4

    def test_without_enough_to_decode_until_a_pack_is_done_all_prefill(self) -> None:
        def packs(prompt_tokens: int, held_tokens: float) -> int:
            return num_packs_first(
                prompt_tokens, 5_000, held_tokens, pack_tokens=1000, num_streams=2
            )

        assert packs(3_000, 0) == 2
        assert packs(3_000, 249) == 2
        assert packs(3_000, 250) == 0
        assert packs(300, 75) == 0

    @given(
        prompt_tokens=st.integers(1, 10**6),
        answer_tokens=st.floats(0, 10**5),
        held_tokens=st.floats(0, 10**5),
        num_streams=st.integers(2, 8),
    )
    def test_no_stream_is_left_without_a_pack(
        self, prompt_tokens: int, answer_tokens: float, held_tokens: float, num_streams: int
    ) -> None:
        num = num_packs_first(
            prompt_tokens, answer_tokens, held_tokens, pack_tokens=1024, num_streams=num_streams
        )
        assert num >= 0
        assert num % num_streams == 0
        if held_tokens == 0:
            assert num > 0


ROWS = [(question, seed, MOST_NEW_TOKENS) for seed in (0, 1) for question in QUESTIONS]


def is_beside(runner: Any, rows: Any, streams: Streams) -> bool:
    return streams.share < 1


@contextmanager
def steps_within_packs() -> Iterator[list[int]]:
    """Let packs beside decoding last until a step was made; yields a list of their rows."""
    has_stepped = threading.Event()
    packs: list[int] = []
    run_pack, step = PackRunner.run, Decoder.step

    def run_late(self: Any, rows: Any, streams: Streams) -> Any:
        if is_beside(self, rows, streams):
            packs.append(len(rows))
            has_stepped.clear()
            assert has_stepped.wait(timeout=60)
        return run_pack(self, rows, streams)

    def step_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits_BV = step(self, *args, **kwargs)
        has_stepped.set()
        return logits_BV

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackRunner, "run", run_late)
        patch.setattr(Decoder, "step", step_and_tell)
        yield packs


@needs_slots
@pytest.mark.usefixtures("no_collection")
class TestBeside:
    @pytest.mark.parametrize("max_slots", [3, 64])
    def test_rows_are_decoded_while_a_pack_is_computed(
        self, small: Loaded, max_slots: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = small.slots(cpu_streams=2, max_prefill_tokens=60, max_slots=max_slots, eos=[])
        step = Decoding.step

        def step_of_full_slots(self: Any, streams: Streams) -> None:
            assert self.rows
            assert len(self.rows) == max_slots or not engine._parked
            step(self, streams)

        monkeypatch.setattr(Decoding, "step", step_of_full_slots)
        with steps_within_packs() as packs:
            outcomes = run(engine, asked(small, ROWS))
        check(outcomes, answers(small, ROWS), [False] * len(ROWS))
        assert packs

    def test_no_steps_are_made_when_no_row_is_left(
        self, small: Loaded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = small.slots(cpu_streams=2, max_prefill_tokens=60, eos=[])
        step = Decoding.step
        waits: list[int] = []

        def step_of_rows(self: Any, streams: Streams) -> None:
            assert self.rows
            step(self, streams)

        def until_no_row_is_left(runner: Any, rows: Any, streams: Streams) -> bool:
            if is_beside(runner, rows, streams):
                while engine._decoding.rows:
                    threading.Event().wait(0.001)
                waits.append(len(rows))
                threading.Event().wait(0.05)  # for steps that must not come
            return False

        monkeypatch.setattr(Decoding, "step", step_of_rows)
        with failing(PackRunner, "run", until_no_row_is_left, RuntimeError()):
            outcomes = run(engine, asked(small, ROWS))
        check(outcomes, answers(small, ROWS), [False] * len(ROWS))
        assert waits

    def test_few_rows_are_prefilled_ahead_of_full_slots(
        self, small: Loaded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = small.slots(cpu_streams=2, max_slots=4, eos=[])
        monkeypatch.setattr(engine, "_num_packs_first", lambda: 0)
        parked: Any = engine._parked
        parked.append(None)
        assert engine._is_time_to_overlap()
        parked.append(None)
        assert not engine._is_time_to_overlap()

    def test_rows_of_a_pack_beside_steps_count_as_waiting(self, small: Loaded) -> None:
        engine = small.slots(cpu_streams=3, max_prefill_tokens=60, eos=[])
        seen: list[tuple[int, int]] = []

        def counted(runner: Any, rows: Any, streams: Streams) -> bool:
            if is_beside(runner, rows, streams):
                seen.append((engine._prefill.num_waiting, engine._prefill._num_taken))
            return False

        with failing(PackRunner, "run", counted, RuntimeError()):
            run(engine, asked(small, ROWS))
        assert seen
        # A pack holds at most three of these rows, and there are at most two of them at once.
        assert all(0 < num_taken <= min(6, num_waiting) for num_waiting, num_taken in seen)

    def test_seconds_beside_others_are_those_of_a_share_of_the_threads(
        self, small: Loaded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shares: dict[str, set[float]] = defaultdict(set)
        measure = Clock.measure

        def told(self: Any, name: str, *, share: float = 1.0) -> Any:
            shares[name].add(round(share, 2))
            return measure(self, name, share=share)

        monkeypatch.setattr(Clock, "measure", told)
        engine = small.slots(cpu_streams=4, max_prefill_tokens=60, share_images=False, eos=[])
        engine._plan.lower_vision(1)  # no image is encoded with those of earlier packs
        run(engine, asked(small, ROWS))
        assert shares["decode_s"] == {0.25, 1.0}
        assert shares["prefill_s"] == {0.75, 1.0}
        assert shares["vision_s"] == {0.75, 1.0}

    def test_what_waits_is_known_as_soon_as_it_is_there(self, small: Loaded) -> None:
        engine = small.slots(cpu_streams=2, eos=[])
        samples = asked(small, ROWS)
        expected = 0
        for some in (samples[:2], samples[2:5]):
            engine._prefill.add(some)
            expected += sum(sample.prompt_tokens for sample in some)
            num_rows = len(engine._prefill._waiting)
            assert engine._prefill.ready_tokens == (expected, MOST_NEW_TOKENS * num_rows)

    def test_one_stream_does_one_thing_at_a_time(self, small: Loaded) -> None:
        engine = small.slots(cpu_streams=1, max_prefill_tokens=60, eos=[])
        with failing(PackRunner, "run", is_beside, RuntimeError("beside")) as packs:
            run(engine, asked(small, ROWS))
        assert not packs

    def test_slots_are_kept_full_while_more_rows_are_to_come(self, small: Loaded) -> None:
        engine = small.slots(cpu_streams=2, max_prefill_tokens=60, sort_window=8, eos=[])
        num_left = []

        def counted(runner: Any, rows: Any, streams: Streams) -> bool:
            if is_beside(runner, rows, streams):
                num_left.append(len(engine._feed))
            return False

        with failing(PackRunner, "run", counted, RuntimeError()):
            outcomes = run(engine, asked(small, ROWS))
        check(outcomes, answers(small, ROWS), [False] * len(ROWS))
        assert num_left
        assert not any(num_left)

    def test_a_row_that_fails_beside_others_fails_alone(self, small: Loaded) -> None:
        at_fault: set[int] = set()

        def first_beside(runner: Any, rows: Any, streams: Streams) -> bool:
            if not at_fault and is_beside(runner, rows, streams):
                at_fault.add(rows[-1].sample.row_index)
            return any(row.sample.row_index in at_fault for row in rows)

        engine = small.slots(cpu_streams=2, max_prefill_tokens=60, eos=[])
        error = RuntimeError("shapes do not match")
        with failing(PackRunner, "run", first_beside, error):
            outcomes = run(engine, asked(small, ROWS))
        assert at_fault
        check(outcomes, answers(small, ROWS), [i in at_fault for i in range(len(ROWS))])

    def test_a_broken_device_ends_the_run(self, small: Loaded) -> None:
        engine = small.slots(cpu_streams=2, max_prefill_tokens=60, eos=[])
        error = torch.AcceleratorError("device-side assert")
        with failing(PackRunner, "run", is_beside, error), pytest.raises(DeviceError):
            run(engine, asked(small, ROWS))

    def test_an_interrupted_step_stops_the_pack_beside_it(self, small: Loaded) -> None:
        has_begun, has_ended = threading.Event(), threading.Event()
        run_pack = PackRunner.run

        def run_for_ever(self: Any, rows: Any, streams: Streams) -> Any:
            if not is_beside(self, rows, streams):
                return run_pack(self, rows, streams)
            has_begun.set()
            try:
                while True:
                    threading.Event().wait(0.001)
            finally:
                has_ended.set()

        engine = small.slots(cpu_streams=2, max_prefill_tokens=60, eos=[])

        def in_a_pack(*args: Any, **kwargs: Any) -> bool:
            return has_begun.is_set()

        with (
            pytest.MonkeyPatch.context() as patch,
            failing(Decoder, "step", in_a_pack, KeyboardInterrupt()),
            pytest.raises(KeyboardInterrupt),
        ):
            patch.setattr(PackRunner, "run", run_for_ever)
            run(engine, asked(small, ROWS))
        assert has_ended.wait(timeout=60)
        check(run(engine, asked(small, ROWS)), answers(small, ROWS), [False] * len(ROWS))
