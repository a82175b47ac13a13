"""What another machine replaces or removes while it is read here, as NFS tells it: ESTALE."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from batchvlm.output.folder import OutputFolder
from batchvlm.output.parts import failures_in_parts
from batchvlm.output.status import status

from .make import PROVENANCE, make_plan, make_result, open_writer
from .test_overwrite import run_job


class Stale(io.FileIO):
    def readinto(self, buffer: Any) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def replace_parts_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_stale(self: OutputFolder, path: Path) -> BinaryIO:
        assert path.parent == self.data
        return io.BufferedReader(Stale(path))

    monkeypatch.setattr(OutputFolder, "open", open_stale)


def test_a_part_that_is_replaced_meanwhile_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(tmp_path, "ours")
    replace_parts_meanwhile(monkeypatch)
    found = status(OutputFolder(tmp_path))
    assert (found.num_finished, found.damaged) == (2, [])


def test_a_run_goes_on_beside_one_that_replaces_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = OutputFolder(tmp_path), make_plan(1, 3)
    writer = open_writer(folder, plan, 0)
    for row in range(plan[0].num_rows):
        writer.add(make_result(plan[0], row))
    writer.commit()
    replace_parts_meanwhile(monkeypatch)
    assert failures_in_parts(folder, plan, PROVENANCE.fingerprint, {0}) == {}
    assert len(open_writer(folder, plan, 0).finished_rows) == plan[0].num_rows


def test_a_folder_that_is_removed_while_it_is_listed_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path)

    def refuse(path: str | Path) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), os.fspath(path))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    assert folder.list_segments(0) == []
    assert folder.written(folder.segments) == []
