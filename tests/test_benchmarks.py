"""What measures runs here too, at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm import demo
from batchvlm.demo.questions import held_out

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_gpu_benchmark_measures_all_that_it_promises(tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    command = [
        *(sys.executable, str(BENCHMARKS / "gpu.py"), "--shape", "tiny", "--device", "cpu"),
        *("--rows", "12", "--warm-up-rows", "4", "--baseline-rows", "8", "--width", "12"),
        *("--dtype", "float32", "--json", str(written)),
        *("--set", "runtime.num_workers=0", "--set", "engine.compile=false"),
    ]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(written.read_text(encoding="utf-8"))
    for system in ("batchvlm", "sorted", "pipeline"):
        assert found[system]["wall_s"] > 0
        assert found[system]["tokens"] >= found[system]["rows"] > 0
        assert system.replace("batchvlm", "batchvlm, slots") in done.stdout
    mine, roof = found["batchvlm"], found["roofline"]
    assert mine["rows"] == 12
    assert mine["row_steps"] == mine["tokens"] - 12
    assert roof["all"] == pytest.approx(roof["vision"] + roof["prefill"] + roof["decode"])
    assert 0 < roof["all"] < mine["wall_s"]


@pytest.mark.soak
def test_two_processes_answer_the_rows_of_one(tmp_path: Path) -> None:
    items = [item for item in held_out(2) if len(item.images) == 1][:5]
    rows = [
        {
            "id": f"r{i}",
            "image": {"bytes": item.images[0], "path": None},
            "prompt": item.question,
            "max_new_tokens": 3 + i,
        }
        for i, item in enumerate(items)
    ]
    work = tmp_path / "work.parquet"
    pq.write_table(pa.Table.from_pylist(rows), work)

    def answered(processes: int) -> dict[str, Any]:
        command = [
            *(sys.executable, str(BENCHMARKS / "answer.py"), "--model", str(demo.MODEL_DIR)),
            *("--work", str(work), "--processes", str(processes)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    one, two = answered(1), answered(2)
    assert {key: len(ids) for key, ids in one["answers"].items()} == {
        row["id"]: row["max_new_tokens"] for row in rows
    }
    assert two["answers"] == one["answers"]
    # The first token of a row comes of its prompt.
    assert two["row_steps"] == one["row_steps"] == sum(row["max_new_tokens"] - 1 for row in rows)


def test_the_parts_of_a_gpus_work_are_measured_alone(tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(BENCHMARKS / "gpu_parts.py"), "--shape", "tiny", "--device", "cpu"),
        *("--images", "2", "--side", "112", "--prompts", "3", "--prompt", "40", "--context", "60"),
        *("--rows", "4", "8", "--repeat", "2", "--dtype", "float32", "--no-compile"),
        *("--profile", str(tmp_path / "profile")),
    ]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines() if line.startswith("| ")]
    parts = [title.strip() for title, _, _ in rows[1:]]
    assert parts == ["2 images", "3 prompts", "a step of 4 rows", "a step of 8 rows"]
    assert all(float(ms) > float(roof) > 0 for _, ms, roof in rows[1:])
    written = {path.stem for path in (tmp_path / "profile").iterdir()}
    assert written == {part.replace(" ", "-") for part in parts}
