from __future__ import annotations

import io
import logging
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchvlm.errors import ConfigError, ErrorType
from batchvlm.output import schema as schema_module
from batchvlm.output.folder import OutputFolder
from batchvlm.output.schema import kept_fields, output_schema, to_table
from batchvlm.output.writer import ShardWriter
from batchvlm.records import Failure, Shard, Status

from .make import PROVENANCE, make_plan, make_result

SHARD = make_plan(2, 300)[0]


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    schema_module._warn_unfit.cache_clear()


def test_columns_stand_in_the_documented_order() -> None:
    sizes = pa.list_(pa.struct([("width", pa.int32()), ("height", pa.int32())]))
    kept = [pa.field("image", pa.binary()), pa.field("n", pa.uint8())]
    assert output_schema(kept, generated_texts=True, token_ids=True, logprobs=True) == pa.schema(
        [
            ("id", pa.string()),
            ("row_index", pa.int64()),
            ("source_file", pa.string()),
            ("image", pa.binary()),
            ("n", pa.uint8()),
            ("status", pa.string()),
            ("error_type", pa.string()),
            ("error_message", pa.string()),
            ("attempts", pa.int32()),
            ("generated_text", pa.string()),
            ("generated_texts", pa.list_(pa.string())),
            ("finish_reasons", pa.list_(pa.string())),
            ("token_ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float32())),
            ("parsed", pa.string()),
            ("json_valid", pa.bool_()),
            ("finish_reason", pa.string()),
            ("prompt_tokens", pa.int32()),
            ("image_tokens", pa.int32()),
            ("completion_tokens", pa.int32()),
            ("num_images", pa.int32()),
            ("image_sizes", sizes),
            ("model", pa.string()),
            ("fingerprint", pa.string()),
            ("run_id", pa.string()),
            ("latency_s", pa.float64()),
        ]
    )
    asked = {"generated_texts", "finish_reasons", "token_ids", "logprobs"}
    assert not asked & set(output_schema([]).names)


@pytest.mark.parametrize("name", ["id", "generated_text", "token_ids", "logprobs", "model"])
def test_a_kept_column_with_a_name_of_ours_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"output\.keep_columns.*'{name}'"):
        output_schema([pa.field(name, pa.string())], token_ids=False)


def test_who_wants_to_keep_the_key_is_told_how() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\.id=id makes it the output's"):
        output_schema([pa.field("id", pa.int64())])


def test_a_kept_column_named_twice_is_refused() -> None:
    field = pa.field("x", pa.string())
    with pytest.raises(ConfigError, match=r"output\.keep_columns.*'x' is there twice"):
        output_schema([field, field], token_ids=False)


def test_a_type_that_parquet_lacks_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"output\.keep_columns.*'x'.*month_day_nano"):
        output_schema([pa.field("x", pa.month_day_nano_interval())], token_ids=False)


def test_an_unknown_kept_column_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"output\.keep_columns.*'y'.*it has: x"):
        kept_fields(pa.schema([("x", pa.string())]), ["y"])


def test_values_of_a_success_and_an_error() -> None:
    schema = output_schema([pa.field("label", pa.int16(), nullable=False)], token_ids=True)
    failure = Failure(error_type=ErrorType.TOO_LARGE, message="too many pixels")
    error = make_result(SHARD, 3, kept={}, status=Status.ERROR, failure=failure, attempts=2)
    good, bad = to_table([make_result(SHARD, 0), error], schema, PROVENANCE).to_pylist()
    assert good["id"] == "in-0.parquet:0"
    assert (good["status"], good["error_type"], good["attempts"]) == ("success", None, 1)
    assert (good["finish_reason"], good["label"]) == ("stop", 0)
    assert good["image_sizes"] == [{"width": 64, "height": 0}]
    assert good["token_ids"] == list(make_result(SHARD, 0).token_ids or ())
    assert (bad["status"], bad["error_type"]) == ("error", "too_large")
    assert (bad["error_message"], bad["attempts"]) == ("too many pixels", 2)
    assert bad["generated_text"] is bad["label"] is bad["image_sizes"] is None
    assert (bad["model"], bad["fingerprint"], bad["run_id"]) == (
        "demo@1",
        "0123456789abcdef",
        "run-1",
    )


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("nul \x00 within", "nul \x00 within"),
        ("lone \ud800 half", "lone \ufffd half"),
        ("low \udc80", "low \ufffd"),
        ("joined \ud83d\ude00", "joined \U0001f600"),
        ("x" * 1_000_000, "x" * 1_000_000),
        ("", ""),
    ],
)
def test_any_text_survives_in_every_text_column(text: str, stored: str) -> None:
    schema = output_schema(
        [pa.field("s", pa.string()), pa.field("l", pa.list_(pa.string()))], token_ids=False
    )
    result = make_result(
        SHARD,
        0,
        id=text,
        source_file=text,
        generated_text=text,
        parsed=text,
        failure=Failure(error_type=ErrorType.ENGINE, message=text),
        kept={"s": text, "l": [text]},
    )
    sink = pa.BufferOutputStream()
    pq.write_table(to_table([make_result(SHARD, 1), result], schema, PROVENANCE), sink)
    row = pq.read_table(pa.BufferReader(sink.getvalue())).to_pylist()[1]
    for name in ("id", "source_file", "generated_text", "parsed", "error_message", "s"):
        assert row[name] == stored
    assert row["l"] == [stored]


@given(st.text(st.characters(exclude_categories=[]), max_size=20))
def test_text_is_changed_only_where_utf8_has_no_place_for_it(text: str) -> None:
    stored = schema_module._without_surrogates(text)
    assert stored.encode("utf-8").decode("utf-8") == stored
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert stored == joined
    if not any("\ud800" <= char <= "\udfff" for char in text):
        assert stored == text


@pytest.mark.parametrize(
    ("arrow_type", "good", "bad"),
    [
        (pa.int8(), 5, 300),
        (pa.int64(), 5, 1.5),
        (pa.int64(), 5, 2**70),
        (pa.int64(), 5, "x"),
        (pa.string(), "x", b"\xff"),
        (pa.list_(pa.int32()), [1], {"a": 1}),
        (pa.struct([("bytes", pa.binary())]), {"bytes": b"x"}, 3),
        (pa.timestamp("s"), None, "yesterday"),
    ],
    ids=str,
)
def test_a_kept_value_that_does_not_fit_is_null_and_said_once(
    arrow_type: pa.DataType, good: object, bad: object, caplog: pytest.LogCaptureFixture
) -> None:
    schema = output_schema([pa.field("k", arrow_type)], token_ids=False)
    kept = [good, bad, good, bad]
    results = [make_result(SHARD, row, kept={"k": value}) for row, value in enumerate(kept)]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            table = to_table(results, schema, PROVENANCE)
            assert table["k"].to_pylist() == [good, None, good, None]
            assert table["row_index"].to_pylist() == [0, 1, 2, 3]
    assert len(caplog.records) == 1
    assert "'k'" in caplog.text


def test_a_float_that_is_an_integer_fits_an_integer_column() -> None:
    schema = output_schema([pa.field("k", pa.int64())], token_ids=False)
    table = to_table([make_result(SHARD, 0, kept={"k": 2.0})], schema, PROVENANCE)
    assert table["k"].to_pylist() == [2]


def test_kept_images_of_a_hugging_face_dataset_load_as_images(tmp_path: Path) -> None:
    pixels = [Image.fromarray(np.full((4, 6, 3), i, np.uint8)) for i in range(3)]
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "owl"]),
            "unused": datasets.Value("string"),
        }
    )
    columns = {"photo": pixels, "label": [2, 0, 1], "unused": ["a", "b", "c"]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "in.parquet")
    source = pq.read_table(tmp_path / "in.parquet")

    schema = output_schema(kept_fields(source.schema, ["label", "photo"]), token_ids=False)
    shard = Shard(index=0, source_file="in", first_row=0, num_rows=3, first_row_index=0)
    folder = OutputFolder(tmp_path / "out")
    writer = ShardWriter(folder, shard, 1, schema, PROVENANCE, flush_every_s=0)
    for row, values in enumerate(source.to_pylist()):
        kept = {} if row == 1 else {name: values[name] for name in ("label", "photo")}
        writer.add(make_result(shard, row, kept=kept))
    writer.commit()

    loaded = datasets.load_dataset(
        "parquet", data_dir=str(folder.data), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.column_names == schema.names
    assert loaded.features["photo"] == datasets.Image()
    assert loaded.features["label"].names == ["cat", "dog", "owl"]
    assert loaded[0]["photo"].size == (6, 4)
    assert loaded[2]["photo"].getpixel((0, 0)) == (2, 2, 2)
    assert loaded[1]["photo"] is None


def test_a_kept_image_column_without_metadata_loads_as_bytes(tmp_path: Path) -> None:
    field = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG")
    image = {"bytes": stream.getvalue(), "path": None}
    schema = output_schema([field], token_ids=False)
    table = to_table([make_result(SHARD, 0, kept={"image": image})], schema, PROVENANCE)
    pq.write_table(table, tmp_path / "part.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded[0]["image"] == image


def test_a_kept_value_of_no_one_type_is_json_text() -> None:
    """JSON lines type such a column as string; the row's value is whatever its line held."""
    schema = output_schema([pa.field("extra", pa.string())], token_ids=False)
    values = ["plain", {"a": [1, "é"]}, [1, None], 3, None, True]
    (shard,) = make_plan(1, len(values))
    rows = [make_result(shard, row, kept={"extra": value}) for row, value in enumerate(values)]
    kept = to_table(rows, schema, PROVENANCE)["extra"].to_pylist()
    assert kept == ["plain", '{"a": [1, "é"]}', "[1, null]", "3", None, "true"]
