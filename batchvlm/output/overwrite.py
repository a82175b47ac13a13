"""Overwrite the run in a folder by another; a kill at any instant mixes no files of the two.

    1. `_batchvlm/replaced-ATTEMPT/run.json`   a copy of the old run's file
    2. `data`, segments, retries and metrics   moved into that folder, each by one rename
    3. `_batchvlm/run.json`                    replaced: the folder now belongs to the new run
    4. `_batchvlm/replaced-ATTEMPT`            deleted

Nothing is deleted before step 3. If the process is killed before it, the next process that opens
the folder moves everything back; if it is killed after it, the next process finishes step 4. It
tells the two cases apart by comparing the copy with `run.json`.
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from batchvlm.output.disk import make_folder, new_attempt, output_error, sync_folder
from batchvlm.output.folder import OutputFolder

log = logging.getLogger(__name__)

_PREFIX = "replaced-"


def replace_run(folder: OutputFolder, run_json: bytes) -> None:
    """Give the folder to another run; the caller holds `folder.lock()`.

    Args:
        run_json: content of the new run's file.

    Raises:
        OutputError: the file system refuses. The folder belongs to the old run or to the new one.
    """
    old = folder.read_bytes(folder.run_json)
    assert old is not None, "there is a run to overwrite"
    aside = folder.inner / f"{_PREFIX}{new_attempt()}"
    # The copy comes first: it must exist from the first rename on.
    folder.commit_file(lambda file: file.write(old), aside / "run.json")
    try:
        for path in (folder.data, folder.segments, folder.retries, folder.metrics):
            with suppress(FileNotFoundError):
                os.rename(path, aside / path.name)
        for path in (aside, folder.inner, folder.root):
            sync_folder(path)
    except OSError as error:
        raise output_error("overwrite", folder.root, error) from error
    folder.commit_file(lambda file: file.write(run_json), folder.run_json)
    _delete(aside)


def finish_replacing(folder: OutputFolder) -> None:
    """Finish or undo a `replace_run` that was killed.

    Raises:
        OutputError: the file system refuses.
    """
    if not folder.is_local or not _find_replaced(folder):
        return
    # A live `replace_run` holds the lock.
    with folder.lock():
        run_json = folder.read_bytes(folder.run_json)
        for aside in _find_replaced(folder):
            old = folder.read_bytes(aside / "run.json")
            if old is not None and old == run_json:
                log.warning("%s was about to be overwritten: undone", folder.root)
                try:
                    _move_back(aside, folder)
                except OSError as error:
                    raise output_error("restore", folder.root, error) from error
            _delete(aside)


def _find_replaced(folder: OutputFolder) -> list[Path]:
    try:
        return sorted(folder.inner.glob(f"{_PREFIX}*"))
    except OSError as error:
        raise output_error("read", folder.inner, error) from error


def _move_back(aside: Path, folder: OutputFolder) -> None:
    for path in (folder.data, folder.segments, folder.retries, folder.metrics):
        for file in sorted((aside / path.name).rglob("*")):
            target = path / file.relative_to(aside / path.name)
            # A live process of the old run may have written the same file meanwhile: keep that one.
            if file.is_file() and not target.exists():
                make_folder(target.parent)
                os.rename(file, target)
                sync_folder(target.parent)


def _delete(aside: Path) -> None:
    # The copy goes last: without it, the owner of the other files would be unknown.
    try:
        for path in sorted(aside.iterdir()):
            if path.name != "run.json":
                shutil.rmtree(path)
        (aside / "run.json").unlink(missing_ok=True)
        aside.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("cannot delete %s, which nobody reads any more: %s", aside, error)
