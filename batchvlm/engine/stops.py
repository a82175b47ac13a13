"""When one row's answer is over, and what it then says: token by token, on the host."""

from __future__ import annotations

from typing import Any

from batchvlm.errors import ErrorType
from batchvlm.records import Completion, Failure, FinishReason, Generation

MAX_PERIOD = 64
MIN_CYCLE_TOKENS = 512
MIN_CYCLE_PERIODS = 16
"""A row is caught in a cycle of p <= MAX_PERIOD tokens when its last `max(MIN_CYCLE_TOKENS,
MIN_CYCLE_PERIODS * p)` tokens are nothing else."""
_MAX_BYTES = 4
"""Of one character in UTF-8."""
_HALF = "\ufffd"
"""What tokens decode to that hold a character in part. Tokens of one byte each (`<0x0A>`) all do
that stand in one row with such a part."""


class RowStop:
    """Ends a row by its limit, its stop strings, a cycle and, unless ignored, the model's EOS.

    Args:
        row: the row's settings.
        eos_ids: ids that end a sequence.
        tokenizer: the tokenizer that decodes the answer.
        special_ids: ids that it leaves out of the text.
    """

    def __init__(
        self,
        row: Generation,
        eos_ids: frozenset[int],
        tokenizer: Any,
        special_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._row = row
        self._special_ids = special_ids
        self._eos_ids = frozenset[int]() if row.ignore_eos else eos_ids
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._reason: FinishReason | None = None
        self._has_eos = False
        self._cut_chars = 0
        heeds_cycles = row.stop_on_repetition and not row.ignore_eos
        self._cycle = CycleDetector() if heeds_cycles else None
        if row.stop:
            # A stop string may begin and end inside tokens, so look at text, but only at its end:
            # no token of text adds less than a byte, hence as many as the longest has bytes.
            longest = max(len(stop.encode()) for stop in row.stop)
            self._num_tail = longest + 1
            self._said: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Tokens so far, one that ended the answer included."""
        return len(self._ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids so far, one that ended the answer included."""
        return tuple(self._ids)

    def push(self, token: int, logprob: float | None = None) -> bool:
        """Take the next token.

        Args:
            token: its id.
            logprob: its log-probability; kept where the row asks for it.

        Returns:
            Whether the answer is over with this token.
        """
        assert self._reason is None, "the answer is over"
        self._ids.append(token)
        if self._row.logprobs:
            assert logprob is not None, "the row asks for log-probabilities"
            self._logprobs.append(logprob)
        self._reason = self._find_reason(token)
        return self._reason is not None

    def completion(self, row_index: int, latency_s: float) -> Completion:
        """What the row says: with the EOS among its ids but not in its text, cut at a stop string.

        Args:
            row_index: the sample's row.
            latency_s: seconds until the answer was complete.
        """
        # An id that ends answers need not be special: its text is left out by place.
        said = self._ids[:-1] if self._has_eos else self._ids
        text = self._tokenizer.decode(said, skip_special_tokens=True)
        return Completion(
            row_index=row_index,
            token_ids=self.token_ids,
            logprobs=tuple(self._logprobs) if self._row.logprobs else None,
            text=text[: len(text) - self._cut_chars],
            finish_reason=self._reason or FinishReason.LENGTH,
            latency_s=latency_s,
        )

    def _find_reason(self, token: int) -> FinishReason | None:
        if token in self._eos_ids:
            self._has_eos = True
            return FinishReason.STOP
        is_early = len(self._ids) < self._row.min_new_tokens
        if self._row.stop:
            self._cut_chars = self._stopped_chars(token, is_early=is_early)
            if self._cut_chars:
                return FinishReason.STOP
        if self._cycle and self._cycle.push(self._ids) and not is_early:
            return FinishReason.REPETITION
        return FinishReason.LENGTH if len(self._ids) >= self._row.max_new_tokens else None

    def _stopped_chars(self, token: int, *, is_early: bool) -> int:
        """How much a stop string that this token completes takes off the text's end; 0: none."""
        if token in self._special_ids:
            return 0  # adds no text
        self._said.append(token)
        if is_early:
            return 0
        # Neither what is looked at begins, nor what was there before it ends, within a character.
        tail = self._said[-self._num_tail :]
        text = self._tokenizer.decode(tail)
        for num_more in range(1, _MAX_BYTES):
            if not text.startswith(_HALF):
                break
            tail = self._said[-self._num_tail - num_more :]
            text = self._tokenizer.decode(tail)
        before = _HALF
        for num_new in range(1, _MAX_BYTES + 1):
            if not before.endswith(_HALF):
                break
            before = self._tokenizer.decode(tail[:-num_new])
        num_old = len(before.rstrip(_HALF))
        stops = self._row.stop
        starts = [text.find(stop, max(0, num_old - len(stop) + 1)) for stop in stops]
        return max((len(text) - start for start in starts if start >= 0), default=0)


class CycleDetector:
    """Tells when the end of a growing list of tokens is a cycle; see `MAX_PERIOD`."""

    def __init__(self) -> None:
        self._last_places: dict[int, int] = {}
        self._num_recurring = 0

    def push(self, ids: list[int]) -> bool:
        """Whether `ids`, one token longer than at the last call, ends in a cycle."""
        place = len(ids) - 1
        last = self._last_places.get(ids[-1], -1 - MAX_PERIOD)
        self._last_places[ids[-1]] = place
        if place - last > MAX_PERIOD:
            self._num_recurring = 0
            return False
        # In a cycle every token recurs within a period. Ordinary text breaks that off long before
        # the loop below costs anything.
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
    """The failure of a row whose logits were no numbers after so many tokens."""
    return Failure(
        error_type=ErrorType.ENGINE,
        message=f"the model's logits are not finite after {num_tokens} tokens; "
        "another model.dtype may help (float32, or bfloat16 instead of float16)",
    )
