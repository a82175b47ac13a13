"""Token masks: one bit for each token that a row may generate next, filled while the model runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchvlm.constraints.fallback import XgrammarMatcher
from batchvlm.records import Constraint

log = logging.getLogger(__name__)

# Shape legend: B rows, V width of the logits, W = V / 32 words of a mask, K = 4 W bytes.

_IS_FREE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_ADDED = np.where(_IS_FREE, 0, -np.inf).astype(np.float32)
"""Value to add to the scores of eight tokens for each byte of a mask, [256, 8]."""


class RowMatcher:
    """The state of one row in its grammar.

    Args:
        matcher: the row's own `LLMatcher` or `XgrammarMatcher`; None for no grammar.
        constraint: how strictly the grammar enforces the form.
        eos_ids: ids that end an answer.
        banned_ids: ids that are never allowed: special tokens, and ids of no token.
        spell: returns the ids of a text without special tokens, even if it reads like one.
    """

    def __init__(
        self,
        matcher: Any,
        constraint: Constraint,
        eos_ids: frozenset[int],
        banned_ids: frozenset[int] = frozenset(),
        spell: Callable[[str], Sequence[int]] = lambda text: (),
    ) -> None:
        self.constraint = constraint
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._never = eos_ids | banned_ids
        self._spell = spell
        self._forced: Sequence[int] | None = None
        """The forced next tokens; None if not computed since the last token."""
        self.is_over = False
        """Whether the answer has ended."""

    @property
    def is_held(self) -> bool:
        """Whether the row still has a grammar."""
        return self._matcher is not None

    @property
    def must_end(self) -> bool:
        """Whether the answer is complete and only an end token may follow."""
        return self._matcher is not None and not self.is_over and self._matcher.is_stopped()

    @property
    def forced(self) -> Sequence[int]:
        """The next tokens if the grammar allows only one text; else empty.

        The grammar forces bytes. The tokens are those of the tokenizer for these bytes, up to the
        point where the text that follows could change the token.
        """
        if self._forced is None:
            self._forced = self._find_forced()
        return self._forced

    def take_forced(self, max_tokens: int) -> Sequence[int]:
        """Commit at most `max_tokens` of the forced tokens and return them."""
        tokens = self.forced[:max_tokens]
        for token in tokens:
            self.commit(token)
        return tokens

    def _find_forced(self) -> list[int]:
        if self._matcher is None or self.is_over:
            return []
        try:
            # Forced bytes are cheap to compute, and rare.
            forced = self._matcher.compute_ff_bytes()
            tokens = self._matcher.compute_ff_tokens() if forced else []
            if tokens and tokens[0] in self._never:
                # llguidance turns text that reads like a control token into that token.
                tokens = list(self._spell(forced.decode(errors="ignore"))[:1])
                tokens = tokens[: self._matcher.validate_tokens(tokens)]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            log.warning("a grammar broke off, its row goes on without: %s", error)
            self.give_up()
            return []
        return list(takewhile(lambda token: token not in self._never, tokens))

    def commit(self, token: int) -> None:
        """Advance the grammar by the token that was chosen."""
        if self._matcher is None or self.is_over:
            return
        forced, self._forced = self._forced, None
        if forced and forced[0] == token:
            self._forced = forced[1:] or None
        if token in self._eos_ids:
            self.is_over = True
        elif not self._matcher.consume_token(token):
            self.give_up()

    def give_up(self) -> None:
        """Continue without the grammar after it failed; validation still checks the answer."""
        self._matcher = None
        self.constraint = Constraint.NONE

    @property
    def engine(self) -> Any | None:
        """The matcher that computes the next mask; None if the answer has ended or the row has no
        grammar."""
        return None if self.is_over else self._matcher

    def check(self) -> None:
        """Give up if the grammar failed while the mask was computed."""
        if self._matcher is not None and self._matcher.is_error():
            self.give_up()


class Masks:
    """Fills the masks of a step's rows in threads and copies them to the device.

    Args:
        vocab_size: number of ids in a mask.
        banned_ids: ids that are never allowed: special tokens, and ids of no token.
        eos_ids: ids that end an answer.
        device: device of the logits.
        num_threads: rows filled concurrently.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        banned_ids: Sequence[int],
        eos_ids: Sequence[int],
        device: torch.device,
        num_threads: int,
    ) -> None:
        from llguidance import LLExecutor

        self._num_words = (vocab_size + 31) // 32
        self._executor = LLExecutor(num_threads)
        self._device = device
        is_open = torch.ones(self._num_words * 32, dtype=torch.bool)
        is_open[vocab_size:] = False
        is_open[[i for i in banned_ids if i < vocab_size]] = False
        is_end = torch.zeros_like(is_open)
        ends = [i for i in eos_ids if i < vocab_size]
        is_open[ends] = is_end[ends] = True
        self._open_W, self._end_W = _pack(is_open), _pack(is_end)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._filling: tuple[Sequence[RowMatcher | None], Future[Tensor]] | None = None
        # Two buffers in turn: the copy of one to the device may still be running.
        self._buffers: list[Tensor | None] = [None, None]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def start(self, rows: Sequence[RowMatcher | None]) -> None:
        """Start to fill the masks of these rows; all their tokens must have been committed."""
        if any(row is not None and row.is_held for row in rows):
            rows = list(rows)
            self._filling = rows, self._thread.submit(self._fill, rows)

    def take(self, rows: Sequence[RowMatcher | None]) -> Tensor | None:
        """Return the rows' masks on the device, int32 [B, W]; None if no row has a grammar."""
        filling, self._filling = self._filling, None
        if filling is None or filling[0] != list(rows):
            if not any(row is not None and row.is_held for row in rows):
                return None
            mask_BW = self._fill(rows)
        else:
            mask_BW = filling[1].result()
        if self._device.type != "cuda":
            return mask_BW.to(self._device)
        on_device = mask_BW.to(self._device, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copied[1 - self._turn] = event
        return on_device

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    @torch.inference_mode()  # as in the engine, whose thread may have allocated the buffer
    def _fill(self, rows: Sequence[RowMatcher | None]) -> Tensor:
        mask_BW = self._buffer(len(rows))
        by_llguidance, by_xgrammar = [], []
        for i, row in enumerate(rows):
            if row is None or not row.is_held:
                mask_BW[i].fill_(-1)
            elif (engine := row.engine) is None:
                mask_BW[i] = self._end_W
            elif forced := row.forced:
                # llguidance's own mask is wrong for text that reads like a control token.
                mask_BW[i].zero_()
                mask_BW[i, forced[0] // 32] = _word(forced[0] % 32)
            elif isinstance(engine, XgrammarMatcher):
                mask_BW[i] = engine.mask()
                by_xgrammar.append((engine, i))
            else:
                by_llguidance.append((engine, i))
        if by_llguidance:
            size_bytes = self._num_words * 4
            try:
                self._executor.unsafe_compute_mask_ptr(
                    by_llguidance, mask_BW.data_ptr(), size_bytes, len(mask_BW)
                )
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                # The Rust code has panicked and does not say for which row.
                log.warning(
                    "masks could not be made, %d rows go on without: %s", len(by_llguidance), error
                )
                for _, i in by_llguidance:
                    if (row := rows[i]) is not None:
                        row.give_up()
        for engine, i in [*by_llguidance, *by_xgrammar]:
            row = rows[i]
            assert row is not None
            row.check()
            mask_BW[i] &= self._open_W
            # The grammar may require text that no token has, or special tokens only.
            if isinstance(engine, XgrammarMatcher) and not mask_BW[i].any():
                row.give_up()
            if not row.is_held:
                mask_BW[i].fill_(-1)
        return mask_BW

    def _buffer(self, num_rows: int) -> Tensor:
        turn, self._turn = self._turn, 1 - self._turn
        if self._copied[turn] is not None:
            self._copied[turn].synchronize()
            self._copied[turn] = None
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < num_rows:
            shape = (num_rows, self._num_words)
            is_pinned = self._device.type == "cuda"
            buffer = torch.empty(shape, dtype=torch.int32, pin_memory=is_pinned)
            self._buffers[turn] = buffer
        return buffer[:num_rows]


def _word(bit: int) -> int:
    """Return an int32 with one bit set."""
    return (1 << bit) if bit < 31 else -(1 << 31)


def _pack(is_set: Tensor) -> Tensor:
    """Pack bits [32 W] into int32 words [W]."""
    weights = (1 << torch.arange(32, dtype=torch.int64)).expand(len(is_set) // 32, -1)
    words = (is_set.view(-1, 32).long() * weights).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def apply_mask(scores_BV: Tensor, mask_BW: Tensor) -> Tensor:
    """Return the scores with -inf for every token whose bit is not set.

    Args:
        scores_BV: [B, V].
        mask_BW: int32 [B, W] on the same device; bits beyond V are ignored, tokens beyond the mask
            get -inf.
    """
    num_ids = scores_BV.shape[-1]
    # By bytes: a word's bits are in its bytes in order (little-endian).
    if mask_BW.device.type == "cpu":
        # A table lookup and an addition take a quarter of the time of extracting bits.
        bytes_BK = mask_BW.contiguous().numpy().view(np.uint8)
        added_BK8 = np.take(_ADDED, bytes_BK, axis=0)
        added_BV = torch.from_numpy(added_BK8.reshape(len(bytes_BK), -1))[:, :num_ids]
        if added_BV.shape[-1] < num_ids:
            padding = (0, num_ids - added_BV.shape[-1])
            added_BV = torch.nn.functional.pad(added_BV, padding, value=-torch.inf)
        return scores_BV + added_BV
    bits = torch.arange(8, dtype=torch.uint8, device=mask_BW.device)
    all_bits = (mask_BW.contiguous().view(torch.uint8)[:, :, None] >> bits) & 1
    is_free = all_bits.flatten(1)[:, :num_ids].bool()
    if is_free.shape[-1] < num_ids:
        padding = (0, num_ids - is_free.shape[-1])
        is_free = torch.nn.functional.pad(is_free, padding, value=False)
    return scores_BV.masked_fill(~is_free, -torch.inf)
