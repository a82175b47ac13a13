"""Write the bundled samples: `python -m batchvlm.demo.samples`.

Good rows have a question with its correct answer, the correct caption and the correct JSON. Between
them are rows that are broken as in real datasets. Their answers are null, and each must still yield
exactly one output row.
"""

import argparse
import json
import struct
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import Generator
from PIL import ExifTags, Image

from batchvlm.demo import SAMPLES_PATH, questions, world
from batchvlm.demo.questions import SAMPLES_STREAM, VQA_KINDS, Question
from batchvlm.demo.world import Scene

NUM_GOOD_ROWS: Final = 24
BOMB_SIDE: Final = 30_000
# So that even this small file has several row groups.
_ROWS_PER_GROUP: Final = 8
_ROTATED_ROW: Final = 13
_ORIENTATION_ROTATE_RIGHT: Final = 6

# The `datasets` library stores images in this Arrow type, with the feature Image in the metadata.
_SCHEMA: Final = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "question": pa.string(),
        "answer": pa.string(),
        "caption": pa.string(),
        "objects": pa.string(),
    }
)


def build_samples() -> pa.Table:
    """Build the table of good and broken rows; it is always the same."""
    rng = np.random.default_rng([SAMPLES_STREAM])
    broken = _broken_rows(rng)
    rows = []
    for index in range(NUM_GOOD_ROWS):
        rows.append(_good_row(index, rng))
        if index % 5 == 2:
            rows.append(broken.pop(0))
    assert not broken
    features: dict[str, dict[str, str]] = {
        name: {"dtype": "string", "_type": "Value"} for name in _SCHEMA.names
    }
    features["image"] = {"_type": "Image"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(metadata))


def write_samples(path: Path) -> None:
    """Write the table as Parquet."""
    pq.write_table(
        build_samples(),
        path,
        row_group_size=_ROWS_PER_GROUP,
        compression="none",  # the images are compressed already
        write_statistics=False,  # they would contain whole images again
    )


def _good_row(index: int, rng: Generator) -> dict[str, Any]:
    scene = world.draw_scene(rng)
    question = _draw_question(scene, index, rng)
    if index == _ROTATED_ROW:
        name = f"scene-{index:02}-rotated"
        path, encoded = f"{name}.jpg", _encode_rotated(world.render(scene, rng, 256, 192))
    else:
        name = f"scene-{index:02}"
        picture = world.render(scene, rng, *world.draw_size(rng))
        if index % 2:
            path, encoded = f"{name}.jpg", world.encode_jpeg(picture, 90)
        else:
            path, encoded = f"{name}.png", world.encode_png(picture)
    return {
        "id": name,
        "image": {"bytes": encoded, "path": path},
        "question": question.text,
        "answer": question.answer,
        "caption": questions.caption(scene),
        "objects": questions.objects_json(scene),
    }


def _draw_question(scene: Scene, index: int, rng: Generator) -> Question:
    """Sample a question; the kind depends on `index`, and kinds that do not fit are skipped."""
    for offset in range(len(VQA_KINDS)):
        question = questions.ask(scene, VQA_KINDS[(index + offset) % len(VQA_KINDS)], rng)
        if question is not None:
            return question
    raise AssertionError("some kinds, such as count, fit every scene")


def _broken_rows(rng: Generator) -> list[dict[str, Any]]:
    picture = world.encode_jpeg(world.render(world.draw_scene(rng), rng, 224, 224), 90)
    images: dict[str, dict[str, Any] | None] = {
        "truncated": {"bytes": picture[: len(picture) // 2], "path": "truncated.jpg"},
        "not-an-image": {
            "bytes": b"<!DOCTYPE html><title>404 Not Found</title>",
            "path": "not-an-image.jpg",
        },
        "no-image": None,
        "bomb": {"bytes": _encode_bomb(), "path": "bomb.png"},
        "missing-file": {"bytes": None, "path": "no-such-folder/no-such-file.png"},
    }
    return [
        {
            "id": f"broken-{name}",
            "image": image,
            "question": "How many shapes are there?",
            "answer": None,
            "caption": None,
            "objects": None,
        }
        for name, image in images.items()
    ]


def _encode_rotated(picture: Image.Image) -> bytes:
    """Encode a JPEG like a phone's: pixels rotated to the left, and an EXIF tag to undo that."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = _ORIENTATION_ROTATE_RIGHT
    return world.encode_jpeg(picture.transpose(Image.Transpose.ROTATE_90), 90, exif=exif)


def _encode_bomb() -> bytes:
    """Return a PNG of under 100 bytes whose header claims 900 million pixels."""
    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    encoded = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        checksum = zlib.crc32(kind + data)
        encoded += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return encoded


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=SAMPLES_PATH)
    write_samples(parser.parse_args().output)


if __name__ == "__main__":
    main()
