"""Records -> samples in worker processes, in order, a bounded number under way.

A worker that hangs or dies costs the row it was at; the pool replaces it and goes on.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import RLock
from types import TracebackType
from typing import Any, Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool
from pebble.pool.base_pool import Task
from pebble.pool.process import TaskManager

from batchvlm.errors import BatchvlmError, ErrorType
from batchvlm.preprocess import Preprocessor, PreprocessSpec
from batchvlm.records import Failure, Record, Sample
from batchvlm.runtime.clock import RunningClock
from batchvlm.runtime.launch import num_cores
from batchvlm.runtime.pipes import array_pipe

# Enough that a worker never waits for the next record, few enough to bound memory.
_UNDER_WAY_PER_WORKER = 16
_PAUSE_S = 0.02
"""Between two looks whether there is a record."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TERMINATED = {signal.SIGTERM, -signal.SIGTERM}
"""Exit codes of a worker that somebody told to end, by Pebble's handler and without it."""
_MAX_BREAKS = 3
"""How often in a row the pool may break before any row is prepared."""

_UnderWay = deque[tuple[Record, ProcessFuture[Sample | Failure] | None]]
log = logging.getLogger(__name__)

_preprocessor: Preprocessor | None = None


def default_num_workers() -> int:
    """One worker for every core but the engine's own, 16 at most; ranks share the cores."""
    return max(1, min(16, num_cores() - 1))


class _WorkerStopped(Exception):
    """A worker was told to end, as SLURM tells all processes of a job: no row is at fault."""


class WorkerPool:
    """Prepares records; a context manager that leaves no process behind.

    Entering it starts the processes; they are ready some seconds later.

    Args:
        spec: what the workers prepare for.
        num_workers: processes; 0 prepares in the calling thread, without a time limit.
        timeout_s: seconds that one record may take.
    """

    def __init__(self, spec: PreprocessSpec, *, num_workers: int, timeout_s: float) -> None:
        self._spec = spec
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._under_way = num_workers * _UNDER_WAY_PER_WORKER
        self._local = Preprocessor(spec) if num_workers == 0 else None
        self._pool: ProcessPool | None = None
        self._context: _PoolContext | None = None
        # Signals interrupt the main thread: a pool that is half started cannot be stopped, and its
        # processes would find nobody. And the kernel ends them with the thread that started them,
        # so this one lasts as long as they do.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="starter")
        self._num_breaks = 0
        self._has_prepared = False
        self._is_left = False

    def __enter__(self) -> Self:
        if self._local is None:
            try:
                self._starter.submit(self._open_pool).result()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def _open_pool(self) -> None:
        # Not forked: the parent has threads, which a fork would leave in the middle of a lock.
        self._context = _PoolContext()
        self._pool = ProcessPool(
            max_workers=self._num_workers,
            context=self._context,
            initializer=_start_worker,
            initargs=(self._spec, os.getpid()),
        )
        manager = self._pool._pool_manager
        manager.task_manager = _TimedTasks(manager.task_manager.task_done_callback)
        # The pool starts its processes with the first task: let them load their libraries.
        try:
            with _deaf_children():
                self._pool.schedule(_do_nothing)
        except OSError as error:
            # Their locks lie in /dev/shm, whatever the error makes one think of.
            raise BatchvlmError(
                f"worker processes cannot be started: {error.strerror}",
                hint="see to the room in /dev/shm and the limits on processes and open files, or "
                "set runtime.num_workers=0",
            ) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_left = True
        self._starter.submit(lambda: None).result()  # whatever it was starting is there
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
        self._starter.shutdown()

    def prepare(
        self, records: Iterable[Record | None]
    ) -> Iterator[tuple[Record, Sample | Failure]]:
        """Yield every record with its sample or failure, in the order of the records.

        A None says that there is no record yet: what is under way goes on its way meanwhile.
        """
        under_way: _UnderWay = deque()
        for record in records:
            if record is None:
                if under_way:
                    yield self._oldest(under_way)
                else:
                    time.sleep(_PAUSE_S)
                continue
            if self._local is not None:
                yield record, self._local.prepare(record)
                continue
            under_way.append((record, self._schedule(record)))
            if len(under_way) >= self._under_way:
                yield self._oldest(under_way)
        while under_way:
            yield self._oldest(under_way)

    def _schedule(self, record: Record) -> ProcessFuture[Sample | Failure] | None:
        assert self._pool is not None
        try:
            return self._pool.schedule(_prepare, args=(record,), timeout=self._timeout_s)
        except RuntimeError:
            return None  # the pool is broken, as its oldest task is about to say

    def _oldest(self, under_way: _UnderWay) -> tuple[Record, Sample | Failure]:
        """Take the oldest record's outcome; where the pool broke, start all over in a new one."""
        record, future = under_way[0]
        while True:
            try:
                if future is None:
                    raise BrokenProcessPool("closed")
                outcome = self._outcome(future)
            except _WorkerStopped as error:
                if self._num_breaks >= _MAX_BREAKS:
                    raise BatchvlmError(
                        f"worker processes were told to end {self._num_breaks + 1} times in a row",
                        hint="see who sends SIGTERM to them, and run the same command again",
                    ) from error
                self._num_breaks += 1
                future = self._schedule(record)
                under_way[0] = (record, future)
                continue
            except BrokenProcessPool as error:
                self._mend(error, under_way)
                record, future = under_way[0]
                continue
            self._num_breaks = 0
            self._has_prepared = True
            under_way.popleft()
            return record, outcome

    def _mend(self, error: BrokenProcessPool, under_way: _UnderWay) -> None:
        # A worker that died between two rows, or before its first: no row is at fault.
        assert self._pool is not None
        if self._is_left:
            raise error
        self._num_breaks += 1
        if self._num_breaks > _MAX_BREAKS:
            raise BatchvlmError(
                f"worker processes died {self._num_breaks} times in a row without preparing a row",
                hint="runtime.num_workers=0 prepares in this process and shows why",
            ) from error
        if self._has_prepared:
            log.warning("worker processes died between rows; starting new ones")
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()
        self._starter.submit(self._open_pool).result()
        for place, (record, _) in enumerate(under_way):
            under_way[place] = (record, self._schedule(record))

    def _outcome(self, future: ProcessFuture[Sample | Failure]) -> Sample | Failure:
        try:
            return future.result()
        except BrokenProcessPool:
            raise
        except TimeoutError:
            return Failure(
                error_type=ErrorType.TIMEOUT,
                message="preparing the row took longer than "
                f"runtime.sample_timeout_s={self._timeout_s:g}",
            )
        except ProcessExpired as error:
            if error.exitcode in _TERMINATED:
                raise _WorkerStopped from error
            return Failure(
                error_type=ErrorType.PREPROCESS,
                message=f"the worker process died on this row (exit code {error.exitcode})",
            )
        except CancelledError:
            raise
        except Exception as error:  # the record or the sample could not cross the process border
            text = " ".join(str(error).split())[:200]
            return Failure(
                error_type=ErrorType.PREPROCESS, message=f"{type(error).__name__}: {text}"
            )


class _TimedTasks(TaskManager):
    """Pebble's tasks, whose limit counts the seconds for which this process runs.

    Pebble reads the time of day: a job that was suspended, or a clock that was set, would fail each
    row that a worker was at.
    """

    def __init__(self, task_done_callback: Callable[[], object]) -> None:
        super().__init__(task_done_callback)
        self._clock = RunningClock()

    def task_start(self, task_id: int, worker_id: int | None) -> None:
        super().task_start(task_id, worker_id)
        if task := self.tasks.get(task_id):
            task.timestamp = self._clock()

    def timeout(self, task: Task) -> bool:  # type: ignore[override]
        """Whether a task has taken too long. Pebble asks all the time."""
        if task.timeout is None or not task.started:
            return False
        return self._clock() - task.timestamp > task.timeout


class _PoolContext(SpawnContext):
    """Spawns processes, talks to them by pipes for arrays, and keeps the locks it made for them.

    Pebble drops its locks before it stops its processes: one that is still loading would not find
    them any more and print a traceback.
    """

    def __init__(self) -> None:
        super().__init__()
        self._locks: list[RLock] = []

    def Pipe(self, duplex: bool = True) -> tuple[Any, Any]:
        return super().Pipe(duplex) if duplex else array_pipe()

    def RLock(self) -> RLock:
        lock = super().RLock()
        self._locks.append(lock)
        return lock


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Keep a terminal's signals from processes, and threads, that are started here.

    It sends Ctrl-C, and its own end, to all. One that is loading its libraries would print a
    traceback; the parent, whose threads from before still take them, tells them when to stop.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    # Started now: it would let Ctrl-C through again when it starts in between.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(spec: PreprocessSpec, parent: int) -> None:
    _leave_with(parent)
    if spec.sent_as is None:
        import torch

        torch.set_num_threads(1)  # the workers share the cores with the engine
    global _preprocessor
    try:
        _preprocessor = Preprocessor(spec)
    except BatchvlmError:
        # The engine loads the same processor and says it in one line; Pebble would print all of it.
        os._exit(1)


def _leave_with(parent: int) -> None:
    """Make this process end when its parent does: one that is killed cannot stop its workers."""
    # Meant for the parent alone: SLURM sends it to every process of a step.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        # The kernel sees to it, even where a decoder hangs with Python's lock held.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    # Where the kernel does not, and for a parent that died before it was asked.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _do_nothing() -> None:
    pass


def _prepare(record: Record) -> Sample | Failure:
    assert _preprocessor is not None
    return _preprocessor.prepare(record)
