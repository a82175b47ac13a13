"""Output folders as a run leaves them, without a model: the real settings, plan and writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from batchvlm.errors import ErrorType
from batchvlm.identity import answer_identity, model_name, output_layout
from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import find_run, save_run
from batchvlm.output.schema import Provenance, output_schema
from batchvlm.output.writer import ShardWriter
from batchvlm.plan import plan_shards
from batchvlm.records import Failure, FinishReason, Result, Status
from batchvlm.report.outputs import Output, open_output
from batchvlm.settings.compose import compose, to_plain
from batchvlm.sources import open_source

Answer = Callable[[int], dict[str, Any]]


def answered(text: str | None, **more: Any) -> dict[str, Any]:
    """What a row has that was answered."""
    return {
        "status": Status.SUCCESS,
        "generated_text": text,
        "finish_reason": FinishReason.STOP,
        "prompt_tokens": 20,
        "image_tokens": 16,
        "completion_tokens": len(text or ""),
        "num_images": 1,
        "latency_s": 0.25,
    } | more


def extracted(value: Any) -> dict[str, Any]:
    """What a row of an extract task has."""
    text = json.dumps(value)
    return answered(text, parsed=text, json_valid=True)


def failed(kind: ErrorType, message: str) -> dict[str, Any]:
    """What a row has that failed."""
    return {"status": Status.ERROR, "failure": Failure(error_type=kind, message=message)}


def make_output(
    root: Path,
    source: Path,
    answer: Answer,
    *overrides: str,
    name: str = "caption",
    leave_out: Sequence[int] = (),
    generated_texts: bool = False,
) -> Output:
    """Write the output of a job over a Parquet file whose key is its column `id`.

    Args:
        answer: row index -> the fields of its result.
        leave_out: shards that are not finished yet.
        generated_texts: whether rows may have several answers.
    """
    cfg = compose(
        name,
        [
            "data=parquet",
            f"data.path={source}",
            "data.columns.id=id",
            "model=demo",
            f"output.dir={root}",
            *overrides,
        ],
    )
    files = open_source(cfg.data).files()
    folder = OutputFolder(root)
    identity = answer_identity(cfg, files)
    run = find_run(
        folder,
        identity=identity,
        layout=output_layout(cfg),
        settings=to_plain(cfg),
        packages={"batchvlm": "0.1.0"},
        plan=plan_shards(files, rows_per_shard=cfg.output.rows_per_shard, max_rows=None),
    )
    save_run(folder, run)
    provenance = Provenance(
        model=model_name(cfg.model), fingerprint=run.fingerprint, run_id="run-1"
    )
    schema = output_schema([], generated_texts=generated_texts)
    ids = _ids(source)
    for shard in run.plan:
        if shard.index in leave_out:
            continue
        writer = ShardWriter(folder, shard, len(run.plan), schema, provenance, flush_every_s=1e9)
        for row in sorted(set(range(shard.num_rows)) - writer.finished_rows):
            index = shard.first_row_index + row
            writer.add(
                Result(
                    row=row,
                    row_index=index,
                    source_file=shard.source_file,
                    id=ids[index],
                    **answer(index),
                )
            )
        writer.commit()
    return open_output(root)


def _ids(source: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [str(value) for value in pq.read_table(source, columns=["id"])["id"].to_pylist()]


def write_time_line(folder: OutputFolder, name: str, lines: Sequence[Sequence[float]]) -> None:
    """A process's time line: rows of time, rows, errors, tokens, seconds waited."""
    keys = ("time_s", "num_rows", "num_errors", "completion_tokens", "wait_s")
    for line in lines:
        values = dict(zip(keys, line, strict=True)) | {"run_s": line[0] - lines[0][0]}
        folder.append_line(folder.metrics / f"{name}.jsonl", json.dumps(values).encode() + b"\n")
