"""Where answers end, what is drawn, and whose settings count."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from batchvlm.config import BatchingConfig
from batchvlm.engine import stops
from batchvlm.engine.generate import eos_ids
from batchvlm.engine.stops import SpokenTokens
from batchvlm.records import Completion, FinishReason, Sample

from .outcomes import run


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


class TestLength:
    def test_each_row_has_its_own_limit(
        self, engine_with: Any, make_samples: Any, reference: Any, tokenizer: Any
    ) -> None:
        limits = [1, 5, 24, 2]
        samples = make_samples(*({"max_new_tokens": limit} for limit in limits))
        answers = run(engine_with(), samples)
        assert tokens(answers) == [reference(i, limit) for i, limit in enumerate(limits)]
        for answer in answers:
            assert answer.finish_reason is FinishReason.LENGTH
            assert answer.text == tokenizer.decode(answer.token_ids)
            assert answer.latency_s > 0

    def test_batches_are_answered_one_after_the_other(
        self, engine_with: Any, make_samples: Any
    ) -> None:
        samples = make_samples({}, {}, {}, {}, max_new_tokens=2)
        taken = []

        def ready() -> Any:
            for sample in samples:
                taken.append(sample.row_index)
                yield sample

        engine = engine_with()
        engine._batching = BatchingConfig(max_batch_size=1, sort_window=1)
        for row_index, _ in engine.run(ready()):
            assert taken == list(range(row_index + 1))
        assert taken == [0, 1, 2, 3]


def first_new(ids: Sequence[int], least: int = 2) -> tuple[int, int]:
    """(place, id) of the first token from `least` on that did not come before."""
    return next((i, t) for i, t in enumerate(ids) if i >= least and t not in ids[:i])


class TestEndOfSequence:
    def test_an_answer_ends_with_it(
        self, engine_with: Any, make_samples: Any, reference: Any, tokenizer: Any
    ) -> None:
        full = reference(0, 12)
        place, eos_id = first_new(full)
        (answer,) = run(engine_with(eos_token_id=eos_id), make_samples({}, max_new_tokens=12))
        assert list(answer.token_ids) == full[: place + 1]
        assert answer.finish_reason is FinishReason.STOP
        assert answer.text == tokenizer.decode(full[:place])

    def test_each_row_ends_by_itself(
        self, engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        _, eos_id = first_new(reference(0, 12))
        samples = make_samples({}, {}, {}, {}, max_new_tokens=12)
        answers = run(engine_with(eos_token_id=eos_id), samples)
        assert tokens(answers) == [reference(i, 12, eos_token_id=eos_id) for i in range(4)]
        reasons = [a.finish_reason for a in answers]
        assert reasons == [
            FinishReason.STOP if a.token_ids[-1] == eos_id else FinishReason.LENGTH for a in answers
        ]
        assert set(reasons) == {FinishReason.STOP, FinishReason.LENGTH}

    def test_one_at_the_limit_is_a_stop(
        self, engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        place, eos_id = first_new(reference(0, 12))
        (answer,) = run(
            engine_with(eos_token_id=eos_id), make_samples({}, max_new_tokens=place + 1)
        )
        assert answer.finish_reason is FinishReason.STOP
        assert len(answer.token_ids) == place + 1

    def test_any_of_several_ends_an_answer(
        self, engine_with: Any, make_samples: Any, reference: Any, tokenizer: Any
    ) -> None:
        full = reference(0, 12)
        place, eos_id = first_new(full)
        engine = engine_with(eos_token_id=[tokenizer.eos_token_id, eos_id])
        (answer,) = run(engine, make_samples({}, max_new_tokens=12))
        assert list(answer.token_ids) == full[: place + 1]

    def test_a_row_that_ignores_it_goes_on_beside_one_that_ends(
        self, engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        full = reference(0, 12)
        place, eos_id = first_new(full)
        heeding, ignoring = make_samples({}, {"ignore_eos": True}, max_new_tokens=12)
        ignoring = Sample(**{**vars(ignoring), "features": heeding.features})
        for samples in ([heeding, ignoring], [ignoring, heeding]):
            answers = {a.row_index: a for a in run(engine_with(eos_token_id=eos_id), samples)}
            assert list(answers[0].token_ids) == full[: place + 1]
            assert answers[0].finish_reason is FinishReason.STOP
            assert list(answers[1].token_ids) == full
            assert answers[1].finish_reason is FinishReason.LENGTH

    def test_none_comes_before_the_least_number_of_tokens(
        self, engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        place, eos_id = first_new(reference(0, 12))
        samples = make_samples({"min_new_tokens": place + 4}, {}, {}, {}, max_new_tokens=12)
        answers = run(engine_with(eos_token_id=eos_id), samples)
        held = reference(0, 12, eos_token_id=eos_id, min_new_tokens=place + 4)
        assert len(held) >= place + 4
        others = [reference(i, 12, eos_token_id=eos_id) for i in range(1, 4)]
        assert tokens(answers) == [held, *others]

    def test_the_tokenizers_stands_in_where_the_model_names_none(
        self, model: Any, tokenizer: Any
    ) -> None:
        bare = copy.copy(model)
        bare.generation_config = GenerationConfig()
        assert eos_ids(bare, tokenizer) == (tokenizer.eos_token_id,)
        bare.generation_config = GenerationConfig(eos_token_id=[5, 7])
        assert eos_ids(bare, tokenizer) == (5, 7, tokenizer.eos_token_id)


class TestStopStrings:
    def test_one_that_spans_tokens_cuts_the_text(
        self, engine_with: Any, make_samples: Any, reference: Any, tokenizer: Any
    ) -> None:
        full = reference(0, 16)
        text = tokenizer.decode(full)
        ends = [len(tokenizer.decode(full[:n])) for n in range(len(full) + 1)]
        # The last character of one token, a whole token, and the first character of the next.
        pieces = {n: text[ends[n - 1] - 1 : ends[n] + 1] for n in range(3, 12)}
        n, stop = next((n, piece) for n, piece in pieces.items() if text.count(piece) == 1)
        samples = make_samples({"stop": ("never said", stop)}, {}, max_new_tokens=16)
        stopped, other = run(engine_with(), samples)
        assert stopped.text == text[: ends[n - 1] - 1]
        assert stopped.finish_reason is FinishReason.STOP
        assert list(stopped.token_ids) == full[: n + 1]
        assert list(other.token_ids) == reference(1, 16)
        assert other.finish_reason is FinishReason.LENGTH

    def test_one_that_is_never_said_changes_nothing(
        self, engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        (answer,) = run(engine_with(), make_samples({"stop": ("\u2603",)}))
        assert list(answer.token_ids) == reference(0)
        assert answer.finish_reason is FinishReason.LENGTH

    def test_the_earliest_in_the_text_cuts(
        self, engine_with: Any, make_samples: Any, reference: Any, tokenizer: Any
    ) -> None:
        text = tokenizer.decode(reference(0, 16))
        stops = (text[5:7], text[3:7], text[4:6])
        (answer,) = run(engine_with(), make_samples({"stop": stops}, max_new_tokens=16))
        assert answer.text == text[: min(text.find(stop) for stop in stops)]


class TestDefaultsOfTheRepository:
    @pytest.mark.parametrize(
        "defaults",
        [
            {"do_sample": True, "temperature": 9.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
            {"do_sample": True, "typical_p": 0.2, "epsilon_cutoff": 0.01, "top_h": 0.5},
            {"repetition_penalty": 20.0},
            {"encoder_repetition_penalty": 20.0},
            {"no_repeat_ngram_size": 1},
            {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
            {"min_new_tokens": 30},
            {"max_new_tokens": 1},
            {"max_length": 3},
            {"max_time": 1e-9},
            {"stop_strings": ["e"]},
            {"forced_eos_token_id": 5},
            {"exponential_decay_length_penalty": (1, 5.0)},
            {"sequence_bias": [[[7], 100.0]]},
            {"guidance_scale": 3.0},
            {"prompt_lookup_num_tokens": 3},
            {"return_dict_in_generate": True, "output_logits": True},
        ],
        ids=lambda defaults: next(iter(defaults)),
    )
    def test_they_do_not_reach_a_greedy_run(
        self, defaults: dict[str, Any], engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        answers = run(engine_with(**defaults), make_samples({}, {}))
        assert tokens(answers) == [reference(0), reference(1)]

    def test_ids_that_a_model_must_not_say_stay_unsaid(
        self, engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        unsaid = reference(0)[:2]
        (answer,) = run(engine_with(suppress_tokens=unsaid), make_samples({}))
        assert list(answer.token_ids) == reference(0, suppress_tokens=unsaid)
        assert not set(unsaid) & set(answer.token_ids)

    def test_they_stay_undrawn_too(self, engine_with: Any, make_samples: Any) -> None:
        said = [70, 80]
        unsaid = [token for token in range(320) if token not in said]
        samples = make_samples({"temperature": 100.0}, {"repetition_penalty": 1.1})
        for answer in run(engine_with(suppress_tokens=unsaid), samples):
            assert not set(unsaid) & set(answer.token_ids)


class TestDrawnRows:
    def test_a_row_draws_the_same_alone_and_in_any_batch(
        self, engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        samples = make_samples(
            {"temperature": 1.5, "seed": 4},
            {},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5},
            {"temperature": 2.0, "seed": 6, "max_new_tokens": 3},
        )
        engine = engine_with()
        together = tokens(run(engine, samples))
        assert tokens(run(engine, samples[::-1]))[::-1] == together
        assert [tokens(run(engine, [sample]))[0] for sample in samples] == together
        assert together[1] == reference(1)
        assert together[0] != reference(0)

    def test_repetition_penalty_is_that_of_transformers(
        self, engine_with: Any, make_samples: Any, reference: Any
    ) -> None:
        samples = make_samples({"repetition_penalty": 3.0}, {}, {"repetition_penalty": 1.2})
        expected = [
            reference(0, repetition_penalty=3.0),
            reference(1),
            reference(2, repetition_penalty=1.2),
        ]
        assert tokens(run(engine_with(), samples)) == expected
        assert expected[0] != reference(0)


def test_a_row_caught_in_a_cycle_ends_beside_one_that_may_go_on(
    engine_with: Any,
    make_samples: Any,
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stops, "MAX_PERIOD", 2)
    monkeypatch.setattr(stops, "MIN_CYCLE_TOKENS", 6)
    monkeypatch.setattr(stops, "MIN_CYCLE_PERIODS", 3)
    num_ids = model.config.text_config.vocab_size
    engine = engine_with(suppress_tokens=[token for token in range(num_ids) if token != 70])
    samples = make_samples({}, {"stop_on_repetition": False}, {"ignore_eos": True})
    caught, *others = run(engine, samples)
    assert caught.finish_reason is FinishReason.REPETITION
    assert caught.token_ids == (70,) * 6
    assert caught.text == tokenizer.decode([70] * 6)
    assert [other.finish_reason for other in others] == [FinishReason.LENGTH] * 2
    assert tokens(others) == [[70] * 8] * 2


def test_logprobs_are_those_of_the_models_own_logits(
    engine_with: Any, make_samples: Any, model: Any
) -> None:
    samples = make_samples(
        {"logprobs": True},
        {"logprobs": True, "temperature": 2.0, "top_k": 5, "repetition_penalty": 2.0},
        {"logprobs": True, "max_new_tokens": 3},
        {},
    )
    *asking, other = run(engine_with(), samples)
    assert other.logprobs is None
    for sample, answer in zip(samples, asking, strict=False):
        prompt_T = torch.from_numpy(sample.features["input_ids"][0])
        ids_T = torch.tensor(answer.token_ids)
        with torch.no_grad():
            logits_TV = model(input_ids=torch.cat([prompt_T, ids_T])[None]).logits[0]
        logprobs_TV = logits_TV[len(prompt_T) - 1 : -1].float().log_softmax(-1)
        expected_T = logprobs_TV.gather(-1, ids_T[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected_T, atol=1e-4, rtol=0)


def test_answers_keep_the_tokens_that_they_consist_of(tokenizer: Any) -> None:
    """As Florence-2's places, which are special tokens."""
    text = "a cat"
    spoken = SpokenTokens(tokenizer)
    marks = [i for i in tokenizer.all_special_ids if i not in spoken.all_special_ids]
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text), *marks[:1], tokenizer.eos_token_id]
    assert marks
    said = spoken.decode(ids, skip_special_tokens=True)
    assert said == text + tokenizer.convert_ids_to_tokens(marks[0])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_got_ocr_2_ends_with_its_turn(tokenizer: Any, model: Any) -> None:
    other, vocabulary = copy.copy(model), copy.deepcopy(tokenizer)
    vocabulary.add_tokens(["<|im_end|>"], special_tokens=True)
    end = vocabulary.convert_tokens_to_ids("<|im_end|>")
    assert end not in eos_ids(other, vocabulary)
    other.config = copy.deepcopy(model.config)
    other.config.model_type = "got_ocr2"
    assert eos_ids(other, vocabulary) == (*eos_ids(model, vocabulary), end)
