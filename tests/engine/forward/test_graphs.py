"""Which graph a step is played back from, and for which rows: on a CPU, where a graph is its run.

What a capture is, and that it holds what it needs, only a GPU shows: `test_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchvlm.engine import faults
from batchvlm.engine.forward import graphs
from batchvlm.engine.forward.cache import RowCache, SlotCache
from batchvlm.engine.forward.decoder import Decoder
from batchvlm.engine.forward.graphs import Captured, StepGraphs
from batchvlm.engine.slots.engine import SlotEngine

from ..families import needs_slots
from ..faulty import OUT_OF_MEMORY, ROWS, Row, answers, asked, failing
from ..loaded import Loaded
from ..outcomes import run
from ..slots.test_slots import mixed_rows, tokens

pytestmark = pytest.mark.usefixtures("no_collection")

CPU = torch.device("cpu")


class Replayed:
    """A graph that computes anew into the tensor which was its output when it was captured."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self.logits_CV = run().clone()

    def replay(self) -> None:
        self.logits_CV.copy_(self._run())


class GraphsOnCPU(StepGraphs):
    def _capture(self, run: Callable[[], Tensor]) -> Captured:
        graph = Replayed(run)
        return Captured(cast(torch.cuda.CUDAGraph, graph), graph.logits_CV)


def graphed(small: Loaded, **settings: Any) -> SlotEngine:
    """An engine whose steps are played back, as on a GPU."""
    engine = small.slots(eos=[], cpu_streams=1, **settings)
    engine._decoder._graphs = GraphsOnCPU(CPU, is_by_length=True)
    return engine


def num_replays(engine: SlotEngine) -> int:
    assert engine._decoder._graphs is not None
    return engine._decoder._graphs.num_replays


@needs_slots
class TestParts:
    """A graph takes more rows than the part of a step that it is played for."""

    @pytest.mark.parametrize("most_rows", [None, 4, 3])
    def test_rows_beside_a_part_keep_what_they_have(
        self, small: Loaded, most_rows: int | None
    ) -> None:
        rows = [(question, seed, 12) for question, seed, _ in mixed_rows(small, 6)]
        engine = graphed(small, max_slots=8)
        if most_rows:
            engine._plan.lower_step(most_rows)
        assert tokens(run(engine, asked(small, rows))) == answers(small, rows)
        assert num_replays(engine) > 8

    def test_memory_that_was_short_for_a_step(self, small: Loaded) -> None:
        rows = [(question, seed, 12) for question, seed, _ in mixed_rows(small, 6)]

        def are_many(self: Any, *args: Any, **kwargs: Any) -> bool:
            spans = args[2]
            return bool(spans[-1].stop - spans[0].start > 4)

        engine = graphed(small, max_slots=8)
        with failing(Decoder, "step", are_many, OUT_OF_MEMORY) as raised:
            assert tokens(run(engine, asked(small, rows))) == answers(small, rows)
        assert raised and num_replays(engine) > 8

    @given(
        rows=ROWS,
        num_slots=st.integers(1, 6),
        most_rows=st.integers(1, 6),
        lag=st.integers(0, 1),
    )
    @settings(max_examples=25)
    def test_rows_answer_as_alone(
        self, small: Loaded, rows: list[Row], num_slots: int, most_rows: int, lag: int
    ) -> None:
        engine = graphed(small, max_slots=num_slots)
        engine._lag = lag
        engine._plan.lower_step(most_rows)
        assert tokens(run(engine, asked(small, rows))) == answers(small, rows)


class Steps:
    """Steps over slots whose logits are the places that were computed."""

    def __init__(self, on: StepGraphs) -> None:
        like = torch.zeros(1, 1, 2)
        self.cache = SlotCache(RowCache([(like, like)]), num_slots=512, length=8)
        self.graphs = on
        self.captured: list[int] = []
        self.places_N = torch.arange(512) + 10

    def play(self, num_rows: int, num_used: int | None = None) -> Tensor | None:
        def forward(size: int, length: int, places_C: Tensor) -> Tensor:
            return places_C[:, None]

        before = set(self.graphs._captured)
        used = num_rows if num_used is None else num_used
        out = self.graphs.step(self.cache, self.places_N, num_rows, 1, forward, num_used=used)
        self.captured += [size for size, _ in set(self.graphs._captured) - before]
        return out


@pytest.fixture
def steps() -> Steps:
    return Steps(GraphsOnCPU(CPU, is_by_length=False))


class TestSizes:
    def test_a_size_is_captured_when_it_is_asked_for_again(self, steps: Steps) -> None:
        assert steps.play(100) is None
        out = steps.play(100)
        assert out is not None and out[:, 0].tolist() == list(range(10, 110))
        assert steps.captured == [128]

    def test_a_larger_graph_serves_until_a_size_pays(self, steps: Steps) -> None:
        for _ in range(2):
            steps.play(500)
        for _ in range(graphs._MIN_USES_BESIDE_LARGER - 1):
            out = steps.play(3)
            assert out is not None and out[:, 0].tolist() == [10, 11, 12]
        assert steps.captured == [512]
        steps.play(4)
        assert steps.captured == [512, 4]
        # The nearest one.
        assert (
            steps.graphs._captured_for((2, 0), steps.places_N, lambda *_: steps.places_N)
            is (steps.graphs._captured[4, 0])
        )

    def test_slots_of_nobody_compute_their_first_place(self, steps: Steps) -> None:
        for _ in range(2):
            steps.play(5, num_used=6)
        captured = steps.graphs._captured[8, 0]
        assert captured.logits_CV[:, 0].tolist() == [10, 11, 12, 13, 14, 15, 0, 0]

    def test_graphs_go_with_their_slots(self, steps: Steps) -> None:
        for _ in range(2):
            steps.play(5)
        steps.cache = Steps(steps.graphs).cache
        assert steps.play(5) is None


class TestFailures:
    def test_memory_is_short_for_a_moment(
        self, steps: Steps, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(2):
            steps.play(20)
        with failing(GraphsOnCPU, "_capture", lambda *args: True, OUT_OF_MEMORY) as raised:
            for _ in range(2):
                assert steps.play(200) is None
        assert raised == [1] and steps.graphs.is_on
        assert "no memory to capture a step of 256 rows" in caplog.text
        assert steps.play(20) is not None
        for _ in range(graphs._TRY_AGAIN_STEPS + 1):
            assert steps.play(200) is None
        assert steps.play(200) is not None
        assert steps.captured == [32, 256]

    def test_what_cannot_be_captured_runs_without(
        self, steps: Steps, caplog: pytest.LogCaptureFixture
    ) -> None:
        with failing(GraphsOnCPU, "_capture", lambda *args: True, RuntimeError("not here")):
            for _ in range(3):
                assert steps.play(20) is None
        assert not steps.graphs.is_on
        assert caplog.text.count("decode steps run without CUDA graphs") == 1

    def test_an_allocator_that_a_broken_capture_left_behind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> None:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

        monkeypatch.setattr("torch.cuda.empty_cache", refuse)
        faults.free_memory(torch.device("cuda"))
