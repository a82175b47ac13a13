"""What measures on a GPU runs here too, at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def test_the_gpu_benchmark_measures_all_that_it_promises(tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    command = [
        *(sys.executable, str(SCRIPT), "--shape", "tiny", "--device", "cpu"),
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
