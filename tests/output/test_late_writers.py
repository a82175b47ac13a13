"""A process that was frozen while it wrote its part, and what happened to the folder meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from batchvlm.config import RetryConfig
from batchvlm.errors import OutputError
from batchvlm.output import overwrite as overwrite_module
from batchvlm.output.compact import compact
from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import RunFile, find_run, save_run
from batchvlm.output.schema import Provenance
from batchvlm.output.verify import verify
from batchvlm.output.writer import ShardWriter
from batchvlm.records import Shard, Status

from .make import SCHEMA, make_plan, make_result, read_data

NUM_SHARDS, NUM_ROWS = 4, 4  # 13 rows; row 3 is an error.


def start(
    root: Path, prompt: str = "?", *, overwrite: bool = False
) -> tuple[OutputFolder, RunFile]:
    """What a process knows once its model has loaded."""
    folder = OutputFolder(root)
    run = find_run(
        folder,
        identity={"prompt": prompt},
        layout={},
        settings={},
        packages={},
        plan=make_plan(NUM_SHARDS, NUM_ROWS),
        overwrite=overwrite,
    )
    return folder, save_run(folder, run, overwrite=overwrite)


def open_filled(folder: OutputFolder, shard: Shard, run: RunFile, **options: Any) -> ShardWriter:
    """A writer of a shard that has all of its rows, and has yet to commit them."""
    about = Provenance(model="m", fingerprint=run.fingerprint, run_id="r")
    retry = {"retry": options.pop("retry")} if "retry" in options else {}
    writer = ShardWriter(folder, shard, NUM_SHARDS, SCHEMA, about, flush_every_s=1e9, **retry)
    for row in range(shard.num_rows):
        if row not in writer.finished_rows:
            tried = {"attempts": writer.attempts.get(row, 1)}
            writer.add(make_result(shard, row, **tried, **options))
    return writer


def finish(root: Path, prompt: str = "?", *, overwrite: bool = False) -> OutputFolder:
    """A whole job."""
    folder, run = start(root, prompt, overwrite=overwrite)
    for shard in run.plan:
        open_filled(folder, shard, run, generated_text=prompt).commit()
    return folder


def while_it_writes(
    folder: OutputFolder, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let something happen after this process has begun to write its next part."""
    commit = folder._files.commit
    todo = [action]

    def slow(write: Callable[[BinaryIO], object], final: Path, **options: Any) -> bool:
        def write_late(file: BinaryIO) -> None:
            if final.parent == folder.data and todo:
                todo.pop()()
            write(file)

        return commit(write_late, final, **options)

    monkeypatch.setattr(folder._files, "commit", slow)


def test_its_part_stands_nowhere_beside_a_merged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = start(tmp_path)
    late = open_filled(folder, run.plan[1], run)

    def others() -> None:
        compact(finish(tmp_path), target_rows=100)

    while_it_writes(folder, others, monkeypatch)
    assert late.commit() == folder.part(0, NUM_SHARDS, NUM_SHARDS - 1)
    assert verify(OutputFolder(tmp_path)).faults == []


def test_its_part_undoes_no_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run = start(tmp_path)
    late = open_filled(folder, run.plan[0], run)

    def others() -> None:
        finish(tmp_path)
        mended = {"status": Status.SUCCESS, "failure": None, "generated_text": "at last"}
        again, _ = start(tmp_path)
        retry = RetryConfig(errors=["decode"])
        open_filled(again, run.plan[0], run, retry=retry, **mended).commit()

    while_it_writes(folder, others, monkeypatch)
    late.commit()
    assert "at last" in read_data(OutputFolder(tmp_path))["generated_text"].to_pylist()
    assert verify(OutputFolder(tmp_path)).faults == []


def test_its_part_is_not_the_next_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder, old = start(tmp_path, "old")
    late = open_filled(old_folder, old.plan[1], old, generated_text="old")
    refused: list[OutputError] = []

    def commit() -> None:
        try:
            late.commit()
        except OutputError as error:
            refused.append(error)

    thread = threading.Thread(target=commit)
    sync_folder = overwrite_module.sync_folder

    def sync(path: Path) -> None:
        # `data` is moved, and run.json is still the old run's.
        if not thread.ident:
            thread.start()
            thread.join(0.5)  # it waits for the lock
        sync_folder(path)

    monkeypatch.setattr(overwrite_module, "sync_folder", sync)
    folder = finish(tmp_path, "new", overwrite=True)
    thread.join()
    assert "was given to another run" in str(refused[0])
    assert set(read_data(folder)["generated_text"].to_pylist()) == {"new"}
    assert verify(folder).faults == []


def test_where_there_are_no_locks_its_part_is_known_for_another_runs(tmp_path: Path) -> None:
    """It may look for run.json just before that is replaced, and rename just after."""
    old = finish(tmp_path / "old", "old").part(1, NUM_SHARDS)
    folder, run = start(tmp_path / "new", "new")
    writer = open_filled(folder, run.plan[1], run, generated_text="new")
    late = folder.part(1, NUM_SHARDS)
    late.parent.mkdir()
    late.write_bytes(old.read_bytes())
    with pytest.raises(OutputError, match="is of another run"):
        writer.commit()
    with pytest.raises(OutputError, match="is of another run"):
        open_filled(folder, run.plan[1], run)
    late.unlink()
    finish(tmp_path / "new", "new")
    assert set(read_data(folder)["generated_text"].to_pylist()) == {"new"}
    assert verify(folder).faults == []
