"""Worker processes: in order, replaced when they die, gone with their parent."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pebble.pool.process import TaskManager, WorkerManager

from batchvlm.errors import BatchvlmError, ErrorType
from batchvlm.preprocess.preprocessor import PreprocessSpec
from batchvlm.records import Failure, Record, Sample
from batchvlm.runtime import workers
from batchvlm.runtime.workers import WorkerPool
from batchvlm.settings.compose import compose
from tests.conftest import picture


def spec() -> PreprocessSpec:
    cfg = compose()
    return PreprocessSpec(
        model=cfg.model,
        task=cfg.task,
        columns=cfg.data.columns,
        generation=cfg.generation,
        image_root=None,
        max_source_pixels=10**8,
    )


def records(count: int, image: Any = None) -> Iterator[Record]:
    for i in range(count):
        cell = picture(size=(16 + i, 16)) if image is None else image
        yield Record(row=i, row_index=i, source_file="f", id=str(i), values={"image": cell})


def same(a: Sample | Failure, b: Sample | Failure) -> bool:
    if isinstance(a, Failure) or isinstance(b, Failure):
        return a == b
    return a.features.keys() == b.features.keys() and all(
        (a.features[k] == b.features[k]).all() for k in a.features
    )


def test_workers_and_this_process_prepare_the_same_in_order() -> None:
    def mixed() -> Iterator[Record]:
        yield from records(40)
        yield from records(3, image=b"no image")

    with WorkerPool(spec(), num_workers=0, timeout_s=60) as pool:
        alone = list(pool.prepare(mixed()))
    with WorkerPool(spec(), num_workers=2, timeout_s=60) as pool:
        together = list(pool.prepare(mixed()))
    assert [r.row_index for r, _ in together] == [*range(40), *range(3)]
    assert all(same(a, b) for (_, a), (_, b) in zip(alone, together, strict=True))
    assert [o.error_type for _, o in together[40:] if isinstance(o, Failure)] == [
        ErrorType.DECODE
    ] * 3


def fail_on_odd_rows(record: Record) -> Any:
    match record.row_index % 4:
        case 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case 3:
            # As a decoder that hangs in C, with Python's lock held.
            ctypes.PyDLL(None).sleep(3600)
    return Failure(error_type=ErrorType.PROMPT, message="reached")


def test_a_worker_that_dies_or_hangs_costs_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # A new process finds the function by name, so it must be this module's.
    monkeypatch.setattr(workers, "_prepare", fail_on_odd_rows)
    monkeypatch.setattr(workers, "_start_worker", start_nothing)
    with WorkerPool(spec(), num_workers=1, timeout_s=1.0) as pool:
        outcomes = [outcome for _, outcome in pool.prepare(records(6))]
    assert [o.error_type for o in outcomes if isinstance(o, Failure)] == [
        ErrorType.PROMPT,
        ErrorType.PREPROCESS,
        ErrorType.PROMPT,
        ErrorType.TIMEOUT,
        ErrorType.PROMPT,
        ErrorType.PREPROCESS,
    ]


def take_half_a_second(record: Record) -> Any:
    time.sleep(0.5)
    return Failure(error_type=ErrorType.PROMPT, message="reached")


def test_a_clock_that_is_set_and_a_suspended_job_cost_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "_prepare", take_half_a_second)
    monkeypatch.setattr(workers, "_start_worker", start_nothing)
    # An hour passes within each row, by the time of day.
    monkeypatch.setattr(time, "time", lambda: 7200 * time.monotonic())
    with WorkerPool(spec(), num_workers=1, timeout_s=60.0) as pool:
        outcomes = [outcome for _, outcome in pool.prepare(records(2))]
    assert [o.error_type for o in outcomes if isinstance(o, Failure)] == [ErrorType.PROMPT] * 2


def test_no_room_for_locks_is_one_line_that_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(WorkerManager, "create_channels", refuse)
    with (
        pytest.raises(BatchvlmError, match=r"No space left on device; check .* /dev/shm"),
        WorkerPool(spec(), num_workers=1, timeout_s=60.0) as pool,
    ):
        list(pool.prepare(records(1)))


def wait_or_die(record: Record) -> Any:
    """Row 0 takes until the other one has died."""
    while record.row_index == 0 and not Path(str(record.values["mark"])).exists():
        time.sleep(0.01)
    if record.row_index == 1:
        os._exit(7)
    return Failure(error_type=ErrorType.PROMPT, message="reached")


def test_a_worker_that_dies_before_it_is_heard_to_have_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a busy machine: its message is read once it is gone."""
    monkeypatch.setattr(workers, "_prepare", wait_or_die)
    monkeypatch.setattr(workers, "_start_worker", start_nothing)
    task_start = TaskManager.task_start
    started: list[int] = []

    def start_late(self: TaskManager, task_id: int, worker_id: int) -> None:
        assert pool._pool is not None
        while started and worker_id in pool._pool._pool_manager.worker_manager.workers:
            time.sleep(0.01)
        task_start(self, task_id, worker_id)
        (tmp_path / "mark").touch() if started else started.append(task_id)

    def one_by_one() -> Iterator[Record]:
        for record in records(2):
            yield replace(record, values={"mark": tmp_path / "mark"})
            while not started:
                time.sleep(0.01)

    with WorkerPool(spec(), num_workers=2, timeout_s=60) as pool:
        list(pool.prepare(replace(record, row_index=2) for record in records(1)))
        monkeypatch.setattr(TaskManager, "task_start", start_late)
        outcomes = [outcome for _, outcome in pool.prepare(one_by_one())]
    assert [o.message for o in outcomes if isinstance(o, Failure)] == [
        "reached",
        "the worker process died on this row (exit code 7)",
    ]


def end_on_first_try(record: Record) -> Any:
    """Is told to end, as all processes of a job are by SLURM, where nobody was told before."""
    mark = Path(str(record.values["mark"]))
    if record.row_index == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3600)
    return Failure(error_type=ErrorType.PROMPT, message="reached")


def test_a_worker_that_is_told_to_end_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workers, "_prepare", end_on_first_try)
    monkeypatch.setattr(workers, "_start_worker", start_nothing)
    rows = [
        Record(row=i, row_index=i, source_file="f", id=str(i), values={"mark": tmp_path / "mark"})
        for i in range(5)
    ]
    with WorkerPool(spec(), num_workers=1, timeout_s=600) as pool:
        outcomes = [outcome for _, outcome in pool.prepare(rows)]
    assert (tmp_path / "mark").exists()
    assert [o.message for o in outcomes if isinstance(o, Failure)] == ["reached"] * 5


def servers_alive() -> set[int]:
    """The process that workers are forked from."""
    return {
        pid
        for pid in children_of(os.getpid())
        if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }


def workers_alive() -> set[int]:
    return {pid for server in servers_alive() for pid in children_of(server)}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_worker_that_dies_between_rows_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # One row under way at a time: whenever the next one is asked for, the worker is idle.
    monkeypatch.setattr(workers, "_IN_FLIGHT_PER_WORKER", 1)

    def with_murder() -> Iterator[Record]:
        for record in records(6):
            if record.row_index == 3:
                for pid in workers_alive():
                    os.kill(pid, signal.SIGKILL)
            yield record

    with WorkerPool(spec(), num_workers=1, timeout_s=60) as pool:
        outcomes = list(pool.prepare(with_murder()))
    assert [record.row_index for record, _ in outcomes] == list(range(6))
    assert all(isinstance(outcome, Sample) for _, outcome in outcomes)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_server_that_dies_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # As the kernel ends it where memory is short. Its workers die with it, each on a row.
    monkeypatch.setattr(workers, "_prepare", take_half_a_second)
    monkeypatch.setattr(workers, "_start_worker", start_nothing)

    def with_murder() -> Iterator[Record]:
        for record in records(4):
            if record.row_index == 2:
                for pid in servers_alive():
                    os.kill(pid, signal.SIGKILL)
            yield record

    with WorkerPool(spec(), num_workers=2, timeout_s=60) as pool:
        list(pool.prepare(records(1)))
        outcomes = [outcome for _, outcome in pool.prepare(with_murder())]
    assert [o.message for o in outcomes if isinstance(o, Failure)] == ["reached"] * 4


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_what_a_whole_job_is_sent_passes_the_server_by(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(workers, "_start_worker", start_nothing)
    with WorkerPool(spec(), num_workers=1, timeout_s=60) as pool:
        list(pool.prepare(records(1, image=b"no image")))
        before = servers_alive()
        for pid in before:
            os.kill(pid, number)
        for pid in workers_alive():
            os.kill(pid, signal.SIGKILL)
        list(pool.prepare(records(1, image=b"no image")))
        assert len(before) == 1 and servers_alive() == before


def say_what_is_imported(record: Record) -> Any:
    is_there = "transformers.processing_utils" in sys.modules
    return Failure(error_type=ErrorType.PROMPT, message=str(is_there))


def test_workers_find_their_libraries_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_prepare", say_what_is_imported)
    monkeypatch.setattr(workers, "_start_worker", start_nothing)
    with WorkerPool(spec(), num_workers=1, timeout_s=60) as pool:
        (outcome,) = [outcome for _, outcome in pool.prepare(records(1))]
    assert isinstance(outcome, Failure) and outcome.message == "True"


def start_badly(spec: PreprocessSpec) -> None:
    raise OSError("no weights today")


def test_workers_that_never_start_end_the_run_and_cost_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "_start_worker", start_badly)
    with (
        WorkerPool(spec(), num_workers=1, timeout_s=60) as pool,
        pytest.raises(BatchvlmError, match="died 4 times in a row without preparing a row"),
    ):
        list(pool.prepare(records(3)))


def start_nothing(spec: PreprocessSpec) -> None:
    pass


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_terminals_ctrl_c_passes_the_workers_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_start_worker", start_nothing)

    def blocked(pid: int) -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("SigBlk:")[2].split()[0], 16)

    with WorkerPool(spec(), num_workers=2, timeout_s=60) as pool:
        wait_until(lambda: len(workers_alive()) == 2)
        assert all(blocked(pid) & 1 << signal.SIGINT - 1 for pid in workers_alive())
        # Those that take the place of dead ones, too.
        for pid in workers_alive():
            os.kill(pid, signal.SIGKILL)
        list(pool.prepare(records(1, image=b"no image")))
        assert all(blocked(pid) & 1 << signal.SIGINT - 1 for pid in workers_alive())
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_that_are_still_loading_end_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "_start_worker", start_nothing)
    stop_workers = WorkerManager.force_stop_workers

    def stop_late(manager: WorkerManager) -> None:
        for worker in manager.workers.values():
            worker.join(60)
        stop_workers(manager)

    monkeypatch.setattr(WorkerManager, "force_stop_workers", stop_late)
    with WorkerPool(spec(), num_workers=2, timeout_s=60):
        pass  # as if interrupted at once
    assert capfd.readouterr().err == ""


def test_a_pool_that_is_interrupted_while_it_starts_leaves_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    open_pool = WorkerPool._open_pool

    def interrupted(pool: WorkerPool) -> None:
        open_pool(pool)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(WorkerPool, "_open_pool", interrupted)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with (
            pytest.raises(Interrupted),
            WorkerPool(spec(), num_workers=2, timeout_s=60) as pool,
        ):
            list(pool.prepare(records(1)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not multiprocessing.active_children()


def children_of(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def hang_with_the_lock(record: Record) -> Any:
    ctypes.PyDLL(None).sleep(3600)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("is_hanging", [False, True])
def test_workers_do_not_outlive_a_killed_parent(is_hanging: bool) -> None:
    hang = "        pool._pool.schedule(hang_with_the_lock, args=(None,))\n" if is_hanging else ""
    code = (
        "from tests.runtime.test_workers import *\n"
        "from tests.runtime.test_workers import hang_with_the_lock\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(spec(), num_workers=2, timeout_s=60) as pool:\n"
        "        list(pool.prepare(records(4)))\n" + hang + "        print('ready', flush=True)\n"
        "        time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        children = children_of(parent.pid)
        children |= {pid for child in children for pid in children_of(child)}
        assert len(children) >= 3
        parent.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
