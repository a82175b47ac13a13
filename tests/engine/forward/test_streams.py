"""Forwards at once: what goes on in which thread, and what comes of it in test_slots*.py."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.config import EngineConfig
from batchvlm.engine.forward import streams
from batchvlm.engine.forward.layout import Span
from batchvlm.engine.forward.streams import SharedContext, Streams, open_streams

from ..families import needs_slots
from ..loaded import Loaded


class TestMap:
    @given(num=st.integers(1, 4), num_items=st.integers(0, 11))
    def test_results_are_in_the_order_of_the_items(self, num: int, num_items: int) -> None:
        assert list(Streams(num).map(str, range(num_items))) == [str(i) for i in range(num_items)]

    def test_so_many_calls_go_on_at_once(self) -> None:
        everybody_is_here = threading.Barrier(3)
        list(Streams(3).map(lambda _: everybody_is_here.wait(timeout=60), range(3)))

    def test_what_would_leave_a_stream_without_work_is_done_by_all_threads(self) -> None:
        names = list(Streams(2).map(lambda _: threading.current_thread().name, range(5)))
        here = threading.current_thread().name
        assert names[4] == here
        assert here not in names[:4]

    def test_one_stream_is_this_thread_and_one_call_follows_another(self) -> None:
        calls = Streams().map(lambda i: (i, threading.current_thread()), range(3))
        assert next(calls) == (0, threading.current_thread())

    def test_an_error_comes_when_all_calls_are_over(self) -> None:
        is_over = threading.Event()
        has_raised = threading.Event()

        def call(number: int) -> None:
            if number == 0:
                has_raised.set()
                raise ValueError("no")
            assert has_raised.wait(timeout=60)
            is_over.set()

        with pytest.raises(ValueError, match="no"):
            list(Streams(2).map(call, range(2)))
        assert is_over.is_set()

    def test_what_failed_beside_others_is_tried_by_itself(self) -> None:
        here = threading.current_thread()

        def call(number: int) -> tuple[int, bool]:
            return number, threading.current_thread() is here

        results = list(Streams(2).map(call, range(5), again=lambda result: result[0] == 1))
        assert results == [(0, False), (1, True), (2, False), (3, False), (4, True)]
        # Where one call follows another it has failed by itself.
        calls: list[int] = []
        assert list(Streams().map(calls.append, range(3), again=lambda _: True)) == [None] * 3
        assert calls == [0, 1, 2]

    def test_a_signal_ends_the_calls_at_their_next_line(self) -> None:
        everybody_is_here = threading.Barrier(2)
        ended: list[str] = []

        def call(number: int) -> None:
            try:
                everybody_is_here.wait(timeout=60)
                if number == 0:
                    os.kill(os.getpid(), signal.SIGUSR2)
                while True:
                    threading.Event().wait(0.001)
            finally:
                ended.append(threading.current_thread().name)

        def interrupt(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGUSR2, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                list(Streams(2).map(call, range(4)))
        finally:
            signal.signal(signal.SIGUSR2, before)
        # The threads go on with other work, and none of the calls behind these was begun.
        everybody_is_here.reset()
        list(Streams(2).map(lambda _: everybody_is_here.wait(timeout=60), range(2)))
        assert len(set(ended)) == len(ended) == 2

    def test_threads_are_shared_and_those_of_this_thread_stay(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(4)
        try:
            num_threads = list(Streams(2).map(lambda _: torch.get_num_threads(), range(2)))
            assert num_threads == [2, 2]
            assert torch.get_num_threads() == 4
            product = torch.ones(300, 300) @ torch.ones(300, 300)
            assert product.eq(300).all()
        finally:
            torch.set_num_threads(before)


class TestBeside:
    def test_a_call_has_all_streams_but_one_and_this_thread_has_the_other(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(9)
        try:
            with Streams(3).beside(_threads_of) as (own, call):
                here = own.num, own.share, torch.get_num_threads()
                there = call.result(timeout=60)
            assert here == (1, pytest.approx(1 / 3), 3)
            assert there == (2, pytest.approx(2 / 3), [3, 3, 3])
            assert torch.get_num_threads() == 9
        finally:
            torch.set_num_threads(before)

    def test_the_call_goes_on_beside_this_thread_and_is_waited_for(self) -> None:
        is_met, is_over = threading.Barrier(2), threading.Event()

        def meet(streams: Streams) -> None:
            is_met.wait(timeout=60)
            is_over.set()

        with Streams(2).beside(meet):
            is_met.wait(timeout=60)
        assert is_over.is_set()

    def test_an_error_of_the_call_is_its_result(self) -> None:
        def fail(streams: Streams) -> None:
            raise ValueError("no")

        with Streams(2).beside(fail) as (_, call):
            pass
        with pytest.raises(ValueError, match="no"):
            call.result()

    def test_an_error_here_stops_the_call_and_those_it_waits_for(self) -> None:
        everybody_is_here = threading.Barrier(3)
        num_ended = threading.Semaphore(0)

        def go_on(item: int) -> None:
            try:
                everybody_is_here.wait(timeout=60)
                while True:
                    threading.Event().wait(0.001)
            finally:
                num_ended.release()

        before = torch.get_num_threads()
        call = Streams(3).beside(lambda streams: list(streams.map(go_on, range(2))))
        with pytest.raises(ValueError, match="no"), call:
            everybody_is_here.wait(timeout=60)
            raise ValueError("no")
        assert all(num_ended.acquire(timeout=60) for _ in range(2))
        assert torch.get_num_threads() == before


def _threads_of(streams: Streams) -> tuple[int, float, list[int]]:
    num_threads = list(streams.map(lambda _: torch.get_num_threads(), range(2)))
    return streams.num, streams.share, [*num_threads, torch.get_num_threads()]


class TestSharedContext:
    def test_the_first_enters_and_the_last_leaves(self) -> None:
        said: list[str] = []

        @contextmanager
        def context() -> Iterator[None]:
            said.append("in")
            yield
            said.append("out")

        shared = SharedContext()
        for _ in range(2):
            with shared.within(context):
                with shared.within(context):
                    assert said[-1] == "in"
                assert said[-1] == "in"
        assert said == ["in", "out"] * 2

    def test_it_is_left_where_something_raises(self) -> None:
        said: list[str] = []

        @contextmanager
        def context() -> Iterator[None]:
            yield
            said.append("out")

        with pytest.raises(ValueError, match="no"), SharedContext().within(context):
            raise ValueError("no")
        assert said == ["out"]


@given(
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=9),
    first=st.integers(0, 5),
    num=st.integers(1, 4),
)
def test_parts_hold_every_slot_once_in_order(widths: list[int], first: int, num: int) -> None:
    spans = []
    for i, width in enumerate(widths):
        start = spans[-1].stop if spans else first
        spans.append(Span(start, start + width, 100 + i))
    parts = Streams(num).parts(spans)
    num_rows = sum(widths)
    assert len(parts) == (num if num_rows >= 8 * num else 1)
    lengths = {slot: span.length for span in spans for slot in range(span.start, span.stop)}
    laid = [
        (slot, span.length)
        for part in parts
        for s in [part]
        for span in s
        for slot in range(span.start, span.stop)
    ]
    assert laid == sorted(lengths.items())
    sizes = [part[-1].stop - part[0].start for part in parts]
    assert max(sizes) - min(sizes) <= 1


class TestHowMany:
    def test_large_models_take_one_pack_and_whole_steps(self) -> None:
        small, large = Streams(2, num_weights=30_000_000), Streams(2, num_weights=3_000_000_000)
        assert small.num_packs(1024) == 8
        assert large.num_packs(1024) == 1
        assert Streams(1, num_weights=1).num_packs(1024) == 1
        spans = [Span(0, 64, 10)]
        assert len(small.parts(spans)) == 2
        assert large.parts(spans) == [spans]

    @pytest.mark.parametrize(
        ("rope", "cfg", "is_quantized", "expected"),
        [
            ("default", {}, False, 6),
            ("default", {"cpu_streams": 3}, False, 3),
            ("default", {"compile": True}, False, 1),
            ("default", {}, True, 1),
            ("longrope", {}, False, 1),
            ({"full_attention": "default", "sliding_attention": "dynamic"}, {}, False, 1),
        ],
    )
    def test_a_model_that_keeps_state_has_one(
        self,
        rope: Any,
        cfg: dict[str, Any],
        is_quantized: bool,
        expected: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
        module = torch.nn.Linear(2, 3)
        module.rope_type = rope
        model = SimpleNamespace(
            device=torch.device("cpu"),
            is_quantized=is_quantized,
            modules=lambda: [module],
            get_decoder=lambda: module,
        )
        assert open_streams(model, EngineConfig(**cfg)).num == expected

    def test_a_gpu_has_streams_of_its_own(self) -> None:
        module = torch.nn.Linear(2, 3)
        model = SimpleNamespace(device=torch.device("cuda"), get_decoder=lambda: module)
        assert open_streams(model, EngineConfig(cpu_streams=4)).num == 1


@needs_slots
def test_packed_weights_count(small: Loaded) -> None:
    decoder = small.model.get_decoder()
    num_weights = sum(weight.numel() for weight in decoder.parameters())
    for model in (small.model, small.tuned()):
        assert open_streams(model, EngineConfig())._num_weights == num_weights


def test_the_limit_on_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    module = torch.nn.Linear(2, 3)
    model = SimpleNamespace(
        device=torch.device("cpu"), modules=lambda: [module], get_decoder=lambda: module
    )
    assert open_streams(model, EngineConfig()).num == streams._MAX_STREAMS
