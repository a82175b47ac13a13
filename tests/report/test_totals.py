"""One pass over an output: exact counts, a fair and repeatable sample, bounded memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.report.totals import Draw, Latencies, TokenCounts, Values, leaves


@given(st.lists(st.integers(0, 300), min_size=1), st.integers(1, 50))
def test_token_counts_are_exact_whatever_the_batches(values: list[int], size: int) -> None:
    counts = TokenCounts()
    for start in range(0, len(values), size):
        counts.add(np.array(values[start : start + size]))
    ordered = sorted(values)
    assert (counts.num, counts.total, counts.max) == (len(values), sum(values), max(values))
    assert counts.quantile(0.5) == ordered[(len(ordered) + 1) // 2 - 1]
    assert counts.quantile(1) == ordered[-1]


@given(st.lists(st.floats(1e-3, 1e5), min_size=1))
def test_latencies_are_right_to_six_percent(values_s: list[float]) -> None:
    latencies = Latencies()
    latencies.add(np.array(values_s))
    exact = sorted(values_s)[(len(values_s) + 1) // 2 - 1]
    assert latencies.quantile(0.5) == pytest.approx(exact, rel=0.06)


@given(st.integers(0, 40), st.integers(0, 200), st.integers(1, 60), st.integers(0, 2**31))
def test_a_draw_is_the_same_whatever_the_batches(
    size: int, num_rows: int, step: int, seed: int
) -> None:
    rows = np.arange(num_rows)
    whole, pieces = Draw(size, seed), Draw(size, seed)
    whole.add(rows)
    for start in range(0, num_rows, step):
        pieces.add(rows[start : start + step])
    assert whole.rows == pieces.rows
    assert len(whole.rows) == len(set(whole.rows)) == min(size, num_rows)


def test_a_draw_is_fair_and_another_seed_draws_others() -> None:
    drawn = [Draw(1000, seed) for seed in (0, 1)]
    for draw in drawn:
        draw.add(np.arange(100_000))
        counts = np.histogram(draw.rows, bins=10, range=(0, 100_000))[0]
        assert counts.min() > 60 and counts.max() < 145
    assert len(set(drawn[0].rows) & set(drawn[1].rows)) < 40


def test_values_beyond_the_limit_are_counted_together() -> None:
    values = Values()
    for number in range(6000):
        values.add(str(number))
    values.add("0", 5)
    assert values.is_full and len(values.counts) == 5000
    assert values.most_common(1) == [("0", 6)] and values.num == 6005 and values.num_others == 1000


def test_long_values_are_shown_by_their_beginning_and_counted_by_the_whole() -> None:
    values = Values()
    for number in (0, 1, 1):
        values.add(f"{'a letterhead ' * 20}{number}")
    assert values.most_common(9) == [(f"{('a letterhead ' * 20)[:160]}…", n) for n in (2, 1)]


def test_leaves_of_nested_json() -> None:
    value = {"a": {"b": [{"c": 1}, {"c": 2}]}, "d": [], "e": None}
    assert list(leaves(value)) == [("a.b[].c", 1), ("a.b[].c", 2), ("d", []), ("e", None)]
    assert list(leaves(value, numbered=True))[1] == ("a.b[1].c", 2)
    assert list(leaves("text")) == [("(the answer)", "text")]
    deep = json.loads("[" * 50 + "]" * 50)
    assert len(list(leaves(deep))) == 1
