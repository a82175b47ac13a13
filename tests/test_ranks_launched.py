"""Two ranks by `accelerate launch`, the demo model, and what one process answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.demo.questions import held_out
from batchvlm.output.folder import OutputFolder
from batchvlm.output.verify import verify
from batchvlm.pipeline.pipeline import run_job
from batchvlm.settings.compose import compose
from tests.conftest import IMAGE
from tests.fetch.server import image, serve
from tests.pipeline.test_pipeline import answers, rows_of

pytestmark = pytest.mark.soak

WORKER = Path(__file__).with_name("ranks_worker.py")
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
]
SETTINGS = ["data=parquet", "output.rows_per_shard=2", "runtime.num_workers=1"]


def rows_by_rank(out: Path) -> list[int]:
    """Rows that each rank answered, by what the ranks left in the folder."""
    counts: dict[str, int] = {}
    for path in out.glob("_batchvlm/metrics/*.json"):
        rank = path.name.partition("rank-")[2][:3]
        counts[rank] = counts.get(rank, 0) + json.loads(path.read_bytes())["num_rows"]
    return [counts[rank] for rank in sorted(counts)]


def launch(tmp_path: Path, settings: Sequence[str]) -> Path:
    """The output of two ranks."""
    out, meeting = tmp_path / "out", tmp_path / "meeting"
    meeting.mkdir()
    done = subprocess.run(
        [*LAUNCH, str(WORKER), "run", *settings, f"output.dir={out}"],
        env=os.environ | {"MEETING": str(meeting)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    counts = rows_by_rank(out)
    assert len(counts) == 2 and min(counts) >= 1, counts
    return out


def check(out: Path, alone: Path, num_rows: int) -> list[dict[str, Any]]:
    """See that every row is there once, and says what it says in a run of one process."""
    assert verify(OutputFolder(out)).faults == []
    rows = rows_of(out)
    assert [row["row_index"] for row in rows] == list(range(num_rows))
    assert answers(out) == answers(alone)
    return rows


def test_dialogs_over_two_ranks(tmp_path: Path) -> None:
    items = [item for item in held_out(12) if len(item.images) == 1]
    of_rows = [[i for i in items if i.scene_index == row][: 1 + row % 3] for row in range(12)]
    turns = [json.dumps([item.question for item in row]) for row in of_rows]
    images = pa.array([{"bytes": row[0].images[0], "path": None} for row in of_rows], IMAGE)
    pq.write_table(pa.table({"turns": turns, "image": images}), tmp_path / "in.parquet")
    settings = [*SETTINGS, f"data.path={tmp_path / 'in.parquet'}", "task=dialog"]
    settings += ["data.columns.turns=turns", "generation.max_new_tokens=128"]
    run_job(compose("run", [*settings, f"output.dir={tmp_path / 'alone'}"]))
    rows = check(launch(tmp_path, settings), tmp_path / "alone", 12)
    assert [len(row["generated_texts"]) for row in rows] == [len(row) for row in of_rows]
    assert rows[0]["generated_texts"][0] == of_rows[0][0].answer


def test_images_by_address_over_two_ranks(tmp_path: Path) -> None:
    items = [item for item in held_out(12) if len(item.images) == 1 and item.kind == "caption"]
    pictures: dict[str, Any] = {f"/{i}.png": image(it.images[0]) for i, it in enumerate(items)}
    names = [*pictures, "/gone.png", "/broken.png"]
    pictures["/broken.png"] = image(b"no image")
    with serve(pictures) as server:
        urls = [server.url(name) for name in names]
        pq.write_table(pa.table({"image": urls}), tmp_path / "in.parquet")
        settings = [*SETTINGS, f"data.path={tmp_path / 'in.parquet'}", "data.allow_remote=true"]
        settings += ["data.allow_hosts=[127.0.0.1]"]
        run_job(compose("run", [*settings, f"output.dir={tmp_path / 'alone'}"]))
        before = dict(server.seen)
        out = launch(tmp_path, settings)
        # Each rank fetches the images of its own rows and no others.
        assert server.seen == {name: 2 * count for name, count in before.items()}
    rows = check(out, tmp_path / "alone", len(names))
    assert [row["error_type"] for row in rows[-2:]] == ["missing_image", "decode"]
    right = [row["generated_text"] == it.answer for row, it in zip(rows, items, strict=False)]
    assert len(items) >= 10 and sum(right) >= 0.9 * len(items)


def test_a_device_map_in_each_of_two_ranks(tmp_path: Path) -> None:
    items = [item for item in held_out(12) if len(item.images) == 1 and item.kind == "caption"]
    images = pa.array([{"bytes": item.images[0], "path": None} for item in items], IMAGE)
    pq.write_table(pa.table({"image": images}), tmp_path / "in.parquet")
    settings = [*SETTINGS, f"data.path={tmp_path / 'in.parquet'}", "engine=generate"]
    run_job(compose("run", [*settings, f"output.dir={tmp_path / 'alone'}"]))
    rows = check(
        launch(tmp_path, [*settings, "model.device_map=auto"]), tmp_path / "alone", len(items)
    )
    assert {row["status"] for row in rows} == {"success"}
