"""The commands as a person types them: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchvlm import cli, demo
from batchvlm.cli import main, run_app
from batchvlm.errors import ConfigError, ExitCode, OutputError
from batchvlm.runtime.signals import Interrupted

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


NUM_LONG = 400


def long_job(folder: Path, images: int = NUM_LONG) -> list[str]:
    """A job of some seconds, in small shards, flushed often."""
    sample = [
        row for row in pq.read_table(demo.SAMPLES_PATH).to_pylist() if row["id"].startswith("scene")
    ]
    rows = [sample[i % len(sample)] | {"id": f"row-{i}"} for i in range(images)]
    rows[7]["image"] = {"bytes": b"no image", "path": None}
    schema = pq.read_schema(demo.SAMPLES_PATH)
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "in.parquet")
    return [
        "run", "task=vqa", "data=parquet", f"data.path={folder / 'in.parquet'}",
        "data.columns.id=id", "generation.max_new_tokens=8", "output.rows_per_shard=100",
        "output.flush_every_s=0.2", "batching.max_batch_size=8", "batching.sort_window=32",
        "runtime.num_workers=1",
    ]  # fmt: skip


def settled(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in {"run_id", "latency_s"}} for row in rows_of(out)
    ]


def num_on_disk(out: Path) -> int:
    """Different rows in parts and segments; a file may vanish while we look."""
    found: set[int] = set()
    # Not pathlib's: before Python 3.13 it fails where a folder is removed meanwhile.
    for path in glob(f"{out}/data/*.parquet") + glob(f"{out}/_batchvlm/segments/*/*.parquet"):
        try:
            found.update(pq.read_table(path, columns=["row_index"])["row_index"].to_pylist())
        except (OSError, ValueError):
            continue
    return len(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the input of `long_job`, and in `undisturbed` what comes out of it."""
    folder = tmp_path_factory.mktemp("long")
    done = command(*long_job(folder), f"output.dir={folder / 'undisturbed'}", cwd=folder)
    assert done.returncode == ExitCode.DONE, done.stderr
    return folder


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.kill),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.kill),
    ],
)
def test_killed_half_way_and_run_again(
    tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    job = long_job(undisturbed)
    out = tmp_path / "out"
    chance = random.Random(int(number))
    aim = chance.randrange(40, NUM_LONG * 3 // 4)
    with subprocess.Popen(
        [*BATCHVLM, *job, f"output.dir={out}"], cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and num_on_disk(out) < aim:
            time.sleep(0.02)
        process.send_signal(number)
        if number == signal.SIGINT:
            process.send_signal(signal.SIGTERM)  # as launchers do
        code = process.wait(60)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else ExitCode.INTERRUPTED)
    before = num_on_disk(out)
    assert 40 <= before < NUM_LONG
    done = command(*job, f"output.dir={out}", cwd=tmp_path)
    assert done.returncode == ExitCode.DONE, done.stderr
    assert "were there already" in done.stdout
    assert settled(out) == settled(undisturbed / "undisturbed")
    assert [row["id"] for row in rows_of(out)] == [f"row-{i}" for i in range(NUM_LONG)]
    last_run = max((out / "_batchvlm" / "metrics").glob("*.json"))
    assert json.loads(last_run.read_text())["num_rows"] <= NUM_LONG - before
    assert not any((out / "_batchvlm" / "segments").iterdir())


@pytest.mark.kill
@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_terminal_that_is_closed(tmp_path: Path, undisturbed: Path, is_ignored: bool) -> None:
    """The run ends as by any signal; one that nohup started goes on, and is as good as any."""
    out = tmp_path / "out"
    job = [*long_job(undisturbed), f"output.dir={out}"]
    at_hangup = signal.SIG_IGN if is_ignored else signal.SIG_DFL
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [*BATCHVLM, *job],
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, at_hangup),
    ) as process:
        os.close(theirs)
        while process.poll() is None and num_on_disk(out) < 100:
            time.sleep(0.02)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        code = process.wait(120)
    assert code == (ExitCode.DONE if is_ignored else ExitCode.INTERRUPTED)
    before = num_on_disk(out)
    assert (before == NUM_LONG) is is_ignored
    assert command(*job, cwd=tmp_path).returncode == ExitCode.DONE
    assert settled(out) == settled(undisturbed / "undisturbed")


def children_of(pid: int) -> set[int]:
    return {
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if stat.exists() and int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid
    }


SLOW_FLUSH = """
import sys, time
from batchvlm.pipeline import collector
from batchvlm.cli import program
close = collector.Collector.close
def slow(self):
    print("closing", file=sys.stderr, flush=True)
    time.sleep(SECONDS)
    close(self)
collector.Collector.close = slow
if __name__ == "__main__":
    program()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("is_impatient", [pytest.param(True, marks=pytest.mark.kill), False])
def test_a_flush_that_takes_too_long(tmp_path: Path, is_impatient: bool) -> None:
    """A second Ctrl-C exits at once and says so; else the watchdog does, after `grace_s`."""
    program = tmp_path / "slow.py"
    program.write_text(SLOW_FLUSH.replace("SECONDS", "600"))
    out = tmp_path / "out"
    job = [*long_job(tmp_path), f"output.dir={out}", "runtime.grace_s=1"]
    if is_impatient:
        job[-1] = "runtime.grace_s=600"
    with subprocess.Popen(
        [sys.executable, str(program), *job], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and num_on_disk(out) < 30:
            time.sleep(0.02)
        children = children_of(process.pid)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line == "closing\n" and is_impatient:
                process.send_signal(signal.SIGINT)
        code = process.wait(60)
    if is_impatient:
        assert code == ExitCode.STOPPED == 130
        assert "stopped at once; rows that were not on disk yet" in said
    else:
        assert code == ExitCode.INTERRUPTED, said
        assert "still busy runtime.grace_s=1 after the signal" in said
        assert "finished rows are on disk; run the same command again" in said
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "a worker outlived the run"
        time.sleep(0.05)
    assert not list((out / "data").glob("*[!t]"))  # nothing but .parquet
    assert num_on_disk(out) >= 30


@pytest.mark.kill  # tests/test_ranks.py has ranks of one launch
def test_two_ranks_share_the_shards(tmp_path: Path) -> None:
    """What `accelerate launch` sets, set by hand: two processes on one machine."""
    job = [
        *long_job(tmp_path, images=120),
        "output.rows_per_shard=20",
        f"output.dir={tmp_path / 'out'}",
        "engine.device=cpu",
    ]
    ranks = [
        subprocess.Popen(
            [*BATCHVLM, *job], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                              "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": str(20000 + os.getpid() % 20000)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [row["row_index"] for row in rows_of(tmp_path / "out")] == list(range(120))
    counts = [
        json.loads(p.read_text())["num_rows"]
        for p in (tmp_path / "out" / "_batchvlm" / "metrics").glob("*.json")
    ]
    assert sum(counts) == 120 and len(counts) == 2


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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AttributeError("_flags"), ExitCode.INTERRUPTED),
        (ConfigError("defaults: '_flags'"), ExitCode.INTERRUPTED),  # by OmegaConf, in a finally
        (OSError("disk full"), ExitCode.FAILED),
        (OutputError("disk full"), ExitCode.FAILED),
    ],
)
def test_what_an_interruption_breaks_in_a_clean_up_is_no_error(
    error: Exception, expected: ExitCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> int:
        try:
            raise Interrupted
        finally:
            raise error

    monkeypatch.setattr(cli, "_run_hydra", interrupted)
    monkeypatch.setattr(cli, "catch_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["batchvlm"])
    assert cli.run_app("run", []) == expected


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
