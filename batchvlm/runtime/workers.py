"""Records -> samples in worker processes, in order, a bounded number under way.

A worker that hangs or dies costs the row it was at; the pool replaces it and goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, TimeoutError
from types import TracebackType
from typing import Self

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from batchvlm.errors import ErrorType
from batchvlm.preprocess import Preprocessor, PreprocessSpec
from batchvlm.records import Failure, Record, Sample

# Enough that a worker never waits for the next record, few enough to bound memory.
_UNDER_WAY_PER_WORKER = 16

_preprocessor: Preprocessor | None = None


def default_num_workers() -> int:
    """One worker for every core but the engine's own, eight at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, (cores or 1) - 1))


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
        self._timeout_s = timeout_s
        self._under_way = num_workers * _UNDER_WAY_PER_WORKER
        self._local = Preprocessor(spec) if num_workers == 0 else None
        self._pool = None
        if num_workers > 0:
            # Not forked: the parent has threads, which a fork would leave in the middle of a lock.
            self._pool = ProcessPool(
                max_workers=num_workers,
                context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(spec, os.getpid()),
            )

    def __enter__(self) -> Self:
        if self._pool is not None:
            # The pool starts its processes with the first task: let them load their libraries.
            self._pool.schedule(_do_nothing)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()

    def prepare(self, records: Iterable[Record]) -> Iterator[tuple[Record, Sample | Failure]]:
        """Yield every record with its sample or failure, in the order of the records."""
        if self._local is not None:
            yield from ((record, self._local.prepare(record)) for record in records)
            return
        assert self._pool is not None
        under_way: deque[tuple[Record, ProcessFuture[Sample | Failure]]] = deque()
        for record in records:
            future = self._pool.schedule(_prepare, args=(record,), timeout=self._timeout_s)
            under_way.append((record, future))
            if len(under_way) >= self._under_way:
                oldest, future = under_way.popleft()
                yield oldest, self._outcome(future)
        for record, future in under_way:
            yield record, self._outcome(future)

    def _outcome(self, future: ProcessFuture[Sample | Failure]) -> Sample | Failure:
        try:
            return future.result()
        except TimeoutError:
            return Failure(
                error_type=ErrorType.TIMEOUT,
                message="preparing the row took longer than "
                f"runtime.sample_timeout_s={self._timeout_s:g}",
            )
        except ProcessExpired as error:
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


def _start_worker(spec: PreprocessSpec, parent: int) -> None:
    import torch

    torch.set_num_threads(1)  # the workers share the cores with the engine
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    global _preprocessor
    _preprocessor = Preprocessor(spec)


def _exit_with(parent: int) -> None:
    # A parent that is killed cannot stop its workers.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _do_nothing() -> None:
    pass


def _prepare(record: Record) -> Sample | Failure:
    assert _preprocessor is not None
    return _preprocessor.prepare(record)
