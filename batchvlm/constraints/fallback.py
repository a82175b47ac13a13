"""xgrammar, if installed, for JSON schemas that llguidance refuses.

It silently ignores unsupported keywords, so its grammars enforce less than llguidance's lenient
ones. Its matchers and llguidance's fill the same masks.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from batchvlm.words import one_line

log = logging.getLogger(__name__)

_MAX_MASK_S = 1.0
"""CPU time for one mask, in seconds; a row whose grammar needs more continues without it."""
_HINT = "pip install 'batchvlm[xgrammar]' for some of the schemas that llguidance refuses"


class XgrammarMatcher:
    """The state of one row in a grammar of xgrammar; has the methods of `LLMatcher` that are used.

    Args:
        compiled: xgrammar's `CompiledGrammar`.
    """

    def __init__(self, compiled: Any) -> None:
        import xgrammar

        self._compiled = compiled
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._num_words = (compiled.tokenizer_info.vocab_size + 31) // 32
        self._is_broken = False

    def deep_copy(self) -> XgrammarMatcher:
        """Return a new matcher at the start of the grammar."""
        return XgrammarMatcher(self._compiled)

    def consume_token(self, token: int) -> bool:
        """Consume a token; return False if the grammar does not allow it."""
        return bool(self._matcher.accept_token(token))

    def is_stopped(self) -> bool:
        """Whether nothing may follow. Always False: only a mask would show it."""
        return False

    def is_error(self) -> bool:
        """Whether the grammar has failed."""
        return self._is_broken

    def compute_ff_bytes(self) -> bytes:
        """Return the text that must follow. Always empty: only a mask would show it."""
        return b""

    def compute_ff_tokens(self) -> list[int]:
        """Return the tokens of that text."""
        return []

    def mask(self) -> Tensor:
        """Return a mask of the tokens that may follow, int32 [W]."""
        words_1W = torch.full((1, self._num_words), -1, dtype=torch.int32)
        start_s = time.thread_time()
        try:
            self._matcher.fill_next_token_bitmask(words_1W, 0)
        except Exception as error:
            log.warning("xgrammar made no mask, a row goes on without: %s", error)
            self._is_broken = True
        # xgrammar has no time limit, and the row's next mask would hardly be cheaper.
        self._is_broken |= time.thread_time() - start_s > _MAX_MASK_S
        return words_1W[0]


class Fallback:
    """Converts a tokenizer to xgrammar's, on first use, and makes matchers.

    Args:
        tokenizer: the model's tokenizer as llguidance's.
        num_ids: width of the masks.
        eos_ids: ids that end an answer.
        banned_ids: ids that are never allowed: special tokens, and ids of no token.
    """

    def __init__(
        self, tokenizer: Any, *, num_ids: int, eos_ids: Sequence[int], banned_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._num_ids = num_ids
        self._eos_ids = list(eos_ids)
        self._no_text = frozenset(banned_ids) | frozenset(eos_ids)
        self._lock = threading.Lock()

    def tokenizer_text(self) -> str | None:
        """Return the tokenizer for the compiling process; None if xgrammar cannot be used.

        In that case it logs one warning. Thread-safe.
        """
        with self._lock:
            return self._text

    def matcher(self, grammar: str) -> XgrammarMatcher:
        """Return a matcher at the start of a grammar that the other process compiled."""
        import xgrammar

        with self._lock:
            info = self._info
        return XgrammarMatcher(xgrammar.CompiledGrammar.deserialize_json(grammar, info))

    @cached_property
    def _text(self) -> str | None:
        if importlib.util.find_spec("xgrammar") is None:
            log.warning("a form is not guided: %s", _HINT)
            return None
        try:
            return str(self._info.serialize_json())
        # A broken installation, or a tokenizer that it cannot read.
        except Exception as error:
            log.warning("a form is not guided: xgrammar cannot be used (%s)", one_line(error))
            return None

    @cached_property
    def _info(self) -> Any:
        import xgrammar

        known = min(self._num_ids, self._tokenizer.vocab_size)
        texts = [
            # xgrammar treats a token without text as special and never allows it.
            b"" if i in self._no_text or i >= known else self._tokenizer.decode_bytes([i])
            for i in range(self._num_ids)
        ]
        return xgrammar.TokenizerInfo(
            texts, xgrammar.VocabType.RAW, vocab_size=self._num_ids, stop_token_ids=self._eos_ids
        )


def compile_schema(schema: str, tokenizer: str) -> str:
    """Compile a JSON schema by xgrammar, for `Fallback.matcher`.

    Args:
        schema: JSON text.
        tokenizer: from `Fallback.tokenizer_text`.

    Raises:
        RuntimeError: xgrammar refuses the schema.
    """
    import xgrammar

    info = xgrammar.TokenizerInfo.deserialize_json(tokenizer)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    compiled = compiler.compile_json_schema(
        schema,
        any_whitespace=False,  # else a model can generate white space up to its token limit
        separators=(",", ":"),
        strict_mode=False,  # strict mode forbids undeclared properties and items
    )
    return str(compiled.serialize_json())
