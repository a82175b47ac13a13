"""Rows whose answers do not have the required form, and what the next attempt changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batchvlm.pipeline.form_retries import FormRetries
from batchvlm.records import Completion, Failure, FinishReason, Sample
from tests.conftest import make_sample, picture
from tests.pipeline.test_pipeline import FakeEngine, rows_of, run

_ROOMY = 1 << 20


def answer(finish_reason: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(
        row_index=0, token_ids=(1,), text="{", finish_reason=finish_reason, latency_s=0.5
    )


def attempts(sample: Sample, finish_reason: FinishReason, *, max_times: int = 3) -> list[Sample]:
    """The samples that follow one whose answers all end like this."""
    retries, made = FormRetries(max_times, max_bytes=_ROOMY), []
    retries.keep(sample)
    while retries.retry(sample.row_index, answer(finish_reason)):
        made += retries.take()
    assert retries.forget(sample.row_index) == 1 + len(made)
    return made


def test_a_cut_answer_gets_twice_the_tokens_each_time() -> None:
    first = make_sample(0, max_new_tokens=8, seed=5)
    later = attempts(first, FinishReason.LENGTH)
    assert [sample.generation.max_new_tokens for sample in later] == [16, 32, 64]
    assert {(s.generation.seed, s.generation.temperature) for s in later} == {(5, 0.0)}


def test_a_cut_answer_that_fills_the_context_is_drawn_anew() -> None:
    first = replace(make_sample(0, max_new_tokens=8, seed=5), room=20)
    one, two, three = (sample.generation for sample in attempts(first, FinishReason.LENGTH))
    assert [s.max_new_tokens for s in (one, two, three)] == [16, 20, 20]
    assert (one.seed, two.seed) == (5, 5) and three.seed != 5
    assert three.temperature == 0.5


@pytest.mark.parametrize(("temperature", "later"), [(0.0, 0.5), (0.4, 0.5), (0.9, 0.9)])
def test_an_invalid_answer_is_drawn_anew_by_a_seed_of_each_attempt(
    temperature: float, later: float
) -> None:
    first = make_sample(0, max_new_tokens=8, seed=5, temperature=temperature)
    made = [sample.generation for sample in attempts(first, FinishReason.STOP)]
    assert len({5, *(settings.seed for settings in made)}) == 4
    assert {(s.temperature, s.max_new_tokens) for s in made} == {(later, 8)}
    assert made == [sample.generation for sample in attempts(first, FinishReason.STOP)]


def test_no_row_is_answered_more_often_than_allowed() -> None:
    assert len(attempts(make_sample(0), FinishReason.STOP, max_times=1)) == 1
    assert attempts(make_sample(0), FinishReason.STOP, max_times=0) == []


def test_rows_for_which_there_is_no_room_are_answered_once() -> None:
    rows = [make_sample(number, num_tokens=10) for number in range(3)]
    retries = FormRetries(2, max_bytes=2 * rows[0].size_bytes)
    for row in rows:
        retries.keep(row)
    assert [retries.retry(number, answer()) for number in range(3)] == [True, True, False]
    assert [sample.row_index for sample in retries.take()] == [0, 1]
    # A row that has ended makes room for the next.
    assert [retries.forget(number) for number in range(3)] == [2, 2, 1]
    retries.keep(rows[2])
    retries.keep(rows[0])
    assert [retries.retry(number, answer()) for number in range(3)] == [True, False, True]


class EndlessEngine(FakeEngine):
    """Its answers take all tokens that they may, and are cut."""

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        for sample in samples:
            yield (
                sample.row_index,
                Completion(
                    row_index=sample.row_index,
                    token_ids=(1,) * sample.generation.max_new_tokens,
                    text='{"a": "b',
                    finish_reason=FinishReason.LENGTH,
                    latency_s=0.5,
                ),
            )


def test_an_answer_that_more_room_did_not_help_names_what_is_left_to_do(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    """The last attempt was given all tokens behind the prompt, so no setting gives more."""
    source, out = write_parquet([picture()]), tmp_path / "out"
    settings = ("task=extract", "task.output.json_schema=any", "generation.max_new_tokens=100")
    run(out, source, *settings, "retry.invalid_json=9", engine=EndlessEngine())
    (row,) = rows_of(out)
    assert "before its JSON ended; no more fits behind its prompt" in row["error_message"]
    assert row["attempts"] == 10
