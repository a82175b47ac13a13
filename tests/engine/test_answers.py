"""Several answers to one row: as many, the same in any batch, and one outcome."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.config import BatchingConfig
from batchvlm.engine import SampleStream
from batchvlm.engine.answers import expand, join
from batchvlm.errors import ErrorType
from batchvlm.records import Completion, Failure, FinishReason, Generation, Sample

from .outcomes import run


def sample(row_index: int, num_answers: int, seed: int = 5) -> Sample:
    return Sample(
        row_index=row_index,
        features={"input_ids": np.array([[1, 2, row_index]])},
        image_tokens=0,
        image_sizes=(),
        generation=Generation(
            max_new_tokens=4, temperature=1.0, seed=seed, num_return_sequences=num_answers
        ),
    )


def completion(of: Sample) -> Completion:
    return Completion(
        row_index=of.row_index,
        token_ids=(of.row_index, of.answer),
        text=f"{of.row_index}:{of.answer}",
        finish_reason=FinishReason.STOP,
        latency_s=1.0 + of.answer,
    )


def failure(of: Sample) -> Failure:
    return Failure(error_type=ErrorType.ENGINE, message=f"answer {of.answer}")


class Stream:
    """Samples, ready or not."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples
        self.is_next_ready = False

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def is_ready(self) -> bool:
        return self.is_next_ready


@given(nums=st.lists(st.integers(1, 5), max_size=6), data=st.data())
def test_each_row_comes_out_once_with_its_answers_in_order(
    nums: list[int], data: st.DataObject
) -> None:
    rows = [sample(i, num) for i, num in enumerate(nums)]
    copies = list(expand(rows))
    failed = data.draw(st.sets(st.integers(0, max(0, len(copies) - 1))))
    outcomes: list[tuple[Sample, Completion | Failure]] = [
        (copy, failure(copy) if i in failed else completion(copy)) for i, copy in enumerate(copies)
    ]
    broken: dict[int, Failure] = {}
    for copy, outcome in outcomes:
        if isinstance(outcome, Failure):
            broken.setdefault(copy.row_index, outcome)
    random.Random(data.draw(st.integers(0, 9))).shuffle(outcomes)
    joined = list(join(outcomes))
    assert sorted(row_index for row_index, _ in joined) == list(range(len(nums)))
    for row_index, outcome in joined:
        if row_index in broken:
            assert outcome == broken[row_index]
            continue
        assert isinstance(outcome, Completion)
        assert outcome.row_index == row_index
        assert outcome.text == f"{row_index}:0"
        others = [other.text for other in outcome.alternatives]
        assert others == [f"{row_index}:{n}" for n in range(1, nums[row_index])]
        assert outcome.latency_s == nums[row_index]


def test_a_row_with_one_answer_is_passed_on_as_it_is() -> None:
    row = sample(3, 1)
    assert list(expand([row])) == [row]
    outcome = completion(row)
    assert list(join([(row, outcome)])) == [(3, outcome)]


def test_the_copies_share_their_memory_and_differ_in_their_seeds() -> None:
    rows = [sample(i, 4, seed=i) for i in range(50)]
    copies = list(expand(rows))
    assert [copy.answer for copy in copies] == [0, 1, 2, 3] * 50
    assert [copy.generation.seed for copy in copies[::4]] == list(range(50))
    assert len({copy.generation.seed for copy in copies}) == len(copies)
    assert all(copy.features is rows[copy.row_index].features for copy in copies)
    again = list(expand([rows[7]]))
    assert again == copies[28:32]


def test_taking_a_copy_never_waits() -> None:
    stream = Stream([sample(0, 3), sample(1, 1)])
    expanded = expand(stream)
    assert isinstance(expanded, SampleStream)
    assert not expanded.is_ready()
    stream.is_next_ready = True
    assert expanded.is_ready()
    copies = iter(expanded)
    next(copies)
    stream.is_next_ready = False
    ready = [expanded.is_ready()]
    for _ in range(2):
        next(copies)
        ready.append(expanded.is_ready())
    assert ready == [True, True, False]


def test_plain_samples_never_wait() -> None:
    assert expand([sample(0, 1)]).is_ready()


@pytest.mark.parametrize("max_batch_size", [1, 3, 64])
def test_an_engine_gives_the_same_answers_in_any_batch(
    engine_with: Any, make_samples: Any, max_batch_size: int
) -> None:
    kinds = [
        {"temperature": 1.5, "seed": 3, "num_return_sequences": 3},
        {"temperature": 2.0, "seed": 4, "num_return_sequences": 2},
        {},
    ]
    rows = make_samples(*kinds)
    engine = engine_with()
    # What each row answers where it wants one, and alone.
    single = [run(engine, [_single(row)])[0] for row in rows]
    alone = [run(engine, [row])[0] for row in rows]
    engine._batching = BatchingConfig(max_batch_size=max_batch_size)
    together = run(engine, rows)
    assert [texts(answer) for answer in together] == [texts(answer) for answer in alone]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in single]
    assert [len(texts(answer)) for answer in together] == [3, 2, 1]
    assert len(set(texts(together[0]))) == 3


def _single(row: Sample) -> Sample:
    return replace(row, generation=replace(row.generation, num_return_sequences=1))


def texts(answer: Completion) -> list[str]:
    return [answer.text, *(other.text for other in answer.alternatives)]
