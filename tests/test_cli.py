"""The commands as a person types them: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchvlm import demo
from batchvlm.cli import main, run_app
from batchvlm.errors import ExitCode

ROOT = Path(__file__).parents[1]
BATCHVLM = [sys.executable, "-m", "batchvlm"]


def command(*args: str, cwd: Path, program: list[str] = BATCHVLM) -> Any:
    return subprocess.run([*program, *args], cwd=cwd, capture_output=True, text=True)


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ds.dataset(out / "data").to_table().to_pylist()
    return rows


def test_run_without_arguments_captions_the_samples(tmp_path: Path) -> None:
    done = command("run", cwd=tmp_path)
    assert done.returncode == ExitCode.DONE, done.stderr
    truth = pq.read_table(demo.SAMPLES_PATH).to_pylist()
    rows = rows_of(tmp_path / "outputs" / "demo-caption")
    assert [row["id"] for row in rows] == [row["id"] for row in truth]
    good = [
        (r["generated_text"], t["caption"])
        for r, t in zip(rows, truth, strict=True)
        if r["status"] == "success"
    ]
    assert len(good) >= 20
    assert sum(answer == caption for answer, caption in good) >= 0.9 * len(good)
    errors = {row["id"]: row["error_type"] for row in rows if row["status"] == "error"}
    assert errors == {
        "broken-truncated": "decode",
        "broken-not-an-image": "decode",
        "broken-no-image": "missing_image",
        "broken-bomb": "too_large",
        "broken-missing-file": "missing_image",
    }
    assert f"rows     {len(rows)}: {len(good)} answered, 5 errors" in done.stdout
    assert good[0][0][:30] in done.stdout
    assert "outputs/demo-caption/data" in done.stdout
    assert "29 of 29 rows (100%)" in done.stderr
    again = command("run", cwd=tmp_path)
    assert again.returncode == ExitCode.DONE
    assert f"{len(rows)} were there already, 5 of them errors" in again.stdout
    assert "earlier  2 decode, 2 missing_image, 1 too_large" in again.stdout
    assert good[0][0][:30] in again.stdout


@pytest.mark.parametrize("task", ["vqa", "extract"])
def test_the_job_scripts(tmp_path: Path, task: str) -> None:
    program = [sys.executable, str(ROOT / "jobs" / f"{task}.py")]
    done = command(
        *("output.dir=out", "output.keep_columns=[answer,objects]", "runtime.num_workers=0"),
        cwd=tmp_path,
        program=program,
    )
    assert done.returncode == ExitCode.DONE, done.stderr
    rows = [row for row in rows_of(tmp_path / "out") if row["status"] == "success"]
    if task == "vqa":
        right = [row["generated_text"] == row["answer"] for row in rows]
    else:
        right = [row["parsed"] == json.loads(row["objects"]) and row["json_valid"] for row in rows]
    assert sum(right) >= 0.9 * len(right) and len(right) >= 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "data.pth=x"], "data.pth is no setting; did you mean data.path?"),
        (["run", "data=parquet"], "data.path is required"),
        (["run", "data=parquet", "data.path=none.parquet"], "none.parquet"),
        (["run", "data.columns.image=img"], "img"),
        (["run", "model=hub", "model.path=./none"], "model.path=./none"),
        (["run", "task.prompt='{{ no_such_column }}'"], "no_such_column"),
        (["run", "task.prompt='{{ row.no_such_column }}'"], "no_such_column"),
        (["run", "output.dir=s3://bucket/out"], "output.dir"),
        (["run", "output.dir=/dev/null/out"], "output.dir=/dev/null/out cannot be written: Not a"),
        (["jump"], "jump is no command; there are run, plan, preview, status, verify, report, "),
        (["run", "--foo"], "--foo is no flag; batchvlm run --help lists the flags"),
        (["run", "output.dir=${oc.env:NO_SUCH}"], "Environment variable 'NO_SUCH' not found"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(tmp_path: Path, args: list[str], message: str) -> None:
    done = command(*args, cwd=tmp_path)
    assert done.returncode == ExitCode.USAGE, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("batchvlm: error: "), done.stderr
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output.dir=x"], "--output.dir=x is no flag; settings have no dashes: output.dir=x"),
        (["a=b", "--foo", "--bar"], "--foo is no flag; batchvlm run --help lists the flags"),
        (["a=b", "--cfg", "job", "c=d", "e=f"], "c=d follows a flag, other settings precede"),
        (["--cfg", "nope"], "argument --cfg/-c: invalid choice: 'nope'"),
        (["--config-dir"], "argument --config-dir/-cd: expected one argument"),
    ],
)
def test_a_flag_that_is_none(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    assert main(["run", *args]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batchvlm: error: {message}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rum"], "rum is no command; did you mean run?"),
        (["plan", "data.pth=x"], "data.pth is no setting; did you mean data.path?"),
        (
            ["plan", "--sample=0"],
            "argument --sample: '0' is no number of 1 or more; batchvlm plan "
            "--help lists the flags",
        ),
        (["preview", "--seeed"], "--seeed is no flag; batchvlm preview --help lists the flags"),
    ],
)
def test_what_was_meant(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    assert main(args) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"batchvlm: error: {message}"


def test_help(tmp_path: Path) -> None:
    for args in (["--help"], []):
        assert "batchvlm run" in command(*args, cwd=tmp_path).stdout
    shown = command("run", "--help", cwd=tmp_path).stdout
    assert "task: caption, " in shown and "Examples:" in shown
    config = command("run", "--cfg", "job", cwd=tmp_path).stdout
    assert "max_new_tokens: 256" in config
    assert command("--version", cwd=tmp_path).stdout.startswith("batchvlm 0.")
    assert command("run", "--version", cwd=tmp_path).stdout.startswith("batchvlm 0.")
    assert "settings.md" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [["--cfg", "job"], ["data.max_rows=2", "runtime.num_workers=0"]])
def test_a_reader_that_leaves_is_no_failure(tmp_path: Path, args: list[str]) -> None:
    with subprocess.Popen(
        [*BATCHVLM, "run", *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        lines = process.stderr.read().decode().splitlines()
    assert process.returncode == ExitCode.DONE, lines
    assert all(" INFO " in line for line in lines)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that gives EIO")
def test_a_disk_that_fails_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with the error of a closed terminal."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "my.yaml").symlink_to("/proc/self/mem")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--config-dir", str(tmp_path), "model=my"]) == ExitCode.FAILED
    assert "Input/output error" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [[], ["output.dir=x"], ["data=demo"]])
def test_a_config_of_ones_own_extends_the_settings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
) -> None:
    (tmp_path / "mine.yaml").write_text("task:\n  prompt: What is it?\n")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    flags = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    assert main(["run", *overrides, *flags]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "batchvlm: error: your configuration does not begin with that of batchvlm; "
        "write `defaults: [run, _self_]` at the top of the file of --config-name\n"
    )


def test_a_traceback_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--debug", "data.max_rows=-1"]) == ExitCode.USAGE
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "ConfigError" in shown
    assert shown.endswith("batchvlm: error: data.max_rows=-1 must be at least 1\n")

    def broken(*args: Any) -> None:
        raise KeyError("nobody foresaw it")

    monkeypatch.setattr("batchvlm.output.status.status", broken)
    monkeypatch.setattr("batchvlm.pipeline.pipeline.run_job", broken)
    for command_line in (["status", str(tmp_path)], ["run", f"output.dir={tmp_path / 'out'}"]):
        assert main(command_line) == ExitCode.FAILED
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            "batchvlm: error: KeyError: 'nobody foresaw it'; "
            "the same command with --debug shows where"
        )
        assert main([*command_line, "--debug"]) == ExitCode.FAILED
        assert "in broken" in capsys.readouterr().err


def test_log_lines_for_programs(tmp_path: Path) -> None:
    done = command(
        "run", "runtime.log_json=true", "data.max_rows=12", "runtime.num_workers=0",
        "tracking.prometheus_file=job.prom", "output.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == ExitCode.DONE, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(line["level"] == "info" for line in lines)
    assert (lines[-1]["rows"], lines[-1]["total_rows"], lines[-1]["left_s"]) == (12, 12, 0)
    assert lines[-1]["errors"] == 2  # half a file, and no image at all
    assert 'batchvlm_rows_total{output="out"' in (tmp_path / "job.prom").read_text()


def test_every_tracker_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = command(
        "run", "data.max_rows=12", "runtime.num_workers=0", "output.dir=out",
        "tracking.trackers=[tensorboard,wandb]", "tracking.dir=kept", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == ExitCode.DONE, done.stderr
    for pattern in ("out/task-00000-rank-000/events*", "wandb/offline-run-*/run-*.wandb"):
        (file,) = (tmp_path / "kept").glob(pattern)
        kept = file.read_bytes()
        assert b"completion_tokens_per_s" in kept
    # wandb's file, for `wandb sync`: which run of which project, and the job's settings.
    for text in ("batchvlm", "out/task-00000-rank-000", "generation.max_new_tokens"):
        assert text.encode() in kept


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("batchvlm run task=e", ["task=extract"]),
        ("batchvlm plan task=e", ["task=extract"]),
        ("batchvlm preview engine=s", ["engine=slots"]),
    ],
)
def test_tab_completion(tmp_path: Path, line: str, words: list[str]) -> None:
    done = subprocess.run(
        [*BATCHVLM, "-sc", "query=bash"],
        cwd=tmp_path,
        env=os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == words, done.stderr
    assert "hydra_bash_completion batchvlm" in command("-sc", "install=bash", cwd=tmp_path).stdout


def test_a_folder_without_a_processor_is_one_line_too(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((demo.MODEL_DIR / name).read_bytes())
    done = command("run", "model=hub", f"model.path={model}", "output.dir=out", cwd=tmp_path)
    assert done.returncode == ExitCode.USAGE
    errors = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(errors) == 1 and "cannot load the processor of model.path" in errors[0], done.stderr
    assert not (tmp_path / "out").exists()


def test_ranks_of_a_launch_have_one_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each reads the clock for itself; one process alone may have a folder a run."""
    folders: list[str] = []

    def run_once(*more: str) -> int:
        overrides = ["output.dir=out/${now:%H-%M-%S}", *more]
        return run_app("run", overrides, job=lambda cfg: folders.append(cfg.output.dir))

    assert run_once() == 0 and len(folders) == 1
    assert run_once("runtime.num_tasks=3") == 2 and len(folders) == 1
    assert "output.dir names the time: each of the 3 tasks" in capsys.readouterr().err
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run_once() == 2 and len(folders) == 1
    assert "output.dir names the time: each of the 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_idle_threads_leave_the_cores_unless_told_otherwise(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    program = """
import json, os
from batchvlm import cli

cli.catch_signals = lambda: None
cli._run_hydra = lambda *args: print(json.dumps(dict(os.environ)))
cli.run_app("run", [])
"""
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | given,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert {name: seen[name] for name in names if name in seen} == expected


def test_a_process_without_standard_streams_gets_some(tmp_path: Path) -> None:
    """Else a file of the output would be number 2, and a library's warnings would go into it."""
    code = (
        "import sys; from batchvlm.cli import _open_streams; _open_streams(); "
        "print(1, file=sys.stderr); print(sys.stdin.read(), sys.stderr.isatty()); "
        "sys.exit(open('file', 'w').fileno())"
    )
    command = f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path).returncode > 2


def test_a_process_that_ends_is_not_torn_down(tmp_path: Path) -> None:
    """Threads of native libraries can abort it meanwhile: its exit code would not be the run's."""
    code = (
        "import atexit, os, threading\n"
        "from batchvlm.cli import leave\n"
        "class Native:\n"
        "    def __del__(self):\n"
        "        os.abort()\n"
        "native = Native()\n"
        "def late():\n"
        "    threading.main_thread().join()  # until the end has begun\n"
        "    open('late', 'w').close()\n"
        "threading.Thread(target=late).start()\n"
        "atexit.register(lambda: open('cleaned', 'w').close())\n"
        "atexit.register(lambda: 1 / 0)\n"
        "print('done', end='')\n"
        "leave(75)\n"
    )
    done = command("-c", code, cwd=tmp_path, program=[sys.executable])
    assert done.returncode == ExitCode.INTERRUPTED, done.stderr
    assert done.stdout == "done"
    assert {path.name for path in tmp_path.iterdir()} == {"late", "cleaned"}
