"""Choices of a row as token trees, and the completion that follows from their log-probabilities.

The log-probability of a choice is that of its tokens and of EOS after them. Without EOS, "red"
would always be at least as likely as "red apple". Only the tokenizer's own tokenization counts.
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

# Shape legend: n nodes of a tree, each a token after the prompt.

MAX_TOKENS = 1 << 16
"""Maximum number of tokens over the choices of one row, and over all cached choices."""

AT_PROMPT = -1
"""Parent of the tree's first tokens: the end of the prompt."""


@dataclass(frozen=True)
class ChoiceTree:
    """A prefix tree of some of a row's choices: common prefixes are stored once."""

    places: tuple[int, ...]
    """Indices of these choices among the row's."""
    paths: tuple[tuple[int, ...], ...]
    """The nodes of each choice, from its first token to its last."""
    ids: npt.NDArray[np.int64]
    """[n]: the token of each node."""
    parents: npt.NDArray[np.int64]
    """[n]: the parent of each node, or `AT_PROMPT`. A parent precedes its children."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def sees(self) -> npt.NDArray[np.bool_]:
        """[n, n]: the attention mask: each node attends to itself and its ancestors."""
        sees = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent != AT_PROMPT:
                sees[node] |= sees[parent]
        return sees

    def halves(self) -> list[ChoiceTree]:
        """Split the choices into two trees; one tree if there is only one choice."""
        middle = len(self.places) // 2
        ids = [tuple(int(self.ids[node]) for node in path) for path in self.paths]
        both = (slice(0, middle), slice(middle, None))
        return [_tree(self.places[s], ids[s]) for s in both if self.places[s]]


@dataclass(slots=True, eq=False)
class RowChoices:
    """The choices of a row and the tokens of each."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    _trees: dict[int, list[ChoiceTree]] = field(default_factory=dict)

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest choice."""
        return max(map(len, self.ids))

    @property
    def num_tokens(self) -> int:
        """Number of tokens over all choices."""
        return sum(map(len, self.ids))

    def trees(self, max_nodes: int) -> list[ChoiceTree]:
        """Return trees of at most `max_nodes` each; a longer choice has its own tree."""
        if max_nodes not in self._trees:
            self._trees[max_nodes] = list(self._grown(max_nodes))
        return self._trees[max_nodes]

    def _grown(self, max_nodes: int) -> list[ChoiceTree]:
        # Sorted by tokens, adjacent choices share the longest prefixes.
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
    """Tokenizes and caches the choices of rows.

    Args:
        tokenizer: the tokenizer of the model.
        run: choices for rows without their own, if any.
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
        """Number of tokens of the cached choices."""

    def of(self, sample: Sample) -> RowChoices:
        """Return the choices of a row.

        Raises:
            RowError: it has none, or they have too many tokens, in all or for the model.
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
                f"a choice of {longest} tokens, its end among them, does not fit after the "
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
        """Return a row's completion: its most likely choice, and the scores of all.

        Args:
            sample: the row.
            choices: its choices.
            logprobs: by choice, the log-probabilities of its tokens and of EOS after them.
            latency_s: seconds until they were computed.

        Returns:
            A failure if no choice has a probability above 0.
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
        # Text that looks like a control token is tokenized as text, as in prompts.
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
    """Return the length of the common prefix."""
    for num, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return num
    return min(len(one), len(other))
