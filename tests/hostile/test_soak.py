"""A long job: what it holds is bounded by settings, never by the number of rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

NUM_ROWS = 200_000
ROWS_PER_SHARD = 4096

# The stated bounds, in MiB: torch, transformers and the windows of rows between the stages.
MAX_OWN_MIB = 700
MAX_WORKER_MIB = 500
MAX_GROWTH_MIB = 50
"""Of any process from the first tenth of the job to any later one."""


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads memory in /proc")
def test_two_hundred_thousand_rows(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    command = [sys.executable, script, "--rows", str(NUM_ROWS), "--folder", tmp_path]
    # Both cores of the smallest machine, since no model wants one of them.
    subprocess.run([*command, "--workers", "2"], check=True)

    parts = sorted((tmp_path / "out" / "data").iterdir())
    assert len(parts) == -(-NUM_ROWS // ROWS_PER_SHARD)
    assert sum(pq.read_metadata(part).num_rows for part in parts) == NUM_ROWS
    table = ds.dataset(parts).to_table(columns=["row_index", "status"])
    assert table["row_index"].to_pylist() == list(range(NUM_ROWS))
    assert set(table["status"].to_pylist()) == {"success"}

    readings = json.loads((tmp_path / "readings.json").read_text())
    assert len(readings) == 10
    first = readings[0]
    for reading in readings:
        assert reading["own_mib"] <= min(MAX_OWN_MIB, first["own_mib"] + MAX_GROWTH_MIB), reading
        pairs = zip(reading["workers_mib"], first["workers_mib"], strict=True)
        assert len(reading["workers_mib"]) == 2
        for worker_mib, first_mib in pairs:
            assert worker_mib <= min(MAX_WORKER_MIB, first_mib + MAX_GROWTH_MIB), reading
    # The reading thread is done before the last row is.
    num_threads = [reading["num_threads"] for reading in readings]
    assert len(set(num_threads[:-1])) == 1 and num_threads[-1] <= num_threads[0], num_threads
    # At any moment a file of the input is open or not, and a part is being written or not.
    num_files = [reading["num_files"] for reading in readings]
    assert max(num_files) - min(num_files) <= 2, num_files
