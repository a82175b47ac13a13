"""When to decode in one stream of a CPU while the others prefill.

A decode step of few rows has little that a second thread could compute, so the other threads
prefill meanwhile. The shares are balanced by counts of tokens and not by measured seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

from batchvlm.engine.slots.rows import Row

_COST = 4.0
"""What one token of an answer costs, in tokens of prompts with images: some two for a small model,
and more where few rows are left. A larger value lets decoding begin earlier, with fewer rows."""


class AnswerLengths:
    """Estimates the lengths of answers: the same share of their limits as of those that ended.

    Before any has ended they are estimated to reach their limits.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._limits = 0

    def count(self, num_tokens: int, limit: int) -> None:
        """Count an answer that has ended with `num_tokens` tokens, of `limit` at most."""
        self._num_tokens += num_tokens
        self._limits += limit

    def expected(self, limit: int) -> float:
        """The expected tokens of an answer with this limit, or of several with this sum of them."""
        return limit * self._num_tokens / self._limits if self._limits else float(limit)

    def left(self, rows: Iterable[Row]) -> float:
        """The expected tokens that rows have yet to choose, at least one each."""
        return sum(max(1.0, self.expected(row.max_new_tokens) - row.num_chosen) for row in rows)


def num_packs_first(
    prompt_tokens: int,
    answer_tokens: float,
    held_tokens: float,
    *,
    pack_tokens: int,
    num_streams: int,
) -> int:
    """Return how many packs all streams prefill before one of them decodes beside the others.

    After them decoding all rows in one stream takes as long as prefilling the rest in the others,
    so that all end together, with as many rows in each step as that allows.

    Args:
        prompt_tokens: the tokens of the prompts that wait.
        answer_tokens: the expected tokens of their answers.
        held_tokens: the expected tokens of the answers in slots or waiting for one.
        pack_tokens: the most prompt tokens of a pack.
        num_streams: at least 2.

    Returns:
        A multiple of `num_streams`; 0: decode now.
    """
    first = prompt_tokens - _COST * (num_streams - 1) * (answer_tokens + held_tokens)
    # Without enough to decode until a pack is done, the stream would be idle.
    if first <= 0 and _COST * held_tokens >= min(prompt_tokens, pack_tokens):
        return 0
    return num_streams * max(1, -int(-first // (num_streams * pack_tokens)))
