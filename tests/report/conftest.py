"""Inputs and outputs that several of these tests look at."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvlm.errors import ErrorType
from batchvlm.report.outputs import Output
from tests.conftest import IMAGE, picture
from tests.report.make import answered, extracted, failed, make_output, write_time_line

EVIL = "<script>alert(1)</script></script><img src=x onerror=alert(2)>"
NUM_ROWS = 60


def write_input(path: Path, num_rows: int = NUM_ROWS) -> Path:
    """Rows with a picture and a question; the images of every tenth are broken."""
    images = [
        {"bytes": b"broken" if row % 10 == 3 else picture(size=(40, 30)), "path": None}
        for row in range(num_rows)
    ]
    table = pa.table(
        {
            "id": [EVIL if row == 7 else f"row-{row:03d}" for row in range(num_rows)],
            "image": pa.array(images, IMAGE),
            "question": [
                "x</script><b>bold</b>" if row == 8 else f"What is in {row}?"
                for row in range(num_rows)
            ],
        }
    )
    pq.write_table(table, path, row_group_size=16)
    return path


def answer(row: int) -> dict[str, object]:
    if row % 10 == 3:
        return failed(ErrorType.DECODE, "6 bytes are no readable image")
    if row == 5:
        return failed(ErrorType.OOM, "too large: https://user:secret@host/x?sig=1")
    if row == 7:
        return answered(EVIL)
    if row == 9:
        return answered("long " * 400)
    return answered(f"A cat number {row}.", completion_tokens=5 + row, latency_s=0.1 + row / 10)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("report") / "in.parquet")


@pytest.fixture(scope="session")
def output(source: Path) -> Output:
    """A caption job with errors, hostile texts and a time line."""
    found = make_output(
        source.parent / "out",
        source,
        answer,
        "task.prompt='{{ question }}'",
        "output.rows_per_shard=16",
    )
    lines = [(1.7e9 + 10 * k, 6 * k, k, 60 * k, k) for k in range(11)]
    write_time_line(found.folder, "task-00000-rank-000-a", lines)
    return found


@pytest.fixture(scope="session")
def extract_output(source: Path) -> Output:
    """A job whose answers are JSON."""

    def fields(row: int) -> dict[str, object]:
        color = ("red", "blue")[row % 3 == 0]
        return extracted({"color": color, "count": row % 4, "parts": [{"name": EVIL}]})

    schema = "task.output.json_schema={type: object}"
    return make_output(source.parent / "extract", source, fields, schema, name="extract")
