"""Rows in decoding, and their tokens on the way from the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batchvlm.engine.sampling import Choice
from batchvlm.engine.stops import RowStop
from batchvlm.engine.waiting import PreparedRow
from batchvlm.records import Sample


@dataclass(slots=True, eq=False)
class Row:
    """A row whose prompt is computed."""

    prepared: PreparedRow
    stop: RowStop
    length: int
    """Tokens that its slot must hold."""
    max_new_tokens: int
    num_chosen: int = 0
    """Tokens chosen for it, read by the host or not."""
    is_over: bool = False
    """Whether its last token is chosen, so that it needs no slot."""
    is_answered: bool = False

    @property
    def sample(self) -> Sample:
        return self.prepared.sample

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are computed: all but the newest chosen one."""
        return self.sample.prompt_tokens + max(0, self.num_chosen - 1)


class Chosen:
    """Tokens on their way to the host, one for each of some rows."""

    def __init__(self, rows: Sequence[Row], choice: Choice) -> None:
        self.rows = rows
        tensors = [choice.ids_B, choice.is_finite_B]
        if choice.logprobs_B is not None:
            tensors.append(choice.logprobs_B)
        self._event: torch.cuda.Event | None = None
        if choice.ids_B.is_cuda:
            # Into pinned memory, or the copy would wait for the device.
            pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
            for target, tensor in zip(pinned, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
            tensors = pinned
        self._tensors = tensors

    def read(self) -> list[tuple[Row, int, bool, float | None]]:
        """Row, token, whether its logit is a finite number, and its log-probability if asked."""
        if self._event is not None:
            self._event.synchronize()
        ids, is_finite, *logprobs = (tensor.tolist() for tensor in self._tensors)
        by_row = logprobs[0] if logprobs else [None] * len(ids)
        return list(zip(self.rows, ids, is_finite, by_row, strict=True))
