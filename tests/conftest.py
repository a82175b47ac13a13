"""What many tests need: small pictures, small inputs, and a job's settings."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from batchvlm.records import Generation, Sample

# The tests share the machine's cores with worker processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Hypothesis times each example and each draw unless told otherwise; a busy machine is no failure.
settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("patient")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=40, help="how many commands tests/test_kills.py kills"
    )
    parser.addoption("--kill-seed", type=int, default=0, help="draws the instants of the kills")


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The file that holds an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(color: str = "red", size: tuple[int, int] = (32, 24)) -> bytes:
    """A one-coloured PNG."""
    return encode(Image.new("RGB", size, color))


def make_sample(row_index: int, num_tokens: int = 4, **generation: Any) -> Sample:
    """A sample of text alone."""
    return Sample(
        row_index=row_index,
        features={"input_ids": np.full((1, num_tokens), 7, dtype=np.int64)},
        image_tokens=0,
        image_sizes=(),
        generation=Generation(**({"max_new_tokens": 8} | generation)),
    )


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write rows with an `image` column to a Parquet file below tmp_path."""

    def write(
        images: Sequence[Any], name: str = "in.parquet", row_group_size: int = 8, **columns: Any
    ) -> Path:
        cells = [{"bytes": i, "path": None} if isinstance(i, bytes) else i for i in images]
        table = pa.table({"image": pa.array(cells, IMAGE), **columns})
        path = tmp_path / name
        pq.write_table(table, path, row_group_size=row_group_size)
        return path

    return write
