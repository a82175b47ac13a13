"""`batchvlm verify`, `status` and `compact` as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from batchvlm.cli import main
from batchvlm.commands import _size
from batchvlm.errors import ExitCode
from batchvlm.output.folder import OutputFolder
from tests.output.test_compact import job
from tests.output.test_overwrite import run_job


def test_verify_says_yes_or_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path)
    run_job(tmp_path, "ours", stop_after=7)
    assert main(["verify", out]) == ExitCode.FAILED
    assert capsys.readouterr().out.splitlines() == [
        "input        8 rows",
        "output       6 rows: 5 success, 1 error",
        "errors       1 decode",
        "missing     1 row: 7",
        "unfinished  1 row: 6; they are in segments, the same command brings them into parts",
        "incomplete or damaged",
    ]
    run_job(tmp_path, "ours")
    assert main(["verify", out]) == ExitCode.DONE
    assert "every input row is there exactly once" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "status", "compact"])
def test_a_file_in_the_folders_place_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    run_job(tmp_path, "ours")
    part = next((tmp_path / "data").iterdir())
    assert main([command, str(part)]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "is a file" in said and "name the folder that output.dir named" in said


def test_status_for_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(tmp_path, "ours", stop_after=7)
    assert main(["status", str(tmp_path)]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "state    running",
        "rows     7 of 8 (87.5%), 1 of them in unfinished shards",
        "shards   1 of 2 finished",
        "errors   1 decode",
    ]
    assert lines[-1].startswith("written  ")
    main(["status", "--json", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert (found["num_done"], found["errors"]) == (7, {"decode": 1})
    assert found["state"] == "running"
    part = OutputFolder(tmp_path).part(0, 2)
    part.write_bytes(part.read_bytes()[:-9])
    main(["status", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "rows     1 of 8 (12.5%), 1 of them in unfinished shards",
        "shards   0 of 2 finished",
    ]
    assert "damaged  part-00000-of-00002.parquet: delete it, and the same command" in lines[3]


def test_status_is_watched_until_the_job_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(tmp_path, "ours", stop_after=3)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        run_job(tmp_path, "ours", stop_after=3 if len(waited) == 1 else 99)

    # Not time.sleep itself, which other threads call too.
    monkeypatch.setattr("batchvlm.commands.time", SimpleNamespace(sleep=sleep))
    assert main(["status", str(tmp_path), "--watch", "0.5"]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line[:13] for line in lines if line.startswith("rows")] == [
        "rows     3 of",
        "rows     6 of",
        "rows     8 of",
    ]
    assert waited == [0.5, 0.5] and "\x1b" not in "".join(lines)
    assert main(["status", str(tmp_path), "--watch"]) == ExitCode.DONE
    assert main(["status", str(tmp_path), "--watch", "0"]) == ExitCode.USAGE


def test_a_job_that_has_stopped_is_not_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(tmp_path, "ours", stop_after=3)
    metrics = OutputFolder(tmp_path).metrics
    metrics.mkdir(exist_ok=True)
    counts = metrics / "task-00000-rank-000-20260101T000000-a.json"
    for rate, speed in ((0, "not known yet"), (2.5, "2.5 rows/s of 1 process, 2 s left")):
        counts.write_text(json.dumps({"rows_per_s": rate, "is_over": False}))
        main(["status", str(tmp_path)])
        shown = capsys.readouterr().out
        assert "state    running (1 process)" in shown and f"speed    {speed}\n" in shown
    counts.write_text(json.dumps({"rows_per_s": 2.5, "is_over": True}))
    assert main(["status", str(tmp_path), "--watch"]) == ExitCode.DONE
    assert "state    stopped: the same command goes on\n" in capsys.readouterr().out
    run_job(tmp_path, "ours")
    main(["status", str(tmp_path)])
    assert capsys.readouterr().out.startswith("state    done\n")


def test_a_retry_is_watched_until_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are there, and some of them are answered again."""
    run_job(tmp_path, "ours")
    metrics = OutputFolder(tmp_path).metrics
    metrics.mkdir(exist_ok=True)
    counts = metrics / "task-00000-rank-000-20260101T000000-a.json"
    counts.write_text(json.dumps({"rows_per_s": 2.5, "is_over": False}))
    over = json.dumps({"is_over": True})
    monkeypatch.setattr(
        "batchvlm.commands.time", SimpleNamespace(sleep=lambda _: counts.write_text(over))
    )
    assert main(["status", str(tmp_path), "--watch"]) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert "speed    2.5 rows/s of 1 process\n" in shown
    assert [line for line in shown.splitlines() if line.startswith("state")] == [
        "state    running (1 process)",
        "state    done",
    ]


def test_compact_by_rows_and_by_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path)
    assert main(["compact", str(tmp_path), "--rows", "8"]) == ExitCode.DONE
    assert capsys.readouterr().out.startswith("7 parts -> 4 in ")
    assert main(["compact", str(tmp_path), "--target-size", "1.5GB"]) == ExitCode.DONE
    assert capsys.readouterr().out.startswith("4 parts -> 1 in ")
    assert main(["verify", str(tmp_path)]) == ExitCode.DONE
    assert len(OutputFolder(tmp_path).data_files()) == 1


@pytest.mark.parametrize("name", ["verify", "status", "compact"])
def test_mistakes_are_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, str(tmp_path)]) == ExitCode.USAGE
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "is no output of batchvlm" in said[0]
    assert main([name]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "batchvlm: error: the following arguments are required: OUT; "
        f"batchvlm {name} --help lists the flags\n"
    )
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: batchvlm {name} [-h]" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0MB", "x", "-5GB", "5PB"])
def test_a_size_that_is_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compact", "out", f"--target-size={size}"]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no size" in line


@pytest.mark.parametrize("size", ["1KB", "1kb", "1k", "1000", "0.001MB"])
def test_a_size_in_any_case(size: str) -> None:
    assert _size(size) == 1000


def test_a_size_in_powers_of_1024() -> None:
    assert [_size(size) for size in ("1KiB", "1.5MiB", "2GiB")] == [1024, 3 << 19, 2 << 30]


def test_the_commands_load_no_model_library() -> None:
    code = (
        "import sys; from batchvlm.cli import main; main(['status', '/nowhere']);"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'hydra'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
