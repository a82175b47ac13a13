"""The choices of a row as tokens, and what their log-probabilities make of them.

The log-probability of a choice is that of its tokens behind the prompt, and of the end behind
these: the model says exactly this choice. Without the end, "red" would always be at least as likely
as "red apple". A choice is the tokens that the tokenizer makes of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from batchvlm.errors import ErrorType, RowError
from batchvlm.records import (
    ChoiceScore,
    Completion,
    Constraint,
    Failure,
    FinishReason,
    Sample,
)

# Shape legend: n nodes of a tree, each a token behind the prompt.

MAX_TOKENS = 1 << 16
"""Tokens that the choices of one row may have in all, and those of all rows that are kept."""

AT_PROMPT = -1
"""The node that is no token: the end of the prompt."""


@dataclass(frozen=True)
class ChoiceTree:
    """The tokens of some of a row's choices; what choices have in common is there once."""

    places: tuple[int, ...]
    """Which of the row's choices these are."""
    paths: tuple[tuple[int, ...], ...]
    """The nodes of each of them, from its first token to its last."""
    ids: npt.NDArray[np.int64]
    """[n]: each node's token."""
    parents: npt.NDArray[np.int64]
    """[n]: the node before it, or `AT_PROMPT`; parents come first."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sees(self) -> npt.NDArray[np.bool_]:
        """[n, n]: what each node attends to among the nodes, itself and those that lead to it."""
        sees = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent != AT_PROMPT:
                sees[node] |= sees[parent]
        return sees

    def halves(self) -> list[ChoiceTree]:
        """The same choices in two trees; in one where there is one choice."""
        middle = len(self.places) // 2
        ids = [tuple(int(self.ids[node]) for node in path) for path in self.paths]
        both = (slice(0, middle), slice(middle, None))
        return [_tree(self.places[s], ids[s]) for s in both if self.places[s]]


@dataclass(slots=True, eq=False)
class RowChoices:
    """A row's choices and the tokens of each."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    _trees: dict[int, list[ChoiceTree]] = field(default_factory=dict)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest choice."""
        return max(map(len, self.ids))

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(map(len, self.ids))

    def trees(self, max_nodes: int) -> list[ChoiceTree]:
        """All choices, in trees of at most so many nodes; a longer choice has a tree alone."""
        if max_nodes not in self._trees:
            self._trees[max_nodes] = list(self._grown(max_nodes))
        return self._trees[max_nodes]

    def _grown(self, max_nodes: int) -> list[ChoiceTree]:
        # Neighbours in the order of their tokens have most in common.
        order = sorted(range(len(self.ids)), key=lambda place: self.ids[place])
        groups: list[list[int]] = [[]]
        num_nodes = 0
        before: tuple[int, ...] = ()
        for place in order:
            ids = self.ids[place]
            num_new = len(ids) - _num_common(before, ids)
            if groups[-1] and num_nodes + num_new > max_nodes:
                groups.append([])
                num_nodes, num_new = 0, len(ids)
            groups[-1].append(place)
            num_nodes, before = num_nodes + num_new, ids
        return [_tree(group, [self.ids[place] for place in group]) for group in groups]


class Choices:
    """What rows may answer, as a model's tokens.

    Args:
        tokenizer: the model's.
        run: the run's choices; a row's own come first.
        eos_ids: ids that end an answer.
    """

    def __init__(
        self, tokenizer: Any, run: Sequence[str] | None, *, eos_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._run = None if run is None else tuple(run)
        self.eos_ids = tuple(eos_ids)
        self._kept: OrderedDict[tuple[str, ...], RowChoices] = OrderedDict()
        self._num_kept = 0
        """Tokens of what is kept."""

    def of(self, sample: Sample) -> RowChoices:
        """The choices of one row.

        Raises:
            RowError: it has none, or their tokens are too many for the model or for a row.
        """
        texts = sample.choices or self._run
        if texts is None:
            raise RowError(ErrorType.PROMPT, "the row has no choices to score")
        choices = self._kept.get(texts)
        if choices is None:
            choices = self._kept[texts] = RowChoices(texts, self._tokens_of(texts))
            self._num_kept += choices.num_tokens
        self._kept.move_to_end(texts)
        while self._num_kept > MAX_TOKENS and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._num_kept -= oldest.num_tokens
        longest = choices.max_tokens + bool(self.eos_ids)
        if sample.room is not None and longest > sample.room:
            raise RowError(
                ErrorType.PROMPT_TOO_LONG,
                f"a choice of {longest} tokens, its end among them, does not fit behind the "
                f"prompt; the model's positions leave {sample.room}",
            )
        return choices

    def answer(
        self,
        sample: Sample,
        choices: RowChoices,
        logprobs: Sequence[Sequence[float]],
        *,
        latency_s: float,
    ) -> Completion | Failure:
        """What a row answers: its likeliest choice.

        Args:
            sample: the row.
            choices: its choices.
            logprobs: log-probabilities of the tokens of each choice, and of the end behind them.
            latency_s: seconds until they were there.
        """
        totals = [math.fsum(each) for each in logprobs]
        most = max(totals)
        if most == -math.inf:
            return Failure(
                error_type=ErrorType.ENGINE,
                message="the model gives none of the row's choices a probability",
            )
        weights = [math.exp(total - most) for total in totals]
        whole = math.fsum(weights)
        best = totals.index(most)
        return Completion(
            row_index=sample.row_index,
            token_ids=(*choices.ids[best], *self.eos_ids[:1]),
            logprobs=tuple(logprobs[best]) if sample.generation.logprobs else None,
            text=choices.texts[best],
            finish_reason=FinishReason.STOP,
            latency_s=latency_s,
            constraint=Constraint.STRICT,
            scores=tuple(
                ChoiceScore(choice=text, logprob=total, probability=weight / whole)
                for text, total, weight in zip(choices.texts, totals, weights, strict=True)
            ),
        )

    def _tokens_of(self, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        too_many = RowError(
            ErrorType.PROMPT, f"the row's choices are more than {MAX_TOKENS:,} tokens"
        )
        if len(texts) > MAX_TOKENS:
            raise too_many
        # What is typed like a control token is text here as it is in prompts.
        encoded = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        if sum(map(len, encoded)) > MAX_TOKENS:
            raise too_many
        return tuple(tuple(ids) for ids in encoded)


def _tree(places: Sequence[int], ids: Sequence[tuple[int, ...]]) -> ChoiceTree:
    nodes: dict[tuple[int, int], int] = {}
    paths = []
    for tokens in ids:
        node, path = AT_PROMPT, []
        for token in tokens:
            node = nodes.setdefault((node, token), len(nodes))
            path.append(node)
        paths.append(tuple(path))
    keys = np.array(list(nodes), dtype=np.int64).reshape(-1, 2)
    return ChoiceTree(tuple(places), tuple(paths), ids=keys[:, 1], parents=keys[:, 0])


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for num, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return num
    return min(len(one), len(other))
