"""Sweeps on the command line: each job has its folder, and the fault of one is not the others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchvlm.errors import ExitCode
from tests.test_cli import command, rows_of


def sweep(cwd: Path, *overrides: str) -> Any:
    fixed = ["data.max_rows=1", "generation.max_new_tokens=1", "runtime.num_workers=0"]
    return command("run", "-m", *fixed, *overrides, cwd=cwd)


def test_a_sweep_runs_every_job_though_one_fails(tmp_path: Path) -> None:
    done = command(
        "run",
        "-m",
        "data.max_rows=2",
        "runtime.num_workers=0",
        "data.columns.image=image,no_column",
        "output.dir=out-${hydra:job.num}",
        cwd=tmp_path,
    )
    assert done.returncode == ExitCode.USAGE
    assert len(rows_of(tmp_path / "out-0")) == 2
    assert done.stderr.count("batchvlm: error: ") == 1


@pytest.mark.parametrize(
    ("overrides", "keys", "suffix"),
    [
        (["generation.seed=1,2"], "generation.seed", "${generation.seed}"),
        (
            ["generation=greedy,sample", "model.max_image_pixels=range(4096,4099)"],
            "generation, model.max_image_pixels",
            "${hydra:runtime.choices.generation}-${model.max_image_pixels}",
        ),
        (
            ["task=caption,vqa", "data.max_rows=1,2"],
            "data.max_rows",
            "${data.max_rows}",
        ),
    ],
)
def test_a_sweep_into_one_folder_is_refused_before_its_first_job(
    tmp_path: Path, overrides: list[str], keys: str, suffix: str
) -> None:
    done = sweep(tmp_path, *overrides)
    assert done.returncode == ExitCode.USAGE
    own = f'output.dir="outputs/${{data.name}}-${{task.name}}-{suffix}"'
    assert done.stderr == (
        f"batchvlm: error: the jobs of this sweep differ in {keys} and share "
        "output.dir=outputs/demo-caption, which holds one run; give each job its own folder: "
        f"'{own}'\n"
    )
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.soak
def test_a_sweep_over_folders_of_their_own_runs(tmp_path: Path) -> None:
    done = sweep(tmp_path, "generation.seed=1,2", 'output.dir="out-${generation.seed}"')
    assert done.returncode == ExitCode.DONE, done.stderr
    assert [len(rows_of(tmp_path / f"out-{seed}")) for seed in (1, 2)] == [1, 1]
    # The tasks of an array share one folder, and so does what changes no answer.
    done = sweep(tmp_path, "runtime.num_tasks=2", "runtime.task_id=0,1", "output.dir=array")
    assert done.returncode == ExitCode.DONE, done.stderr
    done = sweep(tmp_path, "generation.seed=1,2", "output.on_mismatch=new_folder", "output.dir=new")
    assert done.returncode == ExitCode.DONE, done.stderr
    assert len(list(tmp_path.glob("new*"))) == 2


def test_a_mistake_in_a_sweep_is_said_as_in_a_job(tmp_path: Path) -> None:
    for wrong, words in (("generation.sed=1,2", "generation.sed"), ("task=caption,no", "task")):
        done = sweep(tmp_path, wrong)
        assert done.returncode == ExitCode.USAGE
        assert words in done.stderr and "Traceback" not in done.stderr
