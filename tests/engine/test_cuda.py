"""What only a GPU shows: its kernels, its graphs, its memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from batchvlm.constraints.constraints import Constraints
from batchvlm.engine.choices import Choices
from batchvlm.engine.forward import flash, slot_kernel
from batchvlm.engine.forward.attention import attending, attention
from batchvlm.engine.forward.cache import RowCache, SlotCache
from batchvlm.engine.forward.layout import Packed, Slots, Span
from batchvlm.engine.generate import eos_ids
from batchvlm.engine.slots import canary
from batchvlm.engine.slots.decoding import Decoding
from batchvlm.engine.slots.memory import free_bytes
from batchvlm.forms.schemas import why_invalid
from batchvlm.records import Completion, FinishReason, Sample

from .families import FAMILIES, Family
from .forward.test_attention import LAYER, plain, sees
from .loaded import ABOUT_ONE, ABOUT_TWO, Loaded
from .outcomes import run
from .slots.test_slots import about_one_picture, asked, cut, mixed_rows, tokens
from .test_choices import COLORS, MANY
from .test_constrained import schema_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")


@pytest.fixture(
    scope="session",
    params=[family for family in FAMILIES if not family.why_not_slots_here],
    ids=lambda family: family.name,
)
def loaded(request: pytest.FixtureRequest, load_once: Callable[[Family], Loaded]) -> Loaded:
    """Each family that runs over slots, its model on the GPU."""
    return on_gpu(load_once(request.param))


@pytest.fixture(scope="session")
def qwen(load_once: Callable[[Family], Loaded]) -> Loaded:
    (family,) = (family for family in FAMILIES if family.name == "qwen2_5_vl")
    return on_gpu(load_once(family))


def on_gpu(loaded: Loaded, dtype: torch.dtype = torch.float32) -> Loaded:
    model = copy.deepcopy(loaded.model).to(CUDA, dtype)
    return replace(loaded, model=model, _references={}, _tuned=[])


def seeded(sample: Sample) -> Sample:
    return replace(sample, generation=replace(sample.generation, seed=sample.row_index))


class TestFlash:
    @pytest.mark.parametrize("window", [None, 5])
    @pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
    def test_packed_rows_behind_what_was_before(
        self, heads: tuple[int, int], window: int | None
    ) -> None:
        torch.manual_seed(0)
        size, lengths = 16, [(3, 0), (1, 7), (40, 90), (130, 0)]
        total = sum(new for new, _ in lengths)
        query = torch.randn(1, heads[0], total, size, device=CUDA).bfloat16()
        key, value = torch.randn(2, 1, heads[1], total, size, device=CUDA).bfloat16()
        past: Any = [
            [tuple(torch.randn(2, heads[1], before, size, device=CUDA).bfloat16())] * 2
            if before
            else None
            for _, before in lengths
        ]
        bounds = [0]
        for new, _ in lengths:
            bounds.append(bounds[-1] + new)
        assert flash.is_able(query)
        with attending(Packed(bounds=tuple(bounds), past=tuple(past))):
            out, _ = attention(LAYER, query, key, value, None, sliding_window=window)
        for i, (new, before) in enumerate(lengths):
            here = slice(bounds[i], bounds[i + 1])
            k, v = key[0, :, here], value[0, :, here]
            if past[i] is not None:
                k, v = (torch.cat(x, 1) for x in zip(past[i][1], (k, v), strict=True))
            q, k, v = (x.float().cpu() for x in (query[0, :, here], k, v))
            expected = plain(q, k, v, sees(new, before, window), size**-0.5, None)
            mine = out[0, here].transpose(0, 1).float().cpu()
            torch.testing.assert_close(mine, expected, atol=2e-2, rtol=2e-2)

    @pytest.mark.parametrize("window", [None, 5])
    @pytest.mark.parametrize("heads", [(4, 4), (8, 2), (14, 2)])
    @pytest.mark.parametrize("has_kernel", [True, False])
    def test_slots_as_far_as_each_row_goes(
        self,
        heads: tuple[int, int],
        window: int | None,
        has_kernel: bool,
    ) -> None:
        torch.manual_seed(0)
        size, places = 32, [0, 3, 77, 199]
        like = RowCache([tuple(torch.zeros(2, heads[1], 1, size, device=CUDA).bfloat16())])
        cache = SlotCache(like, num_slots=4, length=200)
        rows = []
        for slot, place in enumerate(places):
            pair = torch.randn(2, heads[1], place + 1, size, device=CUDA).bfloat16()
            rows.append(pair)
            cache.put(slot, [RowCache([tuple(pair)])])
        key, value = cache.layers[0].slots  # type: ignore[union-attr]
        # What lies behind a row is not looked at.
        for slot, place in enumerate(places):
            key[slot, :, place + 1 :] = torch.nan
        query = torch.randn(4, heads[0], 1, size, device=CUDA).bfloat16()
        whole = (Span(0, 4, 200),)
        layout = Slots(torch.tensor(places, device=CUDA), whole, has_kernel=has_kernel)
        with attending(layout):
            out, _ = attention(LAYER, query, key, value, None, sliding_window=window)
        for slot, (place, (k, v)) in enumerate(zip(places, rows, strict=True)):
            q = query[slot].float().cpu()
            mask = sees(1, place, window)
            expected = plain(q, k.float().cpu(), v.float().cpu(), mask, size**-0.5, None)
            mine = out[slot].transpose(0, 1).float().cpu()
            torch.testing.assert_close(mine, expected, atol=2e-2, rtol=2e-2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_kernel_for_slots_is_tried(
        self, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG", "batchvlm.engine.forward.slot_kernel")
        for shape in ((16, 2, 128), (28, 4, 128), (8, 8, 64), (8, 4, 256), (9, 3, 80)):
            slot_kernel.is_faster.cache_clear()
            slot_kernel.is_faster(*shape, dtype, CUDA)
        # Right everywhere, whichever is the faster.
        found = [record.message for record in caplog.records]
        assert len(found) == 5
        assert all(message.startswith("attention over slots:") for message in found), found


class TestFamilies:
    @pytest.mark.parametrize(
        "settings",
        [
            {"canary": True},
            {"max_slots": 3, "max_prefill_tokens": 24, "sort_window": 5},
            {"cuda_graphs": False, "max_slots": 2},
        ],
        ids=["roomy", "tight", "without graphs"],
    )
    def test_rows_are_answered_as_transformers_answers_each_alone(
        self, loaded: Loaded, settings: dict[str, Any]
    ) -> None:
        rows = mixed_rows(loaded, 24)
        eos = [loaded.known(ABOUT_ONE)[4]]
        expected = [cut(loaded.known(question, seed), limit, eos) for question, seed, limit in rows]
        engine = loaded.slots(eos=eos, **settings)
        assert tokens(run(engine, asked(loaded, rows))) == expected
        graphs = engine._decoder._graphs
        if settings.get("cuda_graphs", True):
            assert graphs is not None and graphs.is_on and graphs.num_replays > 0
        else:
            assert graphs is None

    @pytest.mark.parametrize("has_kernel", [True, False])
    def test_half_precision_is_that_of_transformers(
        self, loaded: Loaded, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slot_kernel, "is_faster", lambda *shape: has_kernel)
        half = on_gpu(loaded, torch.bfloat16)
        engine = half.slots(eos=[], canary=True)
        rows = mixed_rows(half, 16)
        outcomes = run(engine, asked(half, rows))
        assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes
        assert [len(o.token_ids) for o in outcomes] == [limit for _, _, limit in rows]


class TestSteps:
    @pytest.mark.parametrize("has_graphs", [True, False])
    def test_a_step_waits_for_nothing(
        self, qwen: Loaded, has_graphs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        step = Decoding.step
        num_steps = 0

        def checked(self: Decoding) -> None:
            nonlocal num_steps
            # A capture waits, and comes among the first.
            torch.cuda.set_sync_debug_mode("error" if num_steps > 4 else "default")
            try:
                step(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            num_steps += 1

        monkeypatch.setattr(Decoding, "step", checked)
        engine = qwen.slots(eos=[], cuda_graphs=has_graphs)
        samples = [qwen.ask(i, ABOUT_ONE, max_new_tokens=12) for i in range(6)]
        assert tokens(run(engine, samples)) == [qwen.known(ABOUT_ONE)] * 6
        assert num_steps > 8

    @pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    def test_an_encoder_waits_for_nothing(
        self, name: str, load_once: Callable[[Family], Loaded]
    ) -> None:
        (family,) = (family for family in FAMILIES if family.name == name)
        half = on_gpu(load_once(family), torch.bfloat16)
        images = half.slots()._prefill.images
        first, *others = (unit for sample in half.samples() for unit in images.units(sample))
        images.encode([first])  # held against what it is plainly
        assert images._grid_encoder is not None
        torch.cuda.set_sync_debug_mode("error")
        try:
            images.encode(others)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_step_in_parts_leaves_rows_beside_it_as_they_are(self, qwen: Loaded) -> None:
        rows = [(question, seed, 12) for question, seed, _ in mixed_rows(qwen, 6)]
        engine = qwen.slots(eos=[], max_slots=8)
        engine._plan.lower_step(3)
        expected = [qwen.known(question, seed)[:12] for question, seed, _ in rows]
        assert tokens(run(engine, asked(qwen, rows))) == expected
        assert engine._decoder._graphs is not None
        assert engine._decoder._graphs.num_replays > 8

    def test_graphs_go_with_the_slots_they_were_made_for(self, qwen: Loaded) -> None:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        engine = qwen.slots(eos=[])
        rows = mixed_rows(qwen, 12)
        expected = [qwen.known(question, seed)[:limit] for question, seed, limit in rows]
        for _ in range(2):
            assert tokens(run(engine, asked(qwen, rows))) == expected
        assert engine._decoder._graphs is not None
        assert engine._decoder._graphs.num_replays > 0
        del engine
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before < 64 << 20


class TestRows:
    """What rows ask for by themselves, beside each other as alone or on a CPU."""

    def test_a_drawn_answer_is_that_of_its_seed(self, qwen: Loaded) -> None:
        settings: list[dict[str, Any]] = [
            {"temperature": 1.5},
            {},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
            {"temperature": 2.0, "min_p": 0.05, "repetition_penalty": 1.3},
            {"temperature": 1.0, "num_return_sequences": 3, "logprobs": True},
        ]
        samples = [
            seeded(qwen.ask(i, ABOUT_ONE, i % 2, max_new_tokens=9, **settings[i % len(settings)]))
            for i in range(20)
        ]
        together = run(qwen.slots(eos=[]), samples)
        engine = qwen.slots(eos=[], max_slots=3)
        for sample, outcome in zip(samples, together, strict=True):
            (alone,) = run(engine, [sample])
            assert outcome.token_ids == alone.token_ids
            mine, its = ([o.text, *(a.text for a in o.alternatives)] for o in (outcome, alone))
            assert mine == its
            assert (outcome.logprobs is None) is not sample.generation.logprobs

    @pytest.mark.parametrize("has_graphs", [True, False])
    def test_rows_of_many_schemas_each_fit_their_own(self, qwen: Loaded, has_graphs: bool) -> None:
        constraints = Constraints(
            qwen.processor.tokenizer,
            num_ids=qwen.model.get_output_embeddings().weight.shape[0],
            eos_ids=eos_ids(qwen.model, qwen.processor.tokenizer),
            device=CUDA,
            form=None,
        )
        schemas = [json.dumps(schema_of(i)) for i in range(50)]
        held = [
            replace(
                seeded(qwen.ask(i, ABOUT_ONE, i % 2, max_new_tokens=200, temperature=1.0)),
                json_schema=schema,
            )
            for i, schema in enumerate(schemas)
        ]
        free = [qwen.ask(50 + i, ABOUT_ONE, max_new_tokens=5) for i in range(5)]
        engine = qwen.slots(constraints=constraints, cuda_graphs=has_graphs, max_slots=16)
        outcomes = run(engine, [*held, *free])
        for schema, outcome in zip(schemas, outcomes, strict=False):
            assert outcome.finish_reason is FinishReason.STOP
            assert why_invalid(json.loads(outcome.text), schema) is None, outcome.text
        assert tokens(outcomes[50:]) == [qwen.known(ABOUT_ONE)[:5]] * 5

    def test_choices_score_as_on_a_cpu(
        self, qwen: Loaded, load_once: Callable[[Family], Loaded]
    ) -> None:
        on_cpu = load_once(qwen.family)
        scores = []
        for loaded in (on_cpu, qwen):
            ends = eos_ids(loaded.model, loaded.processor.tokenizer)
            engine = loaded.slots(
                choices=Choices(loaded.processor.tokenizer, COLORS, eos_ids=ends), canary=True
            )
            samples = [
                replace(loaded.ask(i, ABOUT_ONE, i % 2), choices=MANY if i % 3 else None)
                for i in range(9)
            ]
            outcomes = run(engine, samples)
            scores.append([[score.logprob for score in o.scores] for o in outcomes])
        for mine, its in zip(scores[1], scores[0], strict=True):
            torch.testing.assert_close(mine, its, atol=1e-2, rtol=1e-3)

    def test_an_image_is_encoded_once_and_a_beginning_computed_once(self, qwen: Loaded) -> None:
        rows = [(question, 0, 6) for question in about_one_picture(qwen)] * 4
        samples = asked(qwen, rows)
        expected = [qwen.known(question, seed)[:limit] for question, seed, limit in rows]
        # Packs of one row: what a family allows is known after the first.
        engine = qwen.slots(eos=[], max_prefill_tokens=1)
        assert tokens(run(engine, samples)) == expected
        assert engine.stats.images_encoded == 1
        total = sum(sample.prompt_tokens for sample in samples)
        assert engine.stats.prompt_tokens <= total - 9 * max(16, samples[0].image_tokens)


class TestFusing:
    @pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3", "qwen3_vl"])
    def test_fused_layers_answer_as_plain_ones(
        self, name: str, load_once: Callable[[Family], Loaded]
    ) -> None:
        (family,) = (family for family in FAMILIES if family.name == name)
        plain_model = on_gpu(load_once(family))
        fused = on_gpu(load_once(family))
        rows = mixed_rows(plain_model, 16)
        expected = [plain_model.known(q, seed)[:limit] for q, seed, limit in rows]
        engine = fused.slots(eos=[], compile=True, canary=True)
        assert engine._decoder._fusing is not None
        assert tokens(run(engine, asked(fused, rows))) == expected


class TestMemory:
    @pytest.fixture
    def little_memory(self) -> Iterator[None]:
        torch.cuda.empty_cache()
        used = torch.cuda.memory_reserved() + (160 << 20)
        total = torch.cuda.get_device_properties(CUDA).total_memory
        torch.cuda.set_per_process_memory_fraction(used / total)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()

    def test_the_run_gets_on_with_little(self, qwen: Loaded, little_memory: None) -> None:
        rows = mixed_rows(qwen, 24)
        expected = [qwen.known(question, seed)[:limit] for question, seed, limit in rows]
        engine = qwen.slots(eos=[])
        assert free_bytes(CUDA) > 1 << 30  # it plans with far more than it gets
        assert tokens(run(engine, asked(qwen, rows))) == expected


def test_the_canary_sees_a_kernel_that_is_wrong(
    qwen: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = on_gpu(qwen, torch.bfloat16)
    attend = flash.attend

    def wrong(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attend(query, key, value.roll(1, 0), *args, **kwargs)

    monkeypatch.setattr(flash, "attend", wrong)
    engine = half.slots()
    rows = [half.ask(0, ABOUT_TWO), half.ask(1, ABOUT_ONE)]
    with pytest.raises(Exception, match="answers differently over slots"):
        canary.check(half.model, engine._decoder, rows, engine._prefill.images)


def test_the_demo_answers_as_on_a_cpu(tmp_path: Path) -> None:
    import pyarrow.dataset as ds

    from batchvlm.pipeline.pipeline import run_job
    from batchvlm.settings.compose import compose

    answers = []
    for device in ("cpu", "cuda"):
        cfg = compose("run", [f"engine.device={device}", f"output.dir={tmp_path / device}"])
        run_job(cfg)
        table = ds.dataset(tmp_path / device / "data").to_table()
        answers.append(table.select(["id", "status", "generated_text"]).to_pylist())
    assert answers[0] == answers[1]
