"""Images from an enemy: each is right, or the error of its row, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchvlm.errors import RowError
from batchvlm.preprocess.images import load_image
from batchvlm.records import ImageRef, Sample
from tests.conftest import picture
from tests.hostile.damage import every_case
from tests.hostile.files import Case, large, scene
from tests.pipeline.test_pipeline import FakeEngine, Writer, rows_of, run

MAX_SOURCE_PIXELS = 8_000_000
MIB = 1 << 20

# The stated bounds: bytes of memory for each pixel that `data.max_source_pixels` lets in. Four of
# them are the decoded image; the rest is the decoder's own.
MAX_BYTES_PER_PIXEL = 28
BYTES_PER_PIXEL = {"JPEG2000": 28, "WebP": 20, "AVIF": 16, "CMYK JPEG": 16}
OTHER_BYTES_PER_PIXEL = 10

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads memory in /proc"
)


def load(data: bytes) -> np.ndarray[Any, Any]:
    image = load_image(
        ImageRef(data=data),
        image_root=None,
        max_image_bytes=1 << 28,
        max_source_pixels=MAX_SOURCE_PIXELS,
        max_pixels=1 << 20,
    )
    assert (image.mode, image.info) == ("RGB", {})
    return np.asarray(image)


def peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


def test_each_is_right_or_an_error() -> None:
    cases = every_case()
    assert len(cases) >= 300
    wrong = {}
    for case in cases:
        try:
            pixels = load(case.data)
        except RowError as error:
            if error.error_type not in case.errors or "\n" in error.message:
                wrong[case.name] = str(error)
            continue
        if case.shows is None:
            continue
        if pixels.shape != case.shows.shape:
            wrong[case.name] = f"{pixels.shape}, not {case.shows.shape}"
        elif (off := np.abs(pixels.astype(int) - case.shows).max()) > case.tolerance:
            wrong[case.name] = f"off by {off}"
    assert not wrong


@needs_proc
@pytest.mark.parametrize("case", list(large(MAX_SOURCE_PIXELS)), ids=lambda case: case.name)
def test_memory_is_bounded_by_the_pixels_let_in(case: Case) -> None:
    load(picture())
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is taken now
    before = peak_mib(os.getpid())
    load(case.data)
    taken = (peak_mib(os.getpid()) - before) * MIB
    bound = BYTES_PER_PIXEL.get(case.name.removeprefix("large "), OTHER_BYTES_PER_PIXEL)
    # The shrunk image is there four times: reduced, half resized, resized, as its own object.
    assert taken <= bound * MAX_SOURCE_PIXELS + 4 * 4 * (1 << 20)


class LookingEngine(FakeEngine):
    """Keeps what the model would see, and the peak memory of the worker processes."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels: dict[int, np.ndarray[Any, Any]] = {}
        self.peaks_mib: list[float] = []

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Any]]:
        def looked_at() -> Iterator[Sample]:
            for sample in samples:
                values = sample.features["pixel_values"].reshape(3, 96, 96)
                self.pixels[sample.row_index] = (values.transpose(1, 2, 0) + 1) * 127.5
                yield sample
            self.peaks_mib = [peak_mib(pid) for pid in workers_of(os.getpid())]

        return super().run(looked_at())


def children_of(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ended meanwhile
            children += map(int, (task / "children").read_text().split())
    return children


def workers_of(pid: int) -> list[int]:
    return [
        worker
        for child in children_of(pid)
        if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
        for worker in children_of(child)
    ]


def corners(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Colours at a tenth from each corner; [4, 3]."""
    height, width, _ = pixels.shape
    return np.array(
        [
            pixels[int(height * y), int(width * x)].astype(float)
            for y in (0.1, 0.9)
            for x in (0.1, 0.9)
        ]
    )


@needs_proc
def test_a_run_over_all_of_them(tmp_path: Path, write_parquet: Writer) -> None:
    """No row is lost, none ends or stops the run, and the model sees what the files show."""
    good = Case(name="good", data=picture(), shows=np.full((24, 32, 3), (255, 0, 0), np.uint8))
    cases = [
        case for i, hostile in enumerate(every_case()) for case in (hostile, good)[: 1 + i % 2]
    ]
    cases += large(MAX_SOURCE_PIXELS)
    source = write_parquet([case.data for case in cases], row_group_size=64)
    engine = LookingEngine()

    run(
        tmp_path / "out",
        source,
        f"data.max_source_pixels={MAX_SOURCE_PIXELS}",
        "output.rows_per_shard=200",
        "runtime.num_workers=1",
        engine=engine,
    )

    rows = rows_of(tmp_path / "out")
    assert [row["row_index"] for row in rows] == list(range(len(cases)))
    wrong = {}
    for index, (case, row) in enumerate(zip(cases, rows, strict=True)):
        if row["status"] == "error":
            if row["error_type"] not in case.errors:
                wrong[case.name] = row["error_message"]
        elif case.shows is not None:
            off = np.abs(corners(engine.pixels[index]) - corners(case.shows)).max()
            if off > case.tolerance + 12:
                wrong[case.name] = f"a corner is off by {off:.0f}"
    assert not wrong
    (peak,) = engine.peaks_mib
    # A worker is some 460 MiB of libraries, 760 with a build of torch for CUDA; what the largest
    # image takes comes on top.
    libraries_mib = 600 if torch.version.cuda is None else 900
    assert peak <= libraries_mib + MAX_BYTES_PER_PIXEL * MAX_SOURCE_PIXELS / MIB


def test_a_corner_is_told_from_another() -> None:
    """The comparison above would see a turned or mirrored picture."""
    pixels = scene(1)
    for turned in (pixels[::-1], pixels[:, ::-1], pixels[::-1, ::-1], pixels.transpose(1, 0, 2)):
        assert np.abs(corners(turned) - corners(pixels)).max() > 60
