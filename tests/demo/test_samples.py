import io
import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from jsonschema import Draft202012Validator
from PIL import Image, ImageOps, UnidentifiedImageError

from batchvlm.demo import SAMPLES_PATH, SCHEMA_PATH, questions, samples, world


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(SAMPLES_PATH).to_pylist()}


def decode(row: dict[str, Any]) -> Image.Image:
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    image.load()
    return image


def test_the_bundled_file_is_what_the_script_writes(rows: dict[str, dict[str, Any]]) -> None:
    built = samples.build_samples()
    bundled = pq.read_table(SAMPLES_PATH)
    assert bundled.schema.equals(built.schema, check_metadata=True)
    assert bundled.drop_columns("image").equals(built.drop_columns("image"))
    for row in built.to_pylist():
        if row["id"].startswith("scene"):
            # Pixels, because another version of an encoder may write other bytes.
            now, then = (np.asarray(decode(r), np.int64) for r in (row, rows[row["id"]]))
            assert np.abs(now - then).mean() < 2


def test_the_file_is_small_and_has_several_row_groups() -> None:
    assert SAMPLES_PATH.stat().st_size < 400_000
    assert pq.ParquetFile(SAMPLES_PATH).num_row_groups > 1


def test_datasets_shows_images() -> None:
    metadata = pq.read_schema(SAMPLES_PATH).metadata[b"huggingface"]
    features = json.loads(metadata)["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert list(features) == ["id", "image", "question", "answer", "caption", "objects"]


def test_good_rows_decode_and_tell_the_truth(rows: dict[str, dict[str, Any]]) -> None:
    good = [row for name, row in rows.items() if name.startswith("scene")]
    assert len(good) == samples.NUM_GOOD_ROWS
    validator = Draft202012Validator(json.loads(SCHEMA_PATH.read_text()))
    templates = [t for kind in questions.VQA_KINDS for t in questions.TEMPLATES[kind]]
    for row in good:
        assert decode(row).format == ("JPEG" if row["image"]["path"].endswith("jpg") else "PNG")
        objects = json.loads(row["objects"])
        validator.validate(objects)
        scene = world.Scene(
            objects=tuple(
                world.Object(
                    shape=obj["shape"],
                    color=obj["color"],
                    size=obj["size"],
                    cell=world.POSITIONS.index(obj["position"]),
                )
                for obj in objects["objects"]
            ),
            background="light",
        )
        assert row["caption"] == questions.caption(scene)
        assert row["answer"]
        assert any(row["question"].startswith(t.split("{")[0]) for t in templates)


def test_the_rotated_row_is_upright_once_transposed(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["scene-13-rotated"]
    stored = decode(row)
    assert stored.getexif()[0x0112] == 6
    upright = ImageOps.exif_transpose(stored)
    assert (stored.width, stored.height) == (upright.height, upright.width)
    pixels = np.asarray(upright, np.int64)
    for obj in json.loads(row["objects"])["objects"]:
        row_index, column = divmod(world.POSITIONS.index(obj["position"]), 3)
        height, width = upright.height // 3, upright.width // 3
        cell = pixels[row_index * height :, column * width :][:height, :width]
        assert (np.abs(cell - world.COLORS[obj["color"]]).max(-1) < 30).mean() > 0.02


def test_broken_rows_stand_among_the_good_ones(rows: dict[str, dict[str, Any]]) -> None:
    names = list(rows)
    broken = [name for name in names if name.startswith("broken")]
    assert len(broken) == 5
    assert names[-1].startswith("scene")
    assert all(names[names.index(name) - 1].startswith("scene") for name in broken)
    assert all(rows[name]["answer"] is None for name in broken)


def test_each_broken_row_is_broken_as_its_name_says(
    rows: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow's own limit, which another test's code may have lifted for this process.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)
    with pytest.raises(OSError, match="truncated"):
        decode(rows["broken-truncated"])
    with pytest.raises(UnidentifiedImageError):
        decode(rows["broken-not-an-image"])
    with pytest.raises(Image.DecompressionBombError):
        decode(rows["broken-bomb"])
    assert len(rows["broken-bomb"]["image"]["bytes"]) < 100
    assert rows["broken-no-image"]["image"] is None
    assert rows["broken-missing-file"]["image"]["bytes"] is None
    assert rows["broken-missing-file"]["image"]["path"]


def test_the_schema_refuses_what_the_world_has_not() -> None:
    schema = json.loads(SCHEMA_PATH.read_text())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    item = {"shape": "star", "color": "red", "size": "small", "position": "top"}
    assert validator.is_valid({"objects": [item], "count": 1})
    for wrong in (
        {"objects": [], "count": 1},
        {"objects": [item] * 5, "count": 4},
        {"objects": [item], "count": 5},
        {"objects": [item], "count": 1, "extra": 0},
        {"objects": [{**item, "color": "pink"}], "count": 1},
        {"objects": [{**item, "extra": 0}], "count": 1},
        {"objects": [{"shape": "star"}], "count": 1},
    ):
        assert not validator.is_valid(wrong)
    properties = schema["properties"]["objects"]["items"]["properties"]
    assert {name: tuple(rule["enum"]) for name, rule in properties.items()} == {
        "shape": world.SHAPES,
        "color": world.COLOR_NAMES,
        "size": world.SIZES,
        "position": world.POSITIONS,
    }
