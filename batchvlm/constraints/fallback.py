"""xgrammar: what is held to a schema that llguidance refuses, where it is installed.

It leaves out silently what it does not know, so its answers are held to less than lenient ones. Its
matchers stand beside llguidance's under the same masks.
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

log = logging.getLogger(__name__)

_MAX_MASK_S = 1.0
"""Computing time of one mask, in seconds; a row whose grammar needs more goes on without it."""
_HINT = "pip install 'batchvlm[xgrammar]' for some of the schemas that llguidance refuses"


class XgrammarMatcher:
    """Where one row is in a grammar of xgrammar; has of `LLMatcher` what rows need.

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
        """Another one at the grammar's beginning."""
        return XgrammarMatcher(self._compiled)

    def consume_token(self, token: int) -> bool:
        """Take a token; False where it may not follow."""
        return bool(self._matcher.accept_token(token))

    def is_stopped(self) -> bool:
        """Whether nothing may follow; only a mask would tell."""
        return False

    def is_error(self) -> bool:
        """Whether the grammar has broken off."""
        return self._is_broken

    def compute_ff_bytes(self) -> bytes:
        """Text that must follow: none that is known without a mask."""
        return b""

    def compute_ff_tokens(self) -> list[int]:
        """The tokens of that."""
        return []

    def mask(self) -> Tensor:
        """The tokens that may follow, int32 [W]."""
        words_1W = torch.full((1, self._num_words), -1, dtype=torch.int32)
        start_s = time.thread_time()
        try:
            self._matcher.fill_next_token_bitmask(words_1W, 0)
        except Exception as error:
            log.warning("xgrammar made no mask, a row goes on without: %s", error)
            self._is_broken = True
        # It has no limit of its own, and a next mask of the row would hardly be cheaper.
        self._is_broken |= time.thread_time() - start_s > _MAX_MASK_S
        return words_1W[0]


class Fallback:
    """Knows a tokenizer as xgrammar does, once that is wanted.

    Args:
        tokenizer: llguidance's, of the model.
        num_ids: width of the masks.
        eos_ids: ids that end an answer.
        banned_ids: ids that no grammar means.
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
        """The tokenizer for the process that compiles; None where xgrammar cannot be used.

        Says so once. For several threads.
        """
        with self._lock:
            return self._text

    def matcher(self, grammar: str) -> XgrammarMatcher:
        """A matcher at the beginning of a grammar that the other process compiled."""
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
            reason = " ".join(str(error).split())[:200]
            log.warning("a form is not guided: xgrammar cannot be used (%s)", reason)
            return None

    @cached_property
    def _info(self) -> Any:
        import xgrammar

        known = min(self._num_ids, self._tokenizer.vocab_size)
        texts = [
            # Without text a token is special there, and never allowed.
            b"" if i in self._no_text or i >= known else self._tokenizer.decode_bytes([i])
            for i in range(self._num_ids)
        ]
        return xgrammar.TokenizerInfo(
            texts, xgrammar.VocabType.RAW, vocab_size=self._num_ids, stop_token_ids=self._eos_ids
        )


def compile_schema(schema: str, tokenizer: str) -> str:
    """A JSON schema compiled by xgrammar, for `Fallback.matcher`.

    Args:
        schema: as JSON.
        tokenizer: as `Fallback.tokenizer_text` gives it.

    Raises:
        RuntimeError: it refuses the schema.
    """
    import xgrammar

    info = xgrammar.TokenizerInfo.deserialize_json(tokenizer)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    compiled = compiler.compile_json_schema(
        schema,
        any_whitespace=False,  # a model that has nothing to say would go on with blanks
        separators=(",", ":"),
        strict_mode=False,  # it forbids what the schema does not name
    )
    return str(compiled.serialize_json())
