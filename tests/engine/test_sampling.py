from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchvlm.engine.sampling import NextTokens, RowSampler
from batchvlm.records import Generation

# Shape legend: B rows, V vocabulary, T prompt tokens.

EOS = 3
CPU = torch.device("cpu")


def sampler(
    rows: Sequence[Generation],
    prompts: Sequence[Sequence[int]] | None = None,
    eos_ids: Sequence[int] = (EOS,),
) -> RowSampler:
    """A sampler whose slots hold these rows, in order."""
    full = RowSampler(len(rows), eos_ids=eos_ids, device=CPU)
    for i, one in enumerate(rows):
        full.admit(i, one, np.array([prompts[i] if prompts else [0]]))
    return full


def row(**settings: Any) -> Generation:
    return Generation(**{"max_new_tokens": 8, "temperature": 1.0, **settings})


def choose(
    rows: Sequence[Generation],
    logits_BV: Tensor,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """The first token of each row."""
    return tokens_of(sampler(rows, prompts).choose(logits_BV, slice(None)))


def tokens_of(next_tokens: NextTokens) -> list[int]:
    ids: list[int] = next_tokens.ids_B.tolist()
    return ids


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
    tokens = [int(one.choose(logits_V[None], [0]).ids_B) for _ in range(6000)]
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
    tokens = []
    for step in range(20):
        logits_BV = torch.randn(len(rows), 10)
        logits_BV[place] = next_logits(step)
        tokens.append(tokens_of(several.choose(logits_BV, slice(None)))[place])
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
    assert choose(rows, logits_BV, ids_BT.tolist()) == expected.tolist()
    assert expected.tolist() != logits_BV.argmax(-1).tolist()


def test_repetition_penalty_of_one_row_leaves_the_others() -> None:
    logits_BV = torch.tensor([[2.0, 1.9, 0.0]]).repeat(3, 1)
    rows = [row(temperature=0.0, repetition_penalty=penalty) for penalty in (1.0, 2.0, 1.0)]
    assert choose(rows, logits_BV) == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_what_was_answered_counts_as_repetition(temperature: float) -> None:
    torch.manual_seed(1)
    penalty = 1.4
    mine = row(temperature=temperature, repetition_penalty=penalty, seed=8)
    beside = row(repetition_penalty=3.0)
    several = sampler([beside, mine], [[4], [1, 1]])
    plain = sampler([row(temperature=temperature, seed=8)])
    said = [1, 1]
    for _ in range(12):
        logits_BV = torch.randn(2, 10)
        penalised_BV = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([said]), logits_BV[1:].clone()
        )
        said += tokens_of(several.choose(logits_BV, slice(2)))[1:]
        assert [said[-1]] == tokens_of(plain.choose(penalised_BV, [0]))


def test_prompt_ids_above_the_vocabulary_are_no_repetition() -> None:
    # Some models keep the image placeholder outside of what the head can answer.
    logits_BV = torch.tensor([[2.0, 1.9, 0.0]])
    rows = [row(temperature=0.0, repetition_penalty=2.0)]
    assert choose(rows, logits_BV, [[3, 3, 0]]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_of_sequence_before_the_least_number_of_tokens(temperature: float) -> None:
    logits_BV = torch.full((4, 6), -20.0)
    logits_BV[:, EOS], logits_BV[:, 5] = 20.0, 10.0
    rows = [row(temperature=temperature, min_new_tokens=least) for least in (0, 1, 2, 3)]
    rows[3] = row(temperature=temperature, min_new_tokens=3, ignore_eos=True)
    several = sampler(rows)
    steps = [tokens_of(several.choose(logits_BV, slice(None))) for _ in range(3)]
    assert steps == [[EOS, 5, 5, EOS], [EOS, EOS, 5, EOS], [EOS] * 4]


def test_every_end_of_sequence_is_held_back() -> None:
    logits_BV = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    held = sampler([row(temperature=0.0, min_new_tokens=2)], eos_ids=(0, 1))
    assert tokens_of(held.choose(logits_BV, [0])) == [2]


def test_a_model_without_end_of_sequence_is_sampled_too() -> None:
    free = sampler([row(temperature=0.0, min_new_tokens=2)], eos_ids=())
    assert tokens_of(free.choose(torch.eye(3)[2:], [0])) == [2]


def test_the_logits_are_not_changed() -> None:
    logits_BV = spread(10).repeat(2, 1)
    before_BV = logits_BV.clone()
    settings = {"top_k": 2, "min_new_tokens": 3, "repetition_penalty": 2.0, "min_p": 0.1}
    full = RowSampler(2, eos_ids=(EOS,), device=CPU, suppress_ids=(1,))
    for slot in range(2):
        full.admit(slot, row(logprobs=True, **settings), np.array([0]))
    full.choose(logits_BV, slice(None))
    assert torch.equal(logits_BV, before_BV)


def test_a_row_that_moves_into_a_slot_left_before_its_first_token_keeps_what_it_has_seen() -> None:
    """The row before it ended without a token, as when memory is short."""
    penalties = {"temperature": 0.0, "repetition_penalty": 2.0, "frequency_penalty": 0.5}
    alone, full = sampler([row(**penalties)], [[0]]), sampler([row(**penalties)] * 2, [[5], [0]])
    logits_BV = spread(10).abs()[None]
    expected = [tokens_of(alone.choose(logits_BV, [0])) for _ in range(8)]
    said = [tokens_of(full.choose(logits_BV, [1]))]
    full.move(1, 0)
    said += [tokens_of(full.choose(logits_BV, [0])) for _ in range(7)]
    assert said == expected
    assert len({token for (token,) in expected}) > 1


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_of_a_draw_find_no_token_without_probability(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sampler([row()])
    monkeypatch.setattr(one._rows[0], "rng", SimpleNamespace(random=lambda: uniform))
    logits_BV = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    assert tokens_of(one.choose(logits_BV, [0])) == [1 if uniform == 0 else 3]


def test_half_precision_logits_are_drawn_from() -> None:
    logits_V = spread(10).bfloat16()
    assert_distributed(draws(logits_V, 6000), logits_V.float().softmax(-1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits_BV = spread(12)[None].repeat(2, 1)
    rows = [row(temperature=temperature), row(temperature=0.0)]
    assert choose(rows, logits_BV) == [int(logits_BV[0].argmax())] * 2


def poisoned(value: float, place: int) -> Tensor:
    logits_V = spread(7)
    logits_V[place] = value
    return logits_V


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2, "min_p": 0.1}])
@pytest.mark.parametrize("logprobs", [False, True])
def test_logits_that_are_not_finite_are_told(settings: dict[str, Any], logprobs: bool) -> None:
    bad = [torch.full((7,), torch.nan), torch.full((7,), -torch.inf)]
    bad += [poisoned(value, place) for value in (torch.nan, torch.inf) for place in range(7)]
    # An id that cannot be said has no finite logit in some models.
    logits_BV = torch.stack([*bad, spread(7), poisoned(-torch.inf, int(spread(7).argmin()))])
    rows = [row(logprobs=logprobs, **settings)] * len(logits_BV)
    choice = sampler(rows).choose(logits_BV, slice(None))
    assert choice.is_finite_B.tolist() == [False] * len(bad) + [True, True]
    assert all(0 <= token < 7 for token in tokens_of(choice))


def test_logits_beside_one_that_is_not_finite_are_chosen_from() -> None:
    logits_BV = torch.stack([torch.full((10,), torch.nan), spread(10)])
    rows = [row(seed=3), row(seed=4)]
    choice = sampler(rows).choose(logits_BV, slice(None))
    assert tokens_of(choice)[1:] == choose(rows[1:], spread(10)[None])
    assert choice.is_finite_B.tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_logprobs_are_the_models_own(dtype: torch.dtype, num_rows: int) -> None:
    logits_BV = torch.stack([spread(10, seed) * 3 for seed in range(num_rows)]).to(dtype)
    rows = [
        row(temperature=0.0, logprobs=True),
        row(temperature=2.5, top_k=3, logprobs=True),
        row(repetition_penalty=5.0, min_new_tokens=3, logprobs=True),
        row(),
    ][:num_rows]
    choice = sampler(rows).choose(logits_BV, slice(None))
    expected_B1 = logits_BV.float().log_softmax(-1).gather(-1, choice.ids_B[:, None])
    assert choice.logprobs_B is not None
    torch.testing.assert_close(choice.logprobs_B, expected_B1[:, 0])


def test_logprobs_are_left_out_where_no_row_asks() -> None:
    full = sampler([row(), row(logprobs=True)])
    assert full.choose(spread(10)[None], [0]).logprobs_B is None
    assert full.choose(spread(10)[None], [1]).logprobs_B is not None


@pytest.mark.parametrize("temperature", [0.0, 50.0])
def test_suppressed_ids_are_never_chosen(temperature: float) -> None:
    unsaid = RowSampler(1, eos_ids=(EOS,), device=CPU, suppress_ids=(0, 1, 99))
    unsaid.admit(0, row(temperature=temperature, logprobs=True), np.array([0]))
    logits_BV = torch.tensor([[9.0, 8.0, 1.0, 0.0]])
    for _ in range(50):
        choice = unsaid.choose(logits_BV, [0])
        (token,) = tokens_of(choice)
        assert token in (2, 3)
        # What the model would say is all that it may say.
        assert choice.logprobs_B is not None
        expected = float(logits_BV[0, 2:].log_softmax(-1)[token - 2])
        assert choice.logprobs_B.tolist() == pytest.approx([expected])


def logits_of(row_number: int, step: int) -> Tensor:
    """What the model says at a row's step, whatever slot it is in."""
    generator = torch.Generator().manual_seed(1000 * row_number + step)
    return torch.randn(12, generator=generator)


generations = st.builds(
    Generation,
    max_new_tokens=st.just(8),
    min_new_tokens=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 3.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 3),
    logprobs=st.booleans(),
)


@settings(max_examples=150)
@given(rows=st.lists(generations, min_size=1, max_size=9), data=st.data())
def test_rows_that_come_go_and_move_choose_as_alone(
    rows: list[Generation], data: st.DataObject
) -> None:
    prompts = [np.array([[number % 12, 11, 40]]) for number in range(len(rows))]
    alone: list[list[int]] = []
    for number, one in enumerate(rows):
        only = RowSampler(1, eos_ids=(EOS,), device=CPU)
        only.admit(0, one, prompts[number])
        steps = [only.choose(logits_of(number, step)[None], [0]) for step in range(6)]
        alone.append([int(choice.ids_B) for choice in steps])

    num_slots = data.draw(st.integers(1, 4))
    full = RowSampler(num_slots, eos_ids=(EOS,), device=CPU)
    waiting = list(range(len(rows)))[::-1]
    live: dict[int, int] = {}
    said: list[list[int]] = [[] for _ in rows]
    while waiting or live:
        free = [slot for slot in range(num_slots) if slot not in live]
        if waiting and free and (not live or data.draw(st.booleans())):
            live[free[0]] = waiting.pop()
            full.admit(free[0], rows[live[free[0]]], prompts[live[free[0]]])
            continue
        if free and data.draw(st.booleans()):
            source, target = data.draw(st.sampled_from(sorted(live))), free[-1]
            live[target] = live.pop(source)
            full.move(source, target)
        slots: list[int] = data.draw(st.permutations(sorted(live)))
        slots = slots[: data.draw(st.integers(1, len(slots)))]
        logits_BV = torch.stack([logits_of(live[s], len(said[live[s]])) for s in slots])
        is_whole = slots == list(range(len(slots)))
        choice = full.choose(logits_BV, slice(len(slots)) if is_whole else slots)
        for slot, token in zip(slots, tokens_of(choice), strict=True):
            said[live[slot]].append(token)
            # A row may end at any step.
            if len(said[live[slot]]) == 6 - live[slot] % 3:
                del live[slot]
    for number, answer in enumerate(said):
        assert answer == alone[number][: len(answer)]
        assert len(answer) == 6 - number % 3


def test_a_greedy_step_computes_nothing_but_the_likeliest() -> None:
    """Whatever a slot's earlier row asked for costs nothing once it is gone."""
    full = RowSampler(2, eos_ids=(EOS,), device=CPU)
    full.admit(0, row(repetition_penalty=2.0, top_k=3, logprobs=True), np.array([0]))
    full.admit(1, row(temperature=0.0), np.array([0]))
    full.choose(torch.randn(2, 10), slice(None))
    full.admit(0, row(temperature=0.0), np.array([0]))
    full.choose(torch.randn(2, 10), slice(None))
    with Operations() as operations:
        full.choose(torch.randn(2, 10), slice(None))
    views = {"select", "unsqueeze", "slice"}
    assert operations.names <= {"randn", "argmax", "gather", "isfinite"} | views


class Operations(TorchDispatchMode):
    """The names of the operations that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    """Only operations that a device can queue; a GPU's own check is `set_sync_debug_mode`."""
    full = sampler(
        [
            row(repetition_penalty=2.0, top_k=3, logprobs=True, min_new_tokens=4),
            row(temperature=0.0, min_p=0.3, frequency_penalty=0.5, presence_penalty=0.5),
        ]
    )
    with Operations() as operations:
        full.choose(torch.randn(2, 10), [1, 0])
        full.move(0, 0)
    assert "argmax" in operations.names
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "index"}
    assert not operations.names & waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_waits_for_a_gpu() -> None:
    device = torch.device("cuda")
    full = RowSampler(3, eos_ids=(EOS,), device=device, suppress_ids=(1,))
    logits_BV = torch.randn(2, 50, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        full.admit(0, row(repetition_penalty=2.0, top_k=3, logprobs=True), np.array([0, 4]))
        counted = row(temperature=0.0, min_p=0.3, min_new_tokens=4, frequency_penalty=0.5)
        full.admit(1, counted, np.array([0]))
        for _ in range(3):
            full.choose(logits_BV, slice(2))
        full.move(0, 2)
        full.choose(logits_BV, [2, 1])
        full.move(1, 0)
        full.choose(logits_BV, [2, 0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def openai_penalised(
    logits_V: Tensor, said: Sequence[int], frequency: float, presence: float
) -> Tensor:
    """OpenAI's own formula, token by token."""
    scores = logits_V.clone()
    for token in set(said):
        scores[token] -= said.count(token) * frequency + presence
    return scores


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("frequency", "presence"), [(0.3, 0.0), (0.0, 0.7), (0.2, 0.5), (-1, 0)])
def test_count_penalties_are_openais(temperature: float, frequency: float, presence: float) -> None:
    settings = {"temperature": temperature, "seed": 5}
    penalised = row(frequency_penalty=frequency, presence_penalty=presence, **settings)
    rows = sampler([row(**settings), penalised], [[0], [1, 2, 2]])
    logits_V = torch.tensor([1.0, 1.3, 1.2, -9.0, 0.9])
    # Step by step, a row without penalties is given the penalised logits: it must choose the same.
    alone = sampler([row(**settings)])
    said: list[int] = []
    plain: list[int] = []
    for _ in range(12):
        first, second = tokens_of(rows.choose(logits_V.expand(2, -1), slice(None)))
        expected = openai_penalised(logits_V, said, frequency, presence)
        assert tokens_of(alone.choose(expected[None], slice(None))) == [second]
        said.append(second)
        plain.append(first)
    if temperature == 0:
        assert set(plain) == {1}
    assert said != plain or frequency < 0


def test_count_penalties_move_and_end_with_their_row() -> None:
    logits_BV = torch.tensor([[1.0, 0.9, 0.8, -9.0]])
    strict = row(temperature=0.0, presence_penalty=2.0)
    rows = RowSampler(2, eos_ids=(EOS,), device=CPU)
    rows.admit(0, strict, np.array([[0]]))
    assert tokens_of(rows.choose(logits_BV, [0])) == [0]
    rows.move(0, 1)
    assert tokens_of(rows.choose(logits_BV, [1])) == [1]
    # Another row comes into the slot: nothing is left of what the old one said.
    rows.admit(1, strict, np.array([[0]]))
    assert tokens_of(rows.choose(logits_BV, [1])) == [0]
    rows.admit(0, strict, np.array([[0]]))
    rows.move(0, 1)
    assert tokens_of(rows.choose(logits_BV, [1])) == [0]


class OutOfMemory(TorchDispatchMode):
    """Raises at one of the operations that make tensors; -1: counts them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.num = at, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func._schema.is_mutable:
            self.num += 1
            if self.num - 1 == self.at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def test_where_memory_was_short_the_same_is_chosen_by_halves() -> None:
    every = [
        row(seed=3, logprobs=True),
        row(seed=4, repetition_penalty=1.7, top_k=5),
        row(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5),
        row(seed=5, temperature=3.0, min_new_tokens=3, min_p=0.01),
    ]
    prompts = [[0], [1, 2], [0], [0]]
    logits_BV = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    whole = sampler(every, prompts)
    expected = [tokens_of(whole.choose(logits_BV, slice(4))) for _ in range(6)]

    def said(at: int, *, step: int) -> tuple[list[list[int]], int]:
        rows = sampler(every, prompts)
        tokens = [tokens_of(rows.choose(logits_BV, slice(4))) for _ in range(step)]
        short = OutOfMemory(at)
        try:
            with short:
                choice = rows.choose(logits_BV, slice(4))
            tokens.append(tokens_of(choice))
        except torch.OutOfMemoryError:
            halves = [rows.choose(logits_BV[half], half) for half in (slice(2), slice(2, 4))]
            tokens.append([token for half in halves for token in tokens_of(half)])
        tokens += [tokens_of(rows.choose(logits_BV, slice(4))) for _ in range(5 - step)]
        return tokens, short.num

    for step in (0, 2):
        counted, num = said(-1, step=step)
        assert counted == expected and num > 20
        for at in range(num):
            assert said(at, step=step)[0] == expected, (step, at)
