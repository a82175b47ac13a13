"""Plans and results for these tests, the same for the same arguments."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from batchvlm.config import RetryConfig
from batchvlm.errors import ErrorType
from batchvlm.output.folder import OutputFolder
from batchvlm.output.parts import failures_in_parts, shards_to_retry
from batchvlm.output.run_file import RunFile
from batchvlm.output.schema import Provenance, output_schema
from batchvlm.output.writer import ShardWriter
from batchvlm.records import Failure, FinishReason, Result, Shard, Status

PROVENANCE = Provenance(model="demo@1", fingerprint="0123456789abcdef", run_id="run-1")
KEPT = [pa.field("label", pa.int16()), pa.field("blob", pa.binary())]
SCHEMA = output_schema(KEPT, token_ids=True)


def to_retry(
    folder: OutputFolder, run: RunFile, wanted: Collection[int], policy: RetryConfig
) -> set[int]:
    """The shards that a run with this policy answers again."""
    failures = failures_in_parts(folder, run.plan, run.fingerprint, wanted)
    return shards_to_retry(folder, failures, wanted, policy)


def make_plan(num_shards: int, num_rows: int) -> list[Shard]:
    """Shards of `num_rows` rows, two of each file, the last one shorter."""
    return [
        Shard(
            index=i,
            source_file=f"in-{i // 2}.parquet",
            first_row=i % 2 * num_rows,
            num_rows=num_rows if i < num_shards - 1 else max(1, num_rows // 3),
            first_row_index=i * num_rows,
        )
        for i in range(num_shards)
    ]


def make_result(shard: Shard, row: int, **changes: Any) -> Result:
    """A row's result; every seventh row is an error."""
    index = shard.first_row_index + row
    draw = random.Random(index)
    values: dict[str, Any] = {
        "row": row,
        "row_index": index,
        "source_file": shard.source_file,
        "id": f"{shard.source_file}:{shard.first_row + row}",
        "kept": {"label": index % 1000, "blob": draw.randbytes(draw.randrange(200))},
    }
    if index % 7 == 3:
        failure = Failure(error_type=ErrorType.DECODE, message=f"row {index} is no image")
        values |= {"status": Status.ERROR, "failure": failure}
    else:
        text = "".join(draw.choices("abc \x00é☃\U0001f600", k=draw.randrange(300)))
        values |= {
            "status": Status.SUCCESS,
            "generated_text": text,
            "token_ids": tuple(draw.choices(range(500), k=5)),
            "finish_reason": FinishReason.STOP,
            "prompt_tokens": 12,
            "completion_tokens": 5,
            "num_images": 1,
            "image_sizes": ((64, index),),
            "latency_s": index / 7,
        }
    return Result(**values | changes)


def open_writer(folder: OutputFolder, plan: list[Shard], index: int, **kwargs: Any) -> ShardWriter:
    options = {"flush_every_s": 1e9} | kwargs
    return ShardWriter(folder, plan[index], len(plan), SCHEMA, PROVENANCE, **options)


def undisturbed(plan: list[Shard], path: Path) -> pa.Table:
    """The output of a job that nothing happens to."""
    folder = OutputFolder(path)
    for shard in plan:
        writer = open_writer(folder, plan, shard.index)
        for row in range(shard.num_rows):
            writer.add(make_result(shard, row))
        writer.commit()
    return read_data(folder)


def read_data(folder: OutputFolder) -> pa.Table:
    """The output as a reader sees it, parts in the order of their names."""
    return ds.dataset(folder.data, format="parquet").to_table().replace_schema_metadata()
