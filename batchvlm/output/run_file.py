"""`_batchvlm/run.json`: a run's settings, fingerprint and plan of shards, written once.

The first process writes it. Every later process reads it and is refused if its own settings differ.
The stored plan is always used, even if a later release would cut the input differently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from batchvlm.errors import ConfigError, FingerprintError, OutputError
from batchvlm.output.exchange import restore_data
from batchvlm.output.fingerprint import differences, fingerprint
from batchvlm.output.folder import OutputFolder
from batchvlm.output.overwrite import finish_replacing, replace_run
from batchvlm.records import Shard

_FORMAT = 1
"""Increased when older releases could not read the file or the folder correctly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """The content of `run.json`."""

    format: int
    fingerprint: str
    """Digest of `identity`."""
    identity: Mapping[str, Any]
    """Everything that an answer depends on."""
    layout: Mapping[str, Any]
    """Everything else that the output files depend on: rows per shard, columns, rows taken."""
    settings: Mapping[str, Any]
    """The settings of the first start, for people to read; never compared."""
    plan: tuple[Shard, ...]
    """`plan[i].index == i`."""
    created_at: str
    """ISO 8601, UTC."""
    packages: Mapping[str, str]
    """Package versions at the first start; never compared."""


def find_run(
    folder: OutputFolder,
    *,
    identity: Mapping[str, Any],
    layout: Mapping[str, Any],
    settings: Mapping[str, Any],
    packages: Mapping[str, str],
    plan: list[Shard],
    overwrite: bool = False,
) -> RunFile:
    """Return the run that is stored in `folder`, or a new one that `save_run` has yet to store.

    With `overwrite`, return a new run also if the stored one has another identity or layout.

    All arguments are JSON values. `plan` is used only for a new run: the caller must continue with
    the plan of the returned run.

    Raises:
        FingerprintError: the stored run has another identity or layout.
        ConfigError: the folder holds files of another program or of a newer release.
        OutputError: the folder cannot be read, its run.json is damaged, or a run in an object store
            would be overwritten.
    """
    assert all(shard.index == index for index, shard in enumerate(plan))
    new = RunFile(
        format=_FORMAT,
        fingerprint=fingerprint(identity),
        identity=identity,
        layout=layout,
        settings=settings,
        plan=tuple(plan),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        packages=packages,
    )
    restore_data(folder)
    finish_replacing(folder)
    run = read_run(folder)
    has_data = False
    if run is None:
        # Look for data, then read the file again: a run writes its file before its first part, so
        # parts without the file cannot belong to a run that another process is starting right now.
        has_data = folder.has_foreign_data()
        run = read_run(folder)
    if run is not None and overwrite and differs(run, new):
        folder.check_local("overwriting")
        return _decode(_encode(new), folder.address(folder.run_json))
    if run is not None:
        _check_same(folder, run, new)
        folder.remove_leftovers(len(run.plan))
        return run
    if has_data:
        raise ConfigError(
            f"{folder.address(folder.data)} holds Parquet files, but "
            f"{folder.address(folder.run_json)} is missing: they are no output of batchvlm",
            hint="name another output.dir",
        )
    # Encode and decode, so that a new run has the form of a stored one.
    return _decode(_encode(new), folder.address(folder.run_json))


def save_run(folder: OutputFolder, run: RunFile, *, overwrite: bool = False) -> RunFile:
    """Store a run in its folder if none is there; any number of processes may do so at once.

    Call it when nothing but rows can fail any more, because a folder with a run refuses all others.
    Afterwards every write to `folder` checks that the run is still there. With `overwrite`, a run
    with another identity or layout is deleted with everything that it wrote.

    Returns:
        The stored run, which is that of another process if that was first.

    Raises:
        FingerprintError: another process has started a run with another identity or layout.
        OutputError: the folder cannot be written, or another process has started the same run with
            another plan.
    """
    text = _encode(run)
    if overwrite:
        # The first rank to get the lock replaces the old run; the others then find the new one.
        with folder.lock():
            old = read_run(folder)
            if old is not None and differs(old, run):
                replace_run(folder, text)
    folder.commit_file(lambda file: file.write(text), folder.run_json, replace=False)
    stored_text = folder.read_bytes(folder.run_json)
    if stored_text is None:
        raise OutputError(f"{folder.address(folder.run_json)} vanished just after it was written")
    stored = _decode(stored_text, folder.address(folder.run_json))
    _check_same(folder, stored, run)
    if stored.plan != run.plan:
        raise OutputError(
            f"{folder}: another process has just started this job with another plan",
            hint="run the same command again to go on with that plan",
        )
    folder.claim(stored_text)
    return stored


def differs(stored: RunFile, new: RunFile) -> list[str]:
    """Return a line for each difference in identity or layout: two such runs share no folder."""
    return differences(stored.identity, new.identity) + differences(stored.layout, new.layout)


def _check_same(folder: OutputFolder, stored: RunFile, new: RunFile) -> None:
    if found := differs(stored, new):
        is_same = stored.fingerprint == new.fingerprint
        what = "was started with other settings" if is_same else "holds the answers of another job"
        raise FingerprintError(
            f"{folder} {what}: {'; '.join(found)}",
            hint="put the settings back, name another output.dir, or set output.on_mismatch",
        )


def read_run(folder: OutputFolder) -> RunFile | None:
    """Return the run in `folder`; None if there is none.

    Raises:
        ConfigError: run.json is of another program or of a newer release.
        OutputError: the file cannot be read, or is damaged.
    """
    text = folder.read_bytes(folder.run_json)
    return None if text is None else _decode(text, folder.address(folder.run_json))


def _encode(run: RunFile) -> bytes:
    content = {field.name: getattr(run, field.name) for field in fields(run)}
    # "program" comes first, so that the start of the file says what it is.
    text = json.dumps({"program": "batchvlm"} | content | {"plan": _pack(run.plan)})
    return text.encode("ascii")


def _decode(text: bytes, path: str) -> RunFile:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise OutputError(
            f"{path} is damaged, or no run of batchvlm", hint="name another output.dir"
        ) from error
    if not isinstance(content, dict) or content.pop("program", None) != "batchvlm":
        raise ConfigError(f"{path} is no run of batchvlm", hint="name another output.dir")
    if isinstance(content.get("format"), int) and content["format"] > _FORMAT:
        raise ConfigError(
            f"{path} is of a newer batchvlm (format {content['format']}, here {_FORMAT})",
            hint="update batchvlm, or name another output.dir",
        )
    try:
        run = RunFile(**content | {"plan": _unpack(content["plan"])})
        is_whole = isinstance(run.identity, dict) and isinstance(run.layout, dict)
        if run.format != _FORMAT or not is_whole or fingerprint(run.identity) != run.fingerprint:
            raise ValueError("not what was written")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise OutputError(
            f"{path} is damaged", hint="restore the file, or name another output.dir"
        ) from error
    return run


def _pack(plan: Sequence[Shard]) -> dict[str, list[Any]]:
    """Return the plan as columns, with each file name once: about 3 MB for 100,000 shards."""
    files = {name: place for place, name in enumerate(dict.fromkeys(s.source_file for s in plan))}
    return {
        "source_files": list(files),
        "source_file": [files[s.source_file] for s in plan],
        "first_row": [s.first_row for s in plan],
        "num_rows": [s.num_rows for s in plan],
        "first_row_index": [s.first_row_index for s in plan],
    }


def _unpack(columns: Mapping[str, list[Any]]) -> tuple[Shard, ...]:
    files = columns["source_files"]
    rows = zip(
        columns["source_file"],
        columns["first_row"],
        columns["num_rows"],
        columns["first_row_index"],
        strict=True,
    )
    return tuple(
        Shard(
            index=index,
            source_file=files[place],
            first_row=first_row,
            num_rows=num_rows,
            first_row_index=first_row_index,
        )
        for index, (place, first_row, num_rows, first_row_index) in enumerate(rows)
    )
