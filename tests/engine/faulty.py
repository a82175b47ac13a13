"""Rows for an engine over slots whose model fails on some of them, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from batchvlm.records import Failure, Sample

from .loaded import MOST_NEW_TOKENS, Loaded, Question

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
ONE, OTHER, TWO = ((90, 60),), ((48, 48),), ((90, 60), (48, 48))
QUESTIONS = tuple(
    Question(text=text, sizes=sizes)
    for text in ("what is this?", "describe the image in one word", "compare " * 12)
    for sizes in ((), ONE, OTHER, TWO)
)

TALE = Question(text="the quick brown fox jumps over the lazy dog. " * 12, sizes=())


Row = tuple[Question, int, int]
ROWS = st.lists(
    st.tuples(st.sampled_from(QUESTIONS), st.integers(0, 1), st.integers(1, MOST_NEW_TOKENS)),
    min_size=1,
    max_size=12,
)


def asked(small: Loaded, rows: Sequence[Row]) -> list[Sample]:
    return [
        small.ask(i, question, seed, max_new_tokens=limit)
        for i, (question, seed, limit) in enumerate(rows)
    ]


def answers(small: Loaded, rows: Sequence[Row]) -> list[list[int]]:
    return [small.known(question, seed)[:limit] for question, seed, limit in rows]


def check(outcomes: Sequence[Any], expected: Sequence[Any], at_fault: Sequence[bool]) -> None:
    for outcome, ids, is_at_fault in zip(outcomes, expected, at_fault, strict=True):
        if is_at_fault:
            assert isinstance(outcome, Failure)
        else:
            assert not isinstance(outcome, Failure), outcome
            assert list(outcome.token_ids) == ids


@contextmanager
def failing(
    owner: Any, name: str, is_too_much: Callable[..., bool], error: BaseException
) -> Iterator[list[int]]:
    """Let a function raise for some arguments; yields a list with an item for each time."""
    raised: list[int] = []
    whole = getattr(owner, name)

    def partial(*args: Any, **kwargs: Any) -> Any:
        if is_too_much(*args, **kwargs):
            raised.append(1)
            raise error
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, partial)
        yield raised


@contextmanager
def refusing(small: Loaded, token: int, error: BaseException) -> Iterator[None]:
    """Let the model raise whenever it reads this token, in a prompt or in an answer."""

    def refuse(module: Any, args: Any) -> None:
        if (args[0] == token).any():
            raise error

    handle = small.tuned().get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
