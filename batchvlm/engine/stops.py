"""Stop conditions of a row, checked on the host after each token, and the resulting completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchvlm.errors import ErrorType
from batchvlm.records import Completion, Failure, FinishReason, Generation

MAX_PERIOD = 64
MIN_CYCLE_TOKENS = 512
MIN_CYCLE_PERIODS = 16
"""A row is in a cycle of period p <= MAX_PERIOD if its last `max(MIN_CYCLE_TOKENS,
MIN_CYCLE_PERIODS * p)` tokens repeat with that period."""
_MAX_BYTES = 4
"""Maximum length of a UTF-8 character."""
_REPLACEMENT = "\ufffd"
"""Decoded text of tokens that hold part of a character. In a sequence of byte tokens (`<0x0A>`)
with an incomplete character, every token decodes to it."""


class SpokenTokens:
    """Decodes as a tokenizer does, but omits only BOS, EOS and padding from the text of an answer.

    Other special tokens, such as Florence-2's `<loc_52>`, are part of the answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.all_special_ids = [i for i in ids if i is not None]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if i not in self.all_special_ids]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


class RowStop:
    """Ends a row by `max_new_tokens`, stop strings, repetition and, unless ignored, EOS.

    Args:
        row: the generation settings of the row.
        eos_ids: ids that end a sequence.
        tokenizer: the tokenizer that decodes the answer.
        special_ids: ids that it omits from the text.
        continued_ids: the last ids of the prompt, if the answer continues their text. Tokenizers
            decode a token differently at the start of a text.
    """

    def __init__(
        self,
        row: Generation,
        eos_ids: frozenset[int],
        tokenizer: Any,
        special_ids: frozenset[int] = frozenset(),
        continued_ids: Sequence[int] = (),
    ) -> None:
        self._row = row
        self._special_ids = special_ids
        self._eos_ids = frozenset[int]() if row.ignore_eos else eos_ids
        self._tokenizer = tokenizer
        self._before = self._whole_chars(continued_ids)
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._reason: FinishReason | None = None
        self._has_eos = False
        self._cut_chars = 0
        detects_cycles = row.stop_on_repetition and not row.ignore_eos
        self._cycle = CycleDetector() if detects_cycles else None
        if row.stop:
            # A stop string may start and end within tokens, so decoded text is searched. Every
            # token adds at least a byte, so a tail of as many tokens as the longest has bytes will
            # do.
            longest = max(len(stop.encode()) for stop in row.stop)
            self._num_tail = longest + 1
            self._text_ids: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, including one that ended the answer."""
        return len(self._ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids so far, including one that ended the answer."""
        return tuple(self._ids)

    def push(self, token: int, logprob: float | None = None) -> bool:
        """Append the next token; return whether it ends the answer.

        Args:
            token: its id.
            logprob: its log-probability; required if the row has `logprobs`.
        """
        assert self._reason is None, "the answer is over"
        self._ids.append(token)
        if self._row.logprobs:
            assert logprob is not None, "the row asks for log-probabilities"
            self._logprobs.append(logprob)
        self._reason = self._find_reason(token)
        return self._reason is not None

    def completion(self, row_index: int, latency_s: float) -> Completion:
        """Return the completion: its ids include EOS, its text ends before EOS or a stop string.

        Args:
            row_index: index of the sample's row.
            latency_s: seconds until the answer was complete.
        """
        # An EOS id is not always a special token, so it is removed before decoding.
        ids = self._ids[:-1] if self._has_eos else self._ids
        text = self._tokenizer.decode([*self._before, *ids], skip_special_tokens=True)
        if self._before:
            text = text[len(self._tokenizer.decode(self._before, skip_special_tokens=True)) :]
        return Completion(
            row_index=row_index,
            token_ids=self.token_ids,
            logprobs=tuple(self._logprobs) if self._row.logprobs else None,
            text=text[: len(text) - self._cut_chars],
            finish_reason=self._reason or FinishReason.LENGTH,
            latency_s=latency_s,
        )

    def _whole_chars(self, ids: Sequence[int]) -> list[int]:
        """Return the last of these ids that start at a character's boundary."""
        for start in reversed(range(len(ids))):
            if not self._tokenizer.decode(list(ids[start:])).startswith(_REPLACEMENT):
                return list(ids[start:])
        return []

    def _find_reason(self, token: int) -> FinishReason | None:
        if token in self._eos_ids:
            self._has_eos = True
            return FinishReason.STOP
        is_too_early = len(self._ids) < self._row.min_new_tokens
        if self._row.stop:
            self._cut_chars = self._stopped_chars(token, is_too_early=is_too_early)
            if self._cut_chars:
                return FinishReason.STOP
        if self._cycle and self._cycle.push(self._ids) and not is_too_early:
            return FinishReason.REPETITION
        return FinishReason.LENGTH if len(self._ids) >= self._row.max_new_tokens else None

    def _stopped_chars(self, token: int, *, is_too_early: bool) -> int:
        """Return how many characters to cut if this token completes a stop string; else 0."""
        if token in self._special_ids:
            return 0  # adds no text
        self._text_ids.append(token)
        if is_too_early:
            return 0
        # Extend the tail until it starts at a character boundary, and find the text before this
        # token up to the last complete character.
        tail = self._text_ids[-self._num_tail :]
        text = self._tokenizer.decode(tail)
        for num_extra in range(1, _MAX_BYTES):
            if not text.startswith(_REPLACEMENT):
                break
            tail = self._text_ids[-self._num_tail - num_extra :]
            text = self._tokenizer.decode(tail)
        before = _REPLACEMENT
        for num_new in range(1, _MAX_BYTES + 1):
            if not before.endswith(_REPLACEMENT):
                break
            before = self._tokenizer.decode(tail[:-num_new])
        num_old = len(before)
        stops = self._row.stop
        starts = [text.find(stop, max(0, num_old - len(stop) + 1)) for stop in stops]
        return max((len(text) - start for start in starts if start >= 0), default=0)


class CycleDetector:
    """Detects that a growing list of tokens ends in a cycle; see `MIN_CYCLE_PERIODS`."""

    def __init__(self) -> None:
        self._last_places: dict[int, int] = {}
        self._num_recurring = 0

    def push(self, ids: list[int]) -> bool:
        """Whether `ids` ends in a cycle. Call it after each token appended to `ids`."""
        place = len(ids) - 1
        last = self._last_places.get(ids[-1], -1 - MAX_PERIOD)
        self._last_places[ids[-1]] = place
        if place - last > MAX_PERIOD:
            self._num_recurring = 0
            return False
        # In a cycle every token recurs within a period. Ordinary text rarely reaches the loop.
        self._num_recurring += 1
        if self._num_recurring < MIN_CYCLE_TOKENS - MAX_PERIOD:
            return False
        return any(_is_cycle(ids, period) for period in range(1, MAX_PERIOD + 1))


def _is_cycle(ids: list[int], period: int) -> bool:
    covered = max(MIN_CYCLE_TOKENS, MIN_CYCLE_PERIODS * period)
    return (
        len(ids) >= covered
        and ids[-1] == ids[-1 - period]
        and ids[-covered] == ids[-covered + period]
        and ids[-covered + period :] == ids[-covered:-period]
    )


def not_finite(num_tokens: int) -> Failure:
    """Return the failure of a row whose logits are not finite after `num_tokens` tokens."""
    return Failure(
        error_type=ErrorType.ENGINE,
        message=f"the model's logits are not finite after {num_tokens} tokens; "
        "another model.dtype may help (float32, or bfloat16 instead of float16)",
    )
