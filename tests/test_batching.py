from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.batching import group_by_length
from batchvlm.config import BatchingConfig
from batchvlm.records import Batch, Generation, Sample


def sample(row_index: int, prompt_tokens: int, max_new_tokens: int, size_bytes: int = 0) -> Sample:
    ids = np.zeros((1, prompt_tokens), dtype=np.int8)
    return Sample(
        row_index=row_index,
        features={"input_ids": ids, "pixel_values": np.zeros(size_bytes, dtype=np.int8)},
        image_tokens=0,
        image_sizes=(),
        generation=Generation(max_new_tokens=max_new_tokens),
    )


def samples_of(lengths: Sequence[tuple[int, int]]) -> list[Sample]:
    return [sample(i, prompt, answer) for i, (prompt, answer) in enumerate(lengths)]


def rows_of(batches: Sequence[Batch]) -> list[list[int]]:
    return [[s.row_index for s in batch.samples] for batch in batches]


def cells(batch: Batch) -> int:
    """What the batch holds when every row has its whole answer, padding included."""
    longest_prompt = max(s.prompt_tokens for s in batch.samples)
    longest_answer = max(s.generation.max_new_tokens for s in batch.samples)
    return len(batch.samples) * (longest_prompt + longest_answer)


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), max_size=60)
CONFIGS = st.builds(
    BatchingConfig,
    max_batch_tokens=st.integers(1, 400),
    max_batch_size=st.integers(1, 12),
    sort_window=st.integers(1, 70),
    max_window_bytes=st.integers(1, 2000),
)


@given(LENGTHS, CONFIGS)
def test_every_sample_comes_out_once(lengths: list[tuple[int, int]], cfg: BatchingConfig) -> None:
    batches = list(group_by_length(samples_of(lengths), cfg))
    assert sorted(row for rows in rows_of(batches) for row in rows) == list(range(len(lengths)))
    assert all(batch.samples for batch in batches)


@given(LENGTHS, CONFIGS)
def test_a_batch_stays_within_both_limits(
    lengths: list[tuple[int, int]], cfg: BatchingConfig
) -> None:
    for batch in group_by_length(samples_of(lengths), cfg):
        assert len(batch.samples) <= cfg.max_batch_size
        assert cells(batch) <= cfg.max_batch_tokens or len(batch.samples) == 1


@given(LENGTHS, CONFIGS)
def test_the_longest_of_a_window_come_first(
    lengths: list[tuple[int, int]], cfg: BatchingConfig
) -> None:
    samples = samples_of(lengths)
    ordered = [s for batch in group_by_length(samples, cfg) for s in batch.samples]
    for start, stop in pairwise(window_bounds(samples, cfg)):
        window = ordered[start:stop]
        assert {s.row_index for s in window} == set(range(start, stop))
        keys = [(s.generation.max_new_tokens.bit_length(), s.prompt_tokens) for s in window]
        assert keys == sorted(keys, reverse=True)


def window_bounds(samples: Sequence[Sample], cfg: BatchingConfig) -> list[int]:
    bounds, size_bytes = [0], 0
    max_samples = min(cfg.max_batch_size, cfg.sort_window)
    for i, s in enumerate(samples, start=1):
        size_bytes += s.size_bytes
        is_full = i - bounds[-1] == max_samples or size_bytes >= cfg.max_window_bytes
        if is_full or i == len(samples):
            bounds.append(i)
            size_bytes = 0
            max_samples = min(2 * max_samples, cfg.sort_window)
    return bounds


@given(LENGTHS, CONFIGS)
def test_the_same_samples_give_the_same_batches(
    lengths: list[tuple[int, int]], cfg: BatchingConfig
) -> None:
    once = rows_of(list(group_by_length(samples_of(lengths), cfg)))
    again = rows_of(list(group_by_length(iter(samples_of(lengths)), cfg)))
    assert once == again


def test_samples_of_one_length_keep_their_order() -> None:
    cfg = BatchingConfig(max_batch_size=2)
    assert rows_of(list(group_by_length(samples_of([(5, 5)] * 5), cfg))) == [[0, 1], [2, 3], [4]]


def test_a_batch_is_filled_up_to_the_budget_and_not_above() -> None:
    lengths = [(6, 4)] * 4
    exact = BatchingConfig(max_batch_tokens=40)
    short = BatchingConfig(max_batch_tokens=39)
    assert rows_of(list(group_by_length(samples_of(lengths), exact))) == [[0, 1, 2, 3]]
    assert rows_of(list(group_by_length(samples_of(lengths), short))) == [[0, 1, 2], [3]]


def test_the_budget_counts_the_longest_prompt_with_the_longest_answer() -> None:
    # Either row takes 16 cells; together the rectangle is 2 x (10 + 10).
    lengths = [(6, 10), (10, 6)]
    assert len(list(group_by_length(samples_of(lengths), BatchingConfig(max_batch_tokens=40)))) == 1
    assert len(list(group_by_length(samples_of(lengths), BatchingConfig(max_batch_tokens=39)))) == 2


def test_a_sample_above_the_budget_goes_alone() -> None:
    cfg = BatchingConfig(max_batch_tokens=20)
    assert rows_of(list(group_by_length(samples_of([(5, 5), (50, 5), (4, 5)]), cfg))) == [
        [1],
        [0, 2],
    ]


@given(LENGTHS, CONFIGS)
def test_at_most_half_of_a_batch_is_padding(
    lengths: list[tuple[int, int]], cfg: BatchingConfig
) -> None:
    for batch in group_by_length(samples_of(lengths), cfg):
        assert batch.padded_tokens <= 2 * batch.prompt_tokens


def test_an_answer_below_half_of_the_longest_goes_apart() -> None:
    lengths = [(5, 16), (5, 8), (5, 7)]
    assert rows_of(list(group_by_length(samples_of(lengths), BatchingConfig()))) == [[0, 1], [2]]


def test_limits_of_the_rows_own_do_not_shatter_batches() -> None:
    draw = np.random.default_rng(0)
    lengths = list(zip(draw.integers(200, 1200, 2048), draw.integers(16, 257, 2048), strict=True))
    samples = samples_of([(int(prompt), int(answer)) for prompt, answer in lengths])
    cfg = BatchingConfig(max_batch_tokens=1 << 16, sort_window=2048)
    assert len(list(group_by_length(samples, cfg))) < 150


def test_lengths_that_halve_cost_one_batch_each() -> None:
    lengths = [(n, 1) for n in range(1, 129)]
    cfg = BatchingConfig(max_batch_size=128)
    batches = list(group_by_length(samples_of(lengths), cfg))
    longest = [max(s.prompt_tokens for s in batch.samples) for batch in batches]
    assert longest == [128, 63, 31, 15, 7, 3, 1]


def test_the_window_grows_so_that_the_engine_starts_early() -> None:
    cfg = BatchingConfig(max_batch_size=2, sort_window=7)
    taken = [0]

    def counted() -> Iterator[Sample]:
        for s in samples_of([(i + 1, 1) for i in range(20)]):
            taken[0] += 1
            yield s

    seen = [taken[0] for _ in group_by_length(counted(), cfg)]
    assert list(dict.fromkeys(seen)) == [2, 2 + 4, 2 + 4 + 7, 20]


def test_no_samples_give_no_batch() -> None:
    assert list(group_by_length([], BatchingConfig())) == []


@pytest.mark.parametrize(
    ("cfg", "window"),
    [
        (BatchingConfig(sort_window=7), 7),
        (BatchingConfig(sort_window=1), 1),
        # Each sample holds 1 + 99 bytes; the one that fills the window is still in it.
        (BatchingConfig(max_window_bytes=300), 3),
        (BatchingConfig(max_window_bytes=301), 4),
        (BatchingConfig(max_window_bytes=1), 1),
    ],
)
def test_never_more_than_a_window_is_held(cfg: BatchingConfig, window: int) -> None:
    num_taken = 0

    def counted() -> Iterator[Sample]:
        nonlocal num_taken
        for i in range(50):
            num_taken += 1
            yield sample(i, 1, 1, size_bytes=99)

    num_given = 0
    for batch in group_by_length(counted(), cfg):
        # Nothing of the next window is taken before this one is used up.
        assert num_taken == min(50, (num_given // window + 1) * window)
        num_given += len(batch.samples)
    assert num_given == num_taken == 50
