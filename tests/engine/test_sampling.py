from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchvlm.engine.sampling import RowSampler
from batchvlm.records import Generation

# Shape legend: B rows, V vocabulary, T tokens so far.

EOS = 3
CPU = torch.device("cpu")


def sampler(rows: Sequence[Generation], eos_ids: Sequence[int] = (EOS,)) -> RowSampler:
    return RowSampler(rows, eos_ids=eos_ids, device=CPU)


def row(**settings: Any) -> Generation:
    return Generation(**{"max_new_tokens": 8, "temperature": 1.0, **settings})


def choose(
    rows: Sequence[Generation], logits_BV: Tensor, ids_BT: Tensor | None = None, step: int = 0
) -> list[int]:
    if ids_BT is None:
        ids_BT = torch.zeros(len(rows), 1, dtype=torch.long)
    return sampler(rows).choose(logits_BV, ids_BT, torch.ones_like(ids_BT), step).tolist()


def spread(num_ids: int, seed: int = 0) -> Tensor:
    """Logits of one row, all different, none so low that it would never be drawn."""
    order = torch.randperm(num_ids, generator=torch.Generator().manual_seed(seed))
    return torch.linspace(0.0, 2.0, num_ids)[order]


def draws(logits_V: Tensor, num_draws: int, **settings: Any) -> list[int]:
    """Tokens drawn by rows that differ in their seeds alone."""
    rows = [row(seed=seed, **settings) for seed in range(num_draws)]
    return choose(rows, logits_V.expand(num_draws, -1))


def assert_distributed(tokens: Sequence[int], probs_V: Tensor) -> None:
    """Check counts against probabilities by Pearson's chi-square."""
    counts_V = torch.bincount(torch.tensor(tokens), minlength=len(probs_V)).double()
    assert not counts_V[probs_V == 0].any()
    counts, expected = counts_V[probs_V > 0], probs_V[probs_V > 0].double() * len(tokens)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # The 1 - 1e-6 quantile of chi-square with 9 degrees of freedom is 45.1.
    assert len(counts) <= 10
    assert chi_square < 45


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_softmax_over_seeds(temperature: float) -> None:
    logits_V = spread(10)
    tokens = draws(logits_V, 6000, temperature=temperature)
    assert_distributed(tokens, (logits_V / temperature).softmax(-1))


def test_draws_follow_softmax_over_steps_of_one_row() -> None:
    logits_V = spread(10)
    one = sampler([row(seed=5)])
    ids_BT = torch.zeros(1, 1, dtype=torch.long)
    tokens = [
        int(one.choose(logits_V[None], ids_BT, torch.ones_like(ids_BT), step))
        for step in range(6000)
    ]
    assert_distributed(tokens, logits_V.softmax(-1))
    repeats = sum(a == b for a, b in pairwise(tokens)) / len(tokens)
    # Independent draws repeat as often as two draws meet.
    assert abs(repeats - float((logits_V.softmax(-1) ** 2).sum())) < 0.03


CUTS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"top_k": 1}, [TopKLogitsWarper(1)]),
    ({"top_k": 4}, [TopKLogitsWarper(4)]),
    ({"top_k": 10}, [TopKLogitsWarper(10)]),
    ({"top_k": 99}, [TopKLogitsWarper(99)]),
    ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
    ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
    ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    ({"min_p": 0.6}, [MinPLogitsWarper(0.6)]),
    ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    # top_p is counted over what top_k left.
    ({"top_k": 5, "top_p": 0.7}, [TopKLogitsWarper(5), TopPLogitsWarper(0.7)]),
    ({"top_k": 2, "top_p": 0.95}, [TopKLogitsWarper(2), TopPLogitsWarper(0.95)]),
    ({"min_p": 0.4, "top_k": 3}, [MinPLogitsWarper(0.4), TopKLogitsWarper(3)]),
    ({"min_p": 0.3, "top_p": 0.6}, [MinPLogitsWarper(0.3), TopPLogitsWarper(0.6)]),
    (
        {"temperature": 0.5, "top_p": 0.75},
        [TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.75)],
    ),
    (
        {"temperature": 2.0, "min_p": 0.5, "top_k": 6},
        [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.5), TopKLogitsWarper(6)],
    ),
]


@pytest.mark.parametrize(("settings", "warpers"), CUTS, ids=lambda value: str(value)[:50])
def test_cuts_keep_what_transformers_keeps(settings: dict[str, Any], warpers: list[Any]) -> None:
    logits_V = spread(10, seed=1)
    kept_BV = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits_V[None])
    assert_distributed(draws(logits_V, 3000, **settings), kept_BV[0].softmax(-1))


def test_rows_of_one_batch_keep_their_own_settings() -> None:
    logits_V = spread(10, seed=2)
    kinds = [settings for settings, _ in CUTS]
    kinds += [{}, {"temperature": 0.0}, {"temperature": 0.0, "top_k": 3, "top_p": 0.5}]
    rows = [row(seed=seed, **kind) for seed in range(40) for kind in kinds]
    together = choose(rows, logits_V.expand(len(rows), -1))
    assert together == [choose([one], logits_V[None])[0] for one in rows]


def test_greedy_rows_take_the_likeliest_beside_drawn_rows() -> None:
    logits_BV = torch.stack([spread(10, seed) for seed in range(200)])
    rows = [row(temperature=seed % 2 * 5.0, seed=seed) for seed in range(200)]
    tokens = choose(rows, logits_BV)
    assert tokens[::2] == logits_BV.argmax(-1).tolist()[::2]
    assert tokens[1::2] != logits_BV.argmax(-1).tolist()[1::2]


def answer(
    rows: Sequence[Generation], place: int, next_logits: Callable[[int], Tensor]
) -> list[int]:
    """Twenty tokens of the row at `place`, whose logits depend on the step alone."""
    several = sampler(rows)
    ids_BT = torch.zeros(len(rows), 1, dtype=torch.long)
    tokens = []
    for step in range(20):
        logits_BV = torch.randn(len(rows), 10)
        logits_BV[place] = next_logits(step)
        chosen_B = several.choose(logits_BV, ids_BT, torch.ones_like(ids_BT), step)
        tokens.append(int(chosen_B[place]))
    return tokens


def test_a_row_draws_the_same_in_any_batch_at_any_place() -> None:
    def next_logits(step: int) -> Tensor:
        return spread(10, seed=step)

    mine = row(seed=77, top_k=8)
    alone = answer([mine], 0, next_logits)
    greedy, hot = row(temperature=0.0), row(temperature=3.0, seed=1, repetition_penalty=1.5)
    assert answer([mine, hot], 0, next_logits) == alone
    assert answer([greedy, hot, mine], 2, next_logits) == alone
    assert answer([hot, row(seed=77), mine, greedy], 2, next_logits) == alone
    assert answer([row(seed=78, top_k=8)], 0, next_logits) != alone


def test_rows_of_one_seed_draw_alike_and_rows_of_different_seeds_do_not() -> None:
    logits_BV = torch.zeros(64, 1000)
    assert len(set(choose([row(seed=9)] * 64, logits_BV))) == 1
    assert len(set(choose([row(seed=seed) for seed in range(64)], logits_BV))) > 50


@pytest.mark.parametrize("penalty", [0.5, 1.3, 20.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    torch.manual_seed(0)
    logits_BV = torch.randn(50, 10)
    ids_BT = torch.randint(0, 10, (50, 6))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids_BT, logits_BV.clone()).argmax(-1)
    rows = [row(temperature=0.0, repetition_penalty=penalty)] * 50
    assert choose(rows, logits_BV, ids_BT) == expected.tolist()
    assert expected.tolist() != logits_BV.argmax(-1).tolist()


def test_repetition_penalty_of_one_row_leaves_the_others() -> None:
    logits_BV = torch.tensor([[2.0, 1.9, 0.0]]).repeat(3, 1)
    ids_BT = torch.zeros(3, 1, dtype=torch.long)
    rows = [row(temperature=0.0, repetition_penalty=penalty) for penalty in (1.0, 2.0, 1.0)]
    assert choose(rows, logits_BV, ids_BT) == [0, 1, 0]


def test_padding_is_not_repetition() -> None:
    pad_id = 0
    logits_BV = torch.tensor([[2.0, 1.9, 0.0]]).repeat(2, 1)
    # The same id pads the first row and is a word of the second one's prompt.
    ids_BT = torch.tensor([[pad_id, pad_id, 2], [2, pad_id, 2]])
    mask_BT = torch.tensor([[0, 0, 1], [1, 1, 1]])
    rows = [row(temperature=0.0, repetition_penalty=1.5)] * 2
    assert sampler(rows).choose(logits_BV, ids_BT, mask_BT, 0).tolist() == [0, 1]


def test_prompt_ids_above_the_vocabulary_are_no_repetition() -> None:
    # Some models keep the image placeholder outside of what the head can answer.
    logits_BV = torch.tensor([[2.0, 1.9, 0.0]])
    ids_BT = torch.tensor([[3, 3, 0]])
    rows = [row(temperature=0.0, repetition_penalty=2.0)]
    assert choose(rows, logits_BV, ids_BT) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_of_sequence_before_the_least_number_of_tokens(temperature: float) -> None:
    logits_BV = torch.full((4, 6), -20.0)
    logits_BV[:, EOS], logits_BV[:, 5] = 20.0, 10.0
    rows = [row(temperature=temperature, min_new_tokens=least) for least in (0, 1, 2, 3)]
    rows[3] = row(temperature=temperature, min_new_tokens=3, ignore_eos=True)
    assert choose(rows, logits_BV, step=0) == [EOS, 5, 5, EOS]
    assert choose(rows, logits_BV, step=1) == [EOS, EOS, 5, EOS]
    assert choose(rows, logits_BV, step=2) == [EOS] * 4


def test_every_end_of_sequence_is_held_back() -> None:
    logits_BV = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    held = sampler([row(temperature=0.0, min_new_tokens=2)], eos_ids=(0, 1))
    ids_BT = torch.zeros(1, 1, dtype=torch.long)
    assert held.choose(logits_BV, ids_BT, torch.ones_like(ids_BT), 1).tolist() == [2]


def test_a_model_without_end_of_sequence_is_sampled_too() -> None:
    free = sampler([row(temperature=0.0, min_new_tokens=2)], eos_ids=())
    ids_BT = torch.zeros(1, 1, dtype=torch.long)
    assert free.choose(torch.eye(3)[2:], ids_BT, torch.ones_like(ids_BT), 0).tolist() == [2]


def test_the_logits_are_not_changed() -> None:
    logits_BV = spread(10).repeat(2, 1)
    before_BV = logits_BV.clone()
    choose([row(top_k=2, min_new_tokens=3, repetition_penalty=2.0, min_p=0.1)] * 2, logits_BV)
    assert torch.equal(logits_BV, before_BV)


def test_half_precision_logits_are_drawn_from() -> None:
    logits_V = spread(10).bfloat16()
    assert_distributed(draws(logits_V, 6000), logits_V.float().softmax(-1))


@pytest.mark.parametrize(
    ("settings", "is_greedy"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.5, "seed": 3}, True),
        ({"temperature": 0.7}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_new_tokens": 1}, False),
        ({"min_new_tokens": 1, "ignore_eos": True}, True),
    ],
)
def test_a_batch_is_greedy_when_every_row_is(settings: dict[str, Any], is_greedy: bool) -> None:
    plain = row(temperature=0.0)
    assert sampler([plain, row(**{"temperature": 0.0, **settings})]).is_greedy is is_greedy


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits_BV = spread(12)[None].repeat(2, 1)
    rows = [row(temperature=temperature), row(temperature=0.0)]
    assert choose(rows, logits_BV) == [int(logits_BV[0].argmax())] * 2


def test_logits_that_are_not_finite_give_no_id_beyond_the_vocabulary() -> None:
    logits_BV = torch.full((2, 7), torch.nan)
    assert all(0 <= token < 7 for token in choose([row(), row(temperature=0.0)], logits_BV))
