"""A model of which each of several processes holds a part of every layer (tensor parallelism).

All of them must run the same steps on the same rows. So one leads: it forms the batches, chooses
each token, and decides where each row ends. The others are given the batch and, step by step, the
tokens: nothing that depends on time, memory or rounding is decided twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from batchvlm.config import JobConfig
from batchvlm.engine.faults import described
from batchvlm.errors import ReplicaError
from batchvlm.records import Array

log = logging.getLogger(__name__)

# Shape legend: B rows of the batch, T padded prompt length plus tokens generated so far,
# V vocabulary.

_LOAD_S = 3600.0
"""One process may read weights for so much longer than the leader."""
_FAIL_S = 10.0
"""One process may fail to load so much later than the leader."""
_STEP_S = 60.0
"""One process may end a batch so much later than the leader; behind one that failed, none comes."""
_COLLECTIVE_S = 900.0
"""Torch gives up after this; a process that has ended is known of long before."""

Run = Callable[[Mapping[str, Tensor], int, LogitsProcessor, StoppingCriteria], Tensor]
"""Answers one batch: tensors on the CPU, the most new tokens, and what is decided at each step."""


class Channel(Protocol):
    """A process's connection with the others of its replica."""

    @property
    def rank(self) -> int:
        """0 leads."""

    @property
    def size(self) -> int: ...

    @property
    def folder(self) -> Path:
        """Where only they can write."""


class ToFollowers(Channel, Protocol):
    """The leader's."""

    def send(self, message: object) -> None: ...

    def gather(self, limit_s: float) -> str | None: ...


class ToLeader(Channel, Protocol):
    """The others'."""

    def receive(self) -> Any: ...

    def answer(self, text: str | None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Meeting:
    """Asks the others whether they are where the leader is, after a batch that failed."""

    number: int
    """That the next thing sent through the process group shall be."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What the others need of a batch. Arrays, since tensors would be sent by shared memory."""

    arrays: dict[str, Array]
    max_new_tokens: int


class Team:
    """The leader's view of the processes that answer with it.

    Args:
        channel: to all of them.
        device: of this process.
    """

    def __init__(self, channel: ToFollowers, *, device: str) -> None:
        self._channel = channel
        self._device = device
        self._num_meetings = 0

    @contextmanager
    def loading(self, cfg: JobConfig) -> Iterator[None]:
        """Let the others load their parts while this process loads its own.

        Raises:
            RuntimeError: one of them cannot.
        """
        self._channel.send(cfg)
        try:
            _form_group(self._channel, self._device)
            with _numbered(self._device):
                yield
        except Exception:
            # The others mostly fail alike; meanwhile the group's file must not be gone.
            with suppress(ReplicaError):
                self._channel.gather(_FAIL_S)
            raise
        if text := self._channel.gather(_LOAD_S):
            raise RuntimeError(text)

    def run(
        self,
        run: Run,
        batch: Mapping[str, Tensor],
        max_new_tokens: int,
        processor: LogitsProcessor,
        criterion: StoppingCriteria,
    ) -> Tensor:
        """Answer a batch together; see `Run`.

        Raises:
            Exception: what answering raised, here or, as a RuntimeError, at one of the others.
            ReplicaError: one of them has ended, or is no more at the same step.
        """
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        self._channel.send(_Batch(arrays=arrays, max_new_tokens=max_new_tokens))
        try:
            ids_BT = run(batch, max_new_tokens, _TokensSaid(processor), _EndsSaid(criterion))
        except Exception:
            # The others failed alike, or wait for a step that will not come.
            self._channel.gather(_STEP_S)
            self._meet()
            raise
        if text := self._channel.gather(_STEP_S):
            self._meet()
            raise RuntimeError(text)
        return ids_BT

    def _meet(self) -> None:
        """See that all are at the same step again, so that the next batch may begin.

        Raises:
            ReplicaError: they are not, and never will be.
        """
        self._num_meetings += 1
        self._channel.send(_Meeting(number=self._num_meetings))
        try:
            dist.broadcast(torch.tensor([self._num_meetings], device=self._device), src=0)
            text = self._channel.gather(_STEP_S)
        except ReplicaError:
            raise
        except Exception as error:
            text = described(error)
        if text:
            raise ReplicaError(f"processes that hold the model together fell out of step: {text}")


def follow(channel: ToLeader, *, device: str, load: Callable[[JobConfig], Run]) -> None:
    """Load a part of the leader's model and answer its batches with it, until it says that all is
    done.

    Args:
        load: loads the model of a job.

    Raises:
        ReplicaError: the leader has ended.
    """
    cfg = channel.receive()
    if cfg is None:
        return
    try:
        _form_group(channel, device)
        with _numbered(device):
            run = load(cfg)
    except Exception as error:
        channel.answer(described(error))
        channel.receive()
        return
    channel.answer(None)
    log.info("process %d of %d holds its part of the model", channel.rank, channel.size)
    while (message := channel.receive()) is not None:
        try:
            if isinstance(message, _Meeting):
                _keep(message, device)
            else:
                _answer(message, run)
        except Exception as error:
            channel.answer(described(error))
        else:
            channel.answer(None)


def _answer(batch: _Batch, run: Run) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
    with torch.inference_mode():
        run(tensors, batch.max_new_tokens, _TokensHeard(), _EndsHeard())


def _keep(meeting: _Meeting, device: str) -> None:
    heard = torch.zeros(1, dtype=torch.long, device=device)
    dist.broadcast(heard, src=0)
    if heard.item() != meeting.number:
        raise RuntimeError(f"{meeting.number} was to come, and {heard.item()} came")


def _form_group(channel: Channel, device: str) -> None:
    """Make torch's process group of the replica; it is this process's only one."""
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    where = torch.device(device)
    if dist.is_initialized():
        dist.destroy_process_group()  # of the job before, in a sweep
    dist.init_process_group(
        dist.get_default_backend_for_device(where),
        store=FileStore(str(channel.folder / "group"), channel.size),
        rank=channel.rank,
        world_size=channel.size,
        timeout=timedelta(seconds=_COLLECTIVE_S),
        device_id=where if where.type == "cuda" else None,
    )


@contextmanager
def _numbered(device: str) -> Iterator[None]:
    """Let transformers find the device by a variable that srun does not set, and others heed."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(torch.device(device).index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


class _TokensSaid(LogitsProcessor):
    """Tells the others which token each row has got."""

    def __init__(self, inner: LogitsProcessor) -> None:
        self._inner = inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with _told_of_errors(len(scores), scores.device):
            scores = self._inner(input_ids, scores)
        _say(scores.argmax(-1))
        return scores


class _EndsSaid(StoppingCriteria):
    """Tells the others which rows have ended."""

    def __init__(self, inner: Any) -> None:
        self.eos_token_id = inner.eos_token_id
        self._inner = inner

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        with _told_of_errors(len(input_ids), input_ids.device):
            is_done_B: Tensor = self._inner(input_ids, scores, **kwargs)
        _say(is_done_B.long())
        return is_done_B


class _TokensHeard(LogitsProcessor):
    """Lets `generate()`'s argmax find the leader's tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids_B = _hear(len(scores), scores.device)
        return scores.scatter(-1, ids_B[:, None], torch.inf)


class _EndsHeard(StoppingCriteria):
    """Ends rows where the leader does."""

    # generate() looks for this name to know that finished rows must be padded.
    eos_token_id = torch.tensor([-1])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return _hear(len(input_ids), input_ids.device).bool()


class _BrokenOffError(Exception):
    """The leader has given a batch up."""


_GOES_ON, _IS_BROKEN_OFF = 0, 1


def _say(values_B: Tensor) -> None:
    dist.broadcast(torch.cat([values_B.new_tensor([_GOES_ON]), values_B]), src=0)


def _hear(num_rows: int, device: torch.device) -> Tensor:
    said = torch.empty(1 + num_rows, dtype=torch.long, device=device)
    dist.broadcast(said, src=0)
    if said[0] == _IS_BROKEN_OFF:
        raise _BrokenOffError("the leader has given the batch up")
    return said[1:]


@contextmanager
def _told_of_errors(num_rows: int, device: torch.device) -> Iterator[None]:
    """Let the others give a batch up that this process gives up between two steps of the model."""
    try:
        yield
    except Exception:
        said = torch.full((1 + num_rows,), _IS_BROKEN_OFF, dtype=torch.long, device=device)
        dist.broadcast(said, src=0)
        raise
