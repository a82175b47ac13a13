"""The interface between engines and grammars."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchvlm.constraints.compiler import Compiled, Compiler
from batchvlm.constraints.fallback import Fallback
from batchvlm.constraints.masks import Masks, RowMatcher
from batchvlm.errors import ErrorType, RowError
from batchvlm.records import Constraint, Form, Sample
from batchvlm.words import one_line

log = logging.getLogger(__name__)

_MAX_ASIDE = 256
"""Most samples that wait for their grammars while others overtake them."""
_POLL_S = 0.01


class Constraints:
    """Compiles the forms of a run's rows and returns a matcher for each row.

    Args:
        tokenizer: the model's tokenizer, from transformers.
        num_ids: width of the model's logits.
        eos_ids: ids that end an answer.
        device: device of the logits.
        form: form of the run, for rows without their own.
        is_strict: fail rows whose form cannot be enforced exactly.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_ids: int,
        eos_ids: Sequence[int],
        device: torch.device,
        form: Form | None,
        is_strict: bool = False,
    ) -> None:
        self._spell = partial(_spell_text, tokenizer)
        self._form = form
        self._is_strict = is_strict
        self._eos_ids = frozenset(eos_ids)
        self.end_id = next(iter(eos_ids), None)
        cores = os.cpu_count() or 1
        self._num_workers = max(1, min(4, cores // 4))
        self._compiler: Compiler | None = None
        engine_tokenizer, num_known = _engine_tokenizer(tokenizer, num_ids, eos_ids)
        banned = banned_ids(tokenizer, num_known)
        if engine_tokenizer is not None:
            fallback = Fallback(
                engine_tokenizer, num_ids=num_known, eos_ids=eos_ids, banned_ids=banned
            )
            self._compiler = Compiler(
                engine_tokenizer,
                # Grammars of xgrammar are never exact.
                fallback=None if is_strict else fallback,
                num_workers=self._num_workers,
            )
        self._banned_ids = frozenset(banned)
        self._masks = Masks(
            num_known,
            banned_ids=banned,
            eos_ids=eos_ids,
            device=device,
            num_threads=max(1, min(16, cores - 1)),
        )
        self.num_rows: dict[Constraint, int] = {}
        """Number of rows begun, by constraint."""

    def start(self, rows: Sequence[RowMatcher | None]) -> None:
        """Start to fill the masks of the next tokens of these rows, in a thread."""
        self._masks.start(rows)

    def take(self, rows: Sequence[RowMatcher | None]) -> Tensor | None:
        """Return these masks, int32 [B, W] on the device; None if no row has a grammar."""
        return self._masks.take(rows)

    def stream(self, samples: Iterable[Sample]) -> Iterable[Sample]:
        """Yield each sample as soon as its grammar is compiled; the order may change."""
        if self._compiler is None:
            return samples
        return _Stream(samples, self._future)

    def in_order(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples in the same order; compiling their grammars has started."""
        for sample in samples:
            self._future(sample)
            yield sample

    def begin(self, sample: Sample) -> RowMatcher | None:
        """Return a matcher for one row; None if it has no form.

        Waits for the compiler, unless the sample came through `stream`.

        Raises:
            RowError: `is_strict`, and the form cannot be enforced exactly.
        """
        future = self._future(sample)
        if future is None:
            if self._form is None and sample.form is None:
                return None
            return self._checked(
                RowMatcher(None, Constraint.NONE, self._eos_ids), ("no tokenizer",)
            )
        compiled = future.result()
        matcher = None if compiled.matcher is None else compiled.matcher.deep_copy()
        row = RowMatcher(matcher, compiled.constraint, self._eos_ids, self._banned_ids, self._spell)
        return self._checked(row, compiled.notes)

    def close(self) -> None:
        """End the compiler's threads and processes; they start again when needed."""
        if self._compiler is not None:
            self._compiler.close()

    def _checked(self, row: RowMatcher, notes: Sequence[str]) -> RowMatcher:
        if self._is_strict and row.constraint is not Constraint.STRICT:
            raise RowError(
                ErrorType.PROMPT,
                f"the form cannot be enforced to the letter ({'; '.join(notes)[:200]})",
            )
        self.num_rows[row.constraint] = self.num_rows.get(row.constraint, 0) + 1
        return row

    def _future(self, sample: Sample) -> Future[Compiled] | None:
        form = sample.form or self._form
        if form is None or self._compiler is None:
            return None
        return self._compiler.compile(form)


class Unconstrained:
    """The same interface for runs in which no row has a form."""

    end_id: int | None = None

    def stream(self, samples: Iterable[Sample]) -> Iterable[Sample]:
        return samples

    def in_order(self, samples: Iterable[Sample]) -> Iterable[Sample]:
        return samples

    def begin(self, sample: Sample) -> RowMatcher | None:
        return None

    def start(self, rows: Sequence[RowMatcher | None]) -> None:
        pass

    def take(self, rows: Sequence[RowMatcher | None]) -> Tensor | None:
        return None

    def close(self) -> None:
        pass


class _Stream:
    """Samples in the order in which their grammars are compiled."""

    def __init__(
        self,
        samples: Iterable[Sample],
        compile: Callable[[Sample], Future[Compiled] | None],
    ) -> None:
        self._samples = iter(samples)
        # A stream that does not say whether it is ready is taken to be always ready.
        self._is_source_ready: Callable[[], bool] = getattr(samples, "is_ready", lambda: True)
        self._compile = compile
        self._ready: deque[Sample] = deque()
        self._aside: list[tuple[Sample, Future[Compiled]]] = []
        self._is_done = False

    def __iter__(self) -> Iterator[Sample]:
        while True:
            self._collect()
            if self._ready:
                yield self._ready.popleft()
            elif self._aside:
                # Wait for a grammar, but look for another sample now and then.
                wait([future for _, future in self._aside], _POLL_S, FIRST_COMPLETED)
            elif self._is_done:
                return
            else:
                self._pull()

    def is_ready(self) -> bool:
        """Whether the next sample, or the end, is available without waiting."""
        self._collect()
        return bool(self._ready) or (self._is_done and not self._aside)

    def _collect(self) -> None:
        """Collect samples whose grammars are done, and take further samples from the source."""
        still = []
        for sample, future in self._aside:
            if future.done():
                self._ready.append(sample)
            else:
                still.append((sample, future))
        self._aside = still
        while (
            not self._ready
            and not self._is_done
            and len(self._aside) < _MAX_ASIDE
            and self._is_source_ready()
        ):
            self._pull()

    def _pull(self) -> None:
        sample = next(self._samples, None)
        if sample is None:
            self._is_done = True
            return
        future = self._compile(sample)
        if future is None or future.done():
            self._ready.append(sample)
        else:
            self._aside.append((sample, future))


def _engine_tokenizer(
    tokenizer: Any, num_ids: int, eos_ids: Sequence[int]
) -> tuple[Any | None, int]:
    """Return llguidance's tokenizer, None if it cannot read this one, and its number of ids."""
    from llguidance import hf

    start = time.perf_counter()
    num_known = max(num_ids, len(tokenizer))
    try:
        made = hf.from_tokenizer(tokenizer, n_vocab=num_known, eos_token=list(eos_ids) or None)
    # It parses files of any repository, and a Rust panic is not an Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        log.warning("answers are not guided: no grammar for this tokenizer (%s)", one_line(error))
        return None, num_known
    log.debug("tokenizer for grammars in %.1f s", time.perf_counter() - start)
    return made, num_known


def _spell_text(tokenizer: Any, text: str) -> Sequence[int]:
    """Return the ids of a text inside an answer, without special tokens; [] if unknown."""
    # Some tokenizers add a space at the start of a text.
    lead, whole = (
        list(tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        for t in ("\x02", f"\x02{text}")
    )
    return whole[len(lead) :] if whole[: len(lead)] == lead else []


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that a tokenizer drops from text with `skip_special_tokens`."""
    # `all_special_ids` can lack special tokens among the added ones.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}


def banned_ids(tokenizer: Any, num_ids: int) -> list[int]:
    """Return the ids of special tokens and of no token, which a grammar could use as text."""
    known = set(tokenizer.get_vocab().values())
    return sorted(special_ids(tokenizer) | (set(range(num_ids)) - known))
