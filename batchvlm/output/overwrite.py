"""A folder goes from one run to another, and a kill at any instant mixes nothing.

    1. `_batchvlm/replaced-ATTEMPT/run.json`   a copy of the old run's
    2. `data`, segments and metrics            moved into that folder, each by one rename
    3. `_batchvlm/run.json`                    replaced: from here on the folder is the new run's
    4. `_batchvlm/replaced-ATTEMPT`            deleted

Until 3 nothing is deleted, and whoever opens the folder next moves everything back. After it,
whoever opens the folder next deletes what is left. The copy tells the two cases apart.
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
    """Make the folder another run's; only under `folder.lock()`.

    Args:
        run_json: the new run's file.

    Raises:
        OutputError: the file system refuses. The folder is the old run's, or the new one's.
    """
    old = folder.read_bytes(folder.run_json)
    assert old is not None, "there is a run to overwrite"
    aside = folder.inner / f"{_PREFIX}{new_attempt()}"
    # The file before the folders: from the first rename on it must be there.
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
    """Bring to its end, or undo, what a killed `replace_run` began.

    Raises:
        OutputError: the file system refuses.
    """
    if not folder.is_local or not _left(folder):
        return
    # Whoever is at it right now holds the lock.
    with folder.lock():
        run_json = folder.read_bytes(folder.run_json)
        for aside in _left(folder):
            old = folder.read_bytes(aside / "run.json")
            if old is not None and old == run_json:
                log.warning("%s was about to be overwritten: undone", folder.root)
                try:
                    _move_back(aside, folder)
                except OSError as error:
                    raise output_error("restore", folder.root, error) from error
            _delete(aside)


def _left(folder: OutputFolder) -> list[Path]:
    try:
        return sorted(folder.inner.glob(f"{_PREFIX}*"))
    except OSError as error:
        raise output_error("read", folder.inner, error) from error


def _move_back(aside: Path, folder: OutputFolder) -> None:
    for path in (folder.data, folder.segments, folder.retries, folder.metrics):
        for file in sorted((aside / path.name).rglob("*")):
            target = path / file.relative_to(aside / path.name)
            # A live process of the old run may have written the same meanwhile: its file stands.
            if file.is_file() and not target.exists():
                make_folder(target.parent)
                os.rename(file, target)
                sync_folder(target.parent)


def _delete(aside: Path) -> None:
    # The copy last: without it nobody would know whose the rest is.
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
