"""Systems that say which tokens an answer to a schema may have next, each behind one interface."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from batchvlm.constraints.constraints import banned_ids
from batchvlm.constraints.fallback import Fallback, compile_schema
from batchvlm.constraints.plan import make_plan, open_matcher
from batchvlm.records import Constraint, Form, FormKind


@cache
def tokenizer_at(path: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    if path == "demo":
        from batchvlm.demo.model import build_processor

        return build_processor().tokenizer
    return PreTrainedTokenizerFast(tokenizer_file=path, eos_token="</s>")


@cache
def engine_tokenizer(path: str) -> Any:
    from llguidance import hf

    return hf.from_tokenizer(tokenizer_at(path))


Step = tuple[Callable[[], np.ndarray[Any, Any]], Callable[[int], bool]]
"""What may come next, and to take one of it: an answer's own."""


def by_llguidance(path: str, first: Any) -> Callable[[], Step] | None:
    tokenizer = engine_tokenizer(path)
    if first.is_error():
        return None

    def begin() -> Step:
        matcher = first.deep_copy()

        def allowed() -> np.ndarray[Any, Any]:
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            if matcher.is_error():  # it has broken off, and says that the answer may end
                return np.array([], dtype=int)
            bits = np.unpackbits(mask, bitorder="little")[: tokenizer.vocab_size]
            return np.flatnonzero(bits)

        return allowed, matcher.consume_token

    return begin


def ours(path: str, schema: str) -> tuple[Callable[[], Step] | None, str]:
    plan = make_plan(Form(FormKind.JSON_SCHEMA, schema))
    if plan.grammar is None:
        return by_fallback(path, schema)
    first = open_matcher(engine_tokenizer(path), plan.grammar)
    return by_llguidance(path, first), plan.constraint.value


def by_fallback(path: str, schema: str) -> tuple[Callable[[], Step] | None, str]:
    tokenizer = tokenizer_at(path)
    banned = banned_ids(tokenizer, len(tokenizer))
    eos_id = tokenizer.eos_token_id
    fallback = Fallback(
        engine_tokenizer(path), num_ids=len(tokenizer), eos_ids=[eos_id], banned_ids=banned
    )
    known = fallback.tokenizer_text()
    if known is None:
        return None, Constraint.NONE.value
    try:
        first = fallback.matcher(compile_schema(schema, known))
    except RuntimeError:
        return None, Constraint.NONE.value
    closed = np.array([i for i in banned if i != eos_id], dtype=int)

    def begin() -> Step:
        matcher = first.deep_copy()

        def allowed() -> np.ndarray[Any, Any]:
            bits = np.unpackbits(matcher.mask().numpy().view(np.uint8), bitorder="little")
            bits[closed] = 0
            return np.flatnonzero(bits[: len(tokenizer)])

        return allowed, matcher.consume_token

    return begin, Constraint.XGRAMMAR.value


def llguidance_alone(path: str, schema: str) -> tuple[Callable[[], Step] | None, str]:
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    first = LLMatcher(engine_tokenizer(path), grammar, log_level=0)
    return by_llguidance(path, first), "strict"


def _by_outlines(backend: str) -> Callable[[str, str], tuple[Callable[[], Step] | None, str]]:
    """Through outlines' own interface: a processor for one static batch."""

    def open_system(path: str, schema: str) -> tuple[Callable[[], Step] | None, str]:
        import torch
        from outlines.backends import get_json_schema_logits_processor
        from outlines.models.transformers import Transformers

        tokenizer = tokenizer_at(path)
        model = _ModelOf(tokenizer)
        outer = Transformers(model, tokenizer)  # type: ignore[arg-type]
        # Warnings of its C++ code, one a keyword that it leaves out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            processor = get_json_schema_logits_processor(backend, outer, schema)
        except Exception:  # whatever it refuses a schema with
            return None, backend

        def begin() -> Step:
            processor.reset()
            ids: list[int] = []

            def allowed() -> np.ndarray[Any, Any]:
                logits = torch.zeros(1, len(tokenizer))
                context = torch.tensor([[0, *ids]])
                out = processor.process_logits(context, logits)
                return np.flatnonzero(torch.isfinite(out[0]).numpy())

            def commit(token: int) -> bool:
                ids.append(token)
                return True

            return allowed, commit

        return begin, backend

    return open_system


class _ModelOf:
    """As much of a transformers model as outlines looks at."""

    def __init__(self, tokenizer: Any) -> None:
        from types import SimpleNamespace

        self.config = SimpleNamespace(
            is_encoder_decoder=False, vocab_size=len(tokenizer), eos_token_id=0
        )
        self.device = "cpu"
        self.dtype = None


SYSTEMS: Mapping[str, Callable[[str, str], tuple[Callable[[], Step] | None, str]]] = {
    "batchvlm": ours,
    "llguidance": llguidance_alone,
    "outlines_core": _by_outlines("outlines_core"),
    "xgrammar": _by_outlines("xgrammar"),
}
