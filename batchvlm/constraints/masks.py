"""Which tokens each row may say next: one bit a token, filled while the model runs."""

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
"""What a byte of a mask adds to the scores of its eight tokens, [256, 8]."""


class RowMatcher:
    """Where one row is in its grammar.

    Args:
        matcher: an `LLMatcher` or `XgrammarMatcher` of its own.
        constraint: how far the grammar holds to the form.
        eos_ids: ids that end an answer.
        banned_ids: ids that no grammar means: special tokens, and those of no token.
        spell: text -> ids of text alone, also where it reads like a special token.
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
        """What comes next without a choice; None: not looked at since the last token."""
        self.is_over = False
        """Whether the answer has ended."""

    @property
    def is_held(self) -> bool:
        """Whether the grammar still decides what comes next."""
        return self._matcher is not None

    @property
    def must_end(self) -> bool:
        """Whether the answer is whole, and nothing but its end may follow."""
        return self._matcher is not None and not self.is_over and self._matcher.is_stopped()

    @property
    def forced(self) -> Sequence[int]:
        """The tokens that come next where the grammar leaves no choice of text; none elsewhere.

        The grammar forces bytes, the tokens are those that the tokenizer makes of them, up to where
        what follows could make it another token.
        """
        if self._forced is None:
            self._forced = self._find_forced()
        return self._forced

    def take_forced(self, max_tokens: int) -> Sequence[int]:
        """Take the first of these tokens as if they had been chosen."""
        tokens = self.forced[:max_tokens]
        for token in tokens:
            self.commit(token)
        return tokens

    def _find_forced(self) -> list[int]:
        if self._matcher is None or self.is_over:
            return []
        try:
            # Bytes are cheap to ask for, and seldom forced.
            forced = self._matcher.compute_ff_bytes()
            tokens = self._matcher.compute_ff_tokens() if forced else []
            if tokens and tokens[0] in self._never:
                # Text that reads like a control token, of which the engine makes that token.
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
        """Take the token that was chosen."""
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
        """Go on without the grammar, which has broken off; validation has the last word."""
        self._matcher = None
        self.constraint = Constraint.NONE

    @property
    def engine(self) -> Any | None:
        """The matcher that knows the next mask; None where none is needed."""
        return None if self.is_over else self._matcher

    def check(self) -> None:
        """Give up where the grammar broke off while the mask was made."""
        if self._matcher is not None and self._matcher.is_error():
            self.give_up()


class Masks:
    """Fills the masks of a step's rows in threads, and brings them to the device.

    Args:
        vocab_size: ids that the tokenizer's masks cover.
        banned_ids: ids that no grammar means: special tokens, and those of no token.
        eos_ids: ids that end an answer.
        device: where the logits are.
        num_threads: rows filled at a time.
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
        # Two, in turns: one may still be on its way to the device.
        self._buffers: list[Tensor | None] = [None, None]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def start(self, rows: Sequence[RowMatcher | None]) -> None:
        """Begin to fill the masks of these rows, which have taken all their tokens."""
        if any(row is not None and row.is_held for row in rows):
            rows = list(rows)
            self._filling = rows, self._thread.submit(self._fill, rows)

    def take(self, rows: Sequence[RowMatcher | None]) -> Tensor | None:
        """The masks of these rows on the device, int32 [B, W]; None where all tokens are free."""
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

    @torch.inference_mode()  # as in the engine, whose thread may have made the buffer
    def _fill(self, rows: Sequence[RowMatcher | None]) -> Tensor:
        mask_BW = self._buffer(len(rows))
        held, others = [], []
        for i, row in enumerate(rows):
            if row is None or not row.is_held:
                mask_BW[i].fill_(-1)
            elif (engine := row.engine) is None:
                mask_BW[i] = self._end_W
            elif forced := row.forced:
                # As the engine has it, but for text that reads like a control token.
                mask_BW[i].zero_()
                mask_BW[i, forced[0] // 32] = _word(forced[0] % 32)
            elif isinstance(engine, XgrammarMatcher):
                mask_BW[i] = engine.mask()
                others.append((engine, i))
            else:
                held.append((engine, i))
        if held:
            size_bytes = self._num_words * 4
            try:
                self._executor.unsafe_compute_mask_ptr(
                    held, mask_BW.data_ptr(), size_bytes, len(mask_BW)
                )
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                # Rust's code has panicked, and which row it was for it does not say.
                log.warning("masks could not be made, %d rows go on without: %s", len(held), error)
                for _, i in held:
                    if (row := rows[i]) is not None:
                        row.give_up()
        for engine, i in [*held, *others]:
            row = rows[i]
            assert row is not None
            row.check()
            mask_BW[i] &= self._open_W
            # It may want what no token says, or special ones alone.
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
    """An int32 with one bit."""
    return (1 << bit) if bit < 31 else -(1 << 31)


def _pack(is_set: Tensor) -> Tensor:
    """Bits [32 W] as int32 words [W]."""
    weights = (1 << torch.arange(32, dtype=torch.int64)).expand(len(is_set) // 32, -1)
    words = (is_set.view(-1, 32).long() * weights).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def apply_mask(scores_BV: Tensor, mask_BW: Tensor) -> Tensor:
    """The scores with every token impossible whose bit is not set.

    Args:
        scores_BV: [B, V].
        mask_BW: int32 [B, W] on the same device; bits beyond V are ignored, tokens beyond the
            bits are impossible.
    """
    num_ids = scores_BV.shape[-1]
    # Byte by byte: the bits of a word lie in its bytes in order (little-endian).
    if mask_BW.device.type == "cpu":
        # Looked up and added: a quarter of the time of picking the bits out.
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
