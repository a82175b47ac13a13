"""Tensor parallelism: each process of a replica holds a shard of every layer.

All processes must run the same steps on the same rows. The leader forms batches, chooses tokens and
ends rows. It sends each batch to the followers, and broadcasts tokens and ends at every step, so
that no decision that depends on time, memory or rounding is made twice.
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
from batchvlm.errors import ReplicaError
from batchvlm.records import Array
from batchvlm.words import described

log = logging.getLogger(__name__)

# Shape legend: B rows of the batch, T padded prompt length plus tokens generated so far,
# V vocabulary.

_LOAD_TIMEOUT_S = 3600.0
"""How long the loaded leader waits for its followers to load."""
_FAIL_TIMEOUT_S = 10.0
"""How long a leader that failed to load waits for its followers."""
_BATCH_TIMEOUT_S = 60.0
"""How long the leader waits for its followers after a batch."""
_COLLECTIVE_TIMEOUT_S = 900.0
"""Timeout of torch's collectives. A process that ends is noticed long before."""

Run = Callable[[Mapping[str, Tensor], int, LogitsProcessor, StoppingCriteria], Tensor]
"""Runs one batch: CPU tensors, `max_new_tokens`, and what chooses tokens and ends rows."""


class Channel(Protocol):
    """A process's connections to the others of its replica."""

    @property
    def rank(self) -> int:
        """Rank within the replica; 0 is the leader."""

    @property
    def size(self) -> int: ...

    @property
    def folder(self) -> Path:
        """A folder to which only this user has access."""


class ToFollowers(Channel, Protocol):
    """The leader's channel."""

    def send(self, message: object) -> None: ...

    def gather(self, limit_s: float) -> str | None: ...


class ToLeader(Channel, Protocol):
    """A follower's channel."""

    def receive(self) -> Any: ...

    def answer(self, text: str | None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _SyncCheck:
    """Sent after a failed batch, to check that all processes are at the same step."""

    number: int
    """Value that the next broadcast of the process group must have."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A batch, as sent to the followers. Arrays, because tensors would go through shared
    memory."""

    arrays: dict[str, Array]
    max_new_tokens: int


class Team:
    """Controls the followers, on the leader.

    Args:
        channel: connections to the followers.
        device: device of this process.
    """

    def __init__(self, channel: ToFollowers, *, device: str) -> None:
        self._channel = channel
        self._device = device
        self._num_sync_checks = 0

    @contextmanager
    def loading(self, cfg: JobConfig) -> Iterator[None]:
        """Make the followers load their shards while the body loads this process's.

        Raises:
            RuntimeError: a follower failed to load.
            ReplicaError: a follower has ended.
        """
        self._channel.send(cfg)
        try:
            _init_process_group(self._channel, self._device)
            with _local_rank_set(self._device):
                yield
        except Exception:
            # The followers usually fail in the same way. The group's file must exist until then.
            with suppress(ReplicaError):
                self._channel.gather(_FAIL_TIMEOUT_S)
            raise
        if text := self._channel.gather(_LOAD_TIMEOUT_S):
            raise RuntimeError(text)

    def run(
        self,
        run: Run,
        batch: Mapping[str, Tensor],
        max_new_tokens: int,
        processor: LogitsProcessor,
        criterion: StoppingCriteria,
    ) -> Tensor:
        """Run a batch on all processes of the replica; see `Run`.

        Raises:
            Exception: raised by the run here.
            RuntimeError: the run failed on a follower.
            ReplicaError: a follower has ended, or is no longer at the same step.
        """
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        self._channel.send(_Batch(arrays=arrays, max_new_tokens=max_new_tokens))
        try:
            ids_BT = run(
                batch, max_new_tokens, _TokenBroadcaster(processor), _EndBroadcaster(criterion)
            )
        except Exception:
            # The followers failed too, were aborted, or hang in a collective (`gather` times out).
            self._channel.gather(_BATCH_TIMEOUT_S)
            self._check_sync()
            raise
        if text := self._channel.gather(_BATCH_TIMEOUT_S):
            self._check_sync()
            raise RuntimeError(text)
        return ids_BT

    def _check_sync(self) -> None:
        """Check after a failed batch that all processes are in step again.

        Raises:
            ReplicaError: they are not, which is final.
        """
        self._num_sync_checks += 1
        self._channel.send(_SyncCheck(number=self._num_sync_checks))
        try:
            dist.broadcast(torch.tensor([self._num_sync_checks], device=self._device), src=0)
            text = self._channel.gather(_BATCH_TIMEOUT_S)
        except ReplicaError:
            raise
        except Exception as error:
            text = described(error)
        if text:
            raise ReplicaError(f"processes that hold the model together fell out of step: {text}")


def follow(channel: ToLeader, *, device: str, load: Callable[[JobConfig], Run]) -> None:
    """Load this process's shard of the model, and run the leader's batches until the job is done.

    Args:
        load: loads the model of a job.

    Raises:
        ReplicaError: the leader has ended.
    """
    cfg = channel.receive()
    if cfg is None:
        return
    try:
        _init_process_group(channel, device)
        with _local_rank_set(device):
            run = load(cfg)
    except Exception as error:
        channel.answer(described(error))
        channel.receive()
        return
    channel.answer(None)
    log.info("process %d of %d holds its part of the model", channel.rank, channel.size)
    while (message := channel.receive()) is not None:
        try:
            if isinstance(message, _SyncCheck):
                _answer_sync_check(message, device)
            else:
                _run_batch(message, run)
        except Exception as error:
            channel.answer(described(error))
        else:
            channel.answer(None)


def _run_batch(batch: _Batch, run: Run) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
    with torch.inference_mode():
        run(tensors, batch.max_new_tokens, _TokenReceiver(), _EndReceiver())


def _answer_sync_check(check: _SyncCheck, device: str) -> None:
    received = torch.zeros(1, dtype=torch.long, device=device)
    dist.broadcast(received, src=0)
    if received.item() != check.number:
        raise RuntimeError(f"expected broadcast {check.number}, got {received.item()}")


def _init_process_group(channel: Channel, device: str) -> None:
    """Create the default torch process group, which consists of the replica."""
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    where = torch.device(device)
    if dist.is_initialized():
        dist.destroy_process_group()  # left from the previous job of a sweep
    dist.init_process_group(
        dist.get_default_backend_for_device(where),
        store=FileStore(str(channel.folder / "group"), channel.size),
        rank=channel.rank,
        world_size=channel.size,
        timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
        device_id=where if where.type == "cuda" else None,
    )


@contextmanager
def _local_rank_set(device: str) -> Iterator[None]:
    """Set LOCAL_RANK, which srun does not, to the device's index while transformers loads."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(torch.device(device).index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


class _TokenBroadcaster(LogitsProcessor):
    """Broadcasts the chosen token of each row to the followers."""

    def __init__(self, inner: LogitsProcessor) -> None:
        self._inner = inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with _abort_on_error(len(scores), scores.device):
            scores = self._inner(input_ids, scores)
        _broadcast(scores.argmax(-1))
        return scores


class _EndBroadcaster(StoppingCriteria):
    """Broadcasts to the followers which rows have ended."""

    def __init__(self, inner: Any) -> None:
        self.eos_token_id = inner.eos_token_id
        self._inner = inner

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        with _abort_on_error(len(input_ids), input_ids.device):
            is_done_B: Tensor = self._inner(input_ids, scores, **kwargs)
        _broadcast(is_done_B.long())
        return is_done_B


class _TokenReceiver(LogitsProcessor):
    """Sets the scores of the leader's tokens to infinity, so that `generate()` picks them."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids_B = _receive_broadcast(len(scores), scores.device)
        return scores.scatter(-1, ids_B[:, None], torch.inf)


class _EndReceiver(StoppingCriteria):
    """Ends the rows that the leader ends."""

    # generate() checks for this attribute to decide whether to pad finished rows.
    eos_token_id = torch.tensor([-1])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return _receive_broadcast(len(input_ids), input_ids.device).bool()


class _BatchAbortedError(Exception):
    """The leader has aborted the batch."""


_CONTINUE, _ABORT = 0, 1


def _broadcast(values_B: Tensor) -> None:
    dist.broadcast(torch.cat([values_B.new_tensor([_CONTINUE]), values_B]), src=0)


def _receive_broadcast(num_rows: int, device: torch.device) -> Tensor:
    message = torch.empty(1 + num_rows, dtype=torch.long, device=device)
    dist.broadcast(message, src=0)
    if message[0] == _ABORT:
        raise _BatchAbortedError("the leader has aborted the batch")
    return message[1:]


@contextmanager
def _abort_on_error(num_rows: int, device: torch.device) -> Iterator[None]:
    """Broadcast an abort to the followers if the body, between two model steps, raises."""
    try:
        yield
    except Exception:
        message = torch.full((1 + num_rows,), _ABORT, dtype=torch.long, device=device)
        dist.broadcast(message, src=0)
        raise
