"""Records -> samples in worker processes, in order, with a bounded number in flight.

A worker that hangs or dies fails only the row it was preparing; the pool replaces the worker.
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
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import RLock
from typing import Any, Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool
from pebble.pool.base_pool import PoolContext, Task
from pebble.pool.process import PoolManager, TaskManager

from batchvlm.errors import BatchvlmError, ErrorType
from batchvlm.preprocess.preprocessor import Preprocessor, PreprocessSpec
from batchvlm.records import Failure, Record, Sample
from batchvlm.runtime.clock import RunningClock
from batchvlm.runtime.launch import num_cores
from batchvlm.runtime.pipes import array_pipe
from batchvlm.words import described

# Enough that a worker never waits for the next record, few enough to bound memory.
_IN_FLIGHT_PER_WORKER = 16
_POLL_S = 0.02
"""Seconds between two polls for a record."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SERVER_DIED = 255
"""Exit code of a worker whose server has died, as multiprocessing has it."""
_STOPPED = {signal.SIGTERM, -signal.SIGTERM, _SERVER_DIED}
"""Exit codes of a worker that got SIGTERM, with Pebble's handler and without it, or was killed with
its server."""
_MAX_BREAKS = 3
"""How many times in a row the pool may break without preparing a row."""

_InFlight = deque[tuple[Record, ProcessFuture[Sample | Failure] | None]]
log = logging.getLogger(__name__)

_preprocessor: Preprocessor | None = None


def default_num_workers() -> int:
    """Return one worker per core of this rank, less one core for the engine; between 1 and 16."""
    return max(1, min(16, num_cores() - 1))


class _WorkerStopped(Exception):
    """A worker was ended from outside: the row is not at fault."""


class WorkerPool:
    """Prepares records in worker processes, which end with the context.

    Entering starts the processes in the background; they are ready some seconds later.

    Args:
        spec: settings of the workers' `Preprocessor`.
        num_workers: number of processes; 0 prepares in the calling thread, without a timeout.
        timeout_s: timeout of one record, in seconds.
    """

    def __init__(self, spec: PreprocessSpec, *, num_workers: int, timeout_s: float) -> None:
        self._spec = spec
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._max_in_flight = num_workers * _IN_FLIGHT_PER_WORKER
        self._local = Preprocessor(spec) if num_workers == 0 else None
        self._pool: ProcessPool | None = None
        self._context: _PoolContext | None = None
        # Signals interrupt the main thread, and a pool that is half started cannot be stopped, so
        # the pool is started in a thread of its own. It takes as long as the server's imports.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="starter")
        self._opened: Future[None] | None = None
        self._num_breaks = 0
        self._has_prepared = False
        self._is_closed = False

    def __enter__(self) -> Self:
        if self._local is None:
            self._opened = self._starter.submit(self._open_pool)
        return self

    def _open_pool(self) -> None:
        # Not forked from this process: it has threads, and a fork could copy a lock that one of
        # them holds. Their server has none, and imports for all of them.
        has_model = self._spec.sent_as is None
        self._context = _PoolContext()
        self._context.set_forkserver_preload(
            ["batchvlm.runtime.imports" if has_model else "batchvlm.preprocess.preprocessor"]
        )
        self._pool = ProcessPool(
            max_workers=self._num_workers,
            context=self._context,
            initializer=_start_worker,
            initargs=(self._spec,),
        )
        self._pool._pool_manager = _Manager(self._pool._context, self._context)
        try:
            with _signals_blocked():
                forkserver.ensure_running()
                # The pool starts its processes with the first task: they load the processor early.
                self._pool.schedule(_warm_up)
        except (OSError, EOFError) as error:
            # The locks are in /dev/shm; the error may be about its space. EOFError: the server is
            # gone, for want of memory or killed.
            reason = getattr(error, "strerror", None) or "the process that starts them died"
            raise BatchvlmError(
                f"worker processes cannot be started: {reason}",
                hint="check the memory, the space in /dev/shm and the limits on processes and open "
                "files, or set runtime.num_workers=0",
            ) from error

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        self._starter.shutdown()  # waits for a pool that is being started
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()

    def prepare(
        self, records: Iterable[Record | None]
    ) -> Iterator[tuple[Record, Sample | Failure]]:
        """Yield every record with its sample or failure, in the order of the records.

        A None in `records` means that no record is available yet; the oldest record in flight is
        then waited for and yielded.
        """
        in_flight: _InFlight = deque()
        for record in records:
            if record is None:
                if in_flight:
                    yield self._wait_oldest(in_flight)
                else:
                    time.sleep(_POLL_S)
                continue
            if self._local is not None:
                yield record, self._local.prepare(record)
                continue
            in_flight.append((record, self._schedule(record)))
            if len(in_flight) >= self._max_in_flight:
                yield self._wait_oldest(in_flight)
        while in_flight:
            yield self._wait_oldest(in_flight)

    def _schedule(self, record: Record) -> ProcessFuture[Sample | Failure] | None:
        assert self._opened is not None
        self._opened.result()
        assert self._pool is not None
        try:
            return self._pool.schedule(_prepare, args=(record,), timeout=self._timeout_s)
        except RuntimeError:
            return None  # the pool is broken; its oldest task raises BrokenProcessPool

    def _wait_oldest(self, in_flight: _InFlight) -> tuple[Record, Sample | Failure]:
        """Wait for the oldest record; if the pool broke, reschedule all in a new one."""
        record, future = in_flight[0]
        while True:
            try:
                if future is None:
                    raise BrokenProcessPool("closed")
                outcome = self._outcome(future)
            except _WorkerStopped as error:
                if self._num_breaks >= _MAX_BREAKS:
                    raise BatchvlmError(
                        f"worker processes were ended {self._num_breaks + 1} times in a row",
                        hint="find out what sends them SIGTERM or takes their memory, and run the "
                        "same command again",
                    ) from error
                self._num_breaks += 1
                future = self._schedule(record)
                in_flight[0] = (record, future)
                continue
            except BrokenProcessPool as error:
                self._restart_pool(error, in_flight)
                record, future = in_flight[0]
                continue
            self._num_breaks = 0
            self._has_prepared = True
            in_flight.popleft()
            return record, outcome

    def _restart_pool(self, error: BrokenProcessPool, in_flight: _InFlight) -> None:
        # A worker died between two rows, or before its first: no row is at fault.
        assert self._pool is not None
        if self._is_closed:
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
        self._opened = self._starter.submit(self._open_pool)
        for place, (record, _) in enumerate(in_flight):
            in_flight[place] = (record, self._schedule(record))

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
            if error.exitcode in _STOPPED:
                raise _WorkerStopped from error
            return Failure(
                error_type=ErrorType.PREPROCESS,
                message=f"the worker process died on this row (exit code {error.exitcode})",
            )
        except CancelledError:
            raise
        except Exception as error:  # the record or the sample could not be pickled
            return Failure(error_type=ErrorType.PREPROCESS, message=described(error))


class _Manager(PoolManager):
    """Pebble's manager of tasks and workers, which finds the row of every worker that has died.

    Pebble looks for it once. On a busy machine, the worker's message that it has begun the row may
    be read only after that: the row would time out.
    """

    def __init__(self, context: PoolContext, mp_context: ForkServerContext) -> None:
        super().__init__(context, mp_context)
        self.task_manager = _TimedTasks(context.task_queue.task_done)
        self._exit_codes: dict[int, int] = {}

    def handle_worker_expiration(self, expiration: tuple[int, int]) -> None:
        """Fail the row of a worker that has died."""
        worker_id, exit_code = expiration
        self._exit_codes[worker_id] = exit_code
        super().handle_worker_expiration(expiration)

    def update_tasks(self) -> None:
        """End rows that have timed out, or whose worker had died before. Pebble polls this."""
        super().update_tasks()  # type: ignore[no-untyped-call]
        for task in list(self.task_manager.tasks.values()):
            exit_code = self._exit_codes.get(task.worker_id)
            # A new worker may have the id of a dead one.
            if exit_code is not None and task.worker_id not in self.worker_manager.workers:
                error = ProcessExpired("", exit_code)  # type: ignore[no-untyped-call]
                self.task_manager.task_problem(task.id, error)


class _TimedTasks(TaskManager):
    """Pebble's tasks with timeouts by `RunningClock`.

    Pebble uses the system time: after a suspended job, or a change of the system time, every row in
    a worker would time out.
    """

    def __init__(self, task_done_callback: Callable[[], object]) -> None:
        super().__init__(task_done_callback)
        self._clock = RunningClock()

    def task_start(self, task_id: int, worker_id: int | None) -> None:
        super().task_start(task_id, worker_id)
        if task := self.tasks.get(task_id):
            task.timestamp = self._clock()

    def timeout(self, task: Task) -> bool:  # type: ignore[override]
        """Whether a task has exceeded its timeout. Pebble polls this."""
        if task.timeout is None or not task.started:
            return False
        return self._clock() - task.timestamp > task.timeout


class _Worker(ForkServerProcess):
    """A worker process, which ends with its parent."""

    def run(self) -> None:
        # The kernel does this even if a decoder hangs while it holds the GIL: the server ends with
        # the parent, and its workers with the server.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # For systems without PR_SET_PDEATHSIG, and for a server that died before the call.
        threading.Thread(target=_end_with_parent, daemon=True).start()
        # Blocked since the server started. The parent's way to end a worker.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        super().run()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _PoolContext(ForkServerContext):
    """Starts workers, with array pipes, and keeps a reference to the locks made for them.

    Pebble drops its locks before it stops its processes. A process that is still loading would not
    find them and print a traceback.
    """

    Process = _Worker

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
def _signals_blocked() -> Iterator[None]:
    """Block what the parent handles, in the processes and threads started in this context.

    A terminal sends SIGINT and SIGHUP to all its processes, SLURM sends SIGTERM and SIGUSR1 to all
    of a step. The parent's earlier threads still receive them, and it stops the workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    # Started before these are blocked: starting it later would unblock them.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(spec: PreprocessSpec) -> None:
    if spec.sent_as is None:
        import torch

        torch.set_num_threads(1)  # the workers share the cores with the engine
    global _preprocessor
    try:
        _preprocessor = Preprocessor(spec)
    except BatchvlmError:
        # The engine loads the same processor and reports the error in one line. Pebble would print
        # a traceback.
        os._exit(1)


def _warm_up() -> None:
    pass


def _prepare(record: Record) -> Sample | Failure:
    assert _preprocessor is not None
    return _preprocessor.prepare(record)
