"""Every input row yields exactly one output row, whatever happens on the way."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchvlm.batching import group_by_length
from batchvlm.config import BatchingConfig
from batchvlm.errors import (
    BatchvlmError,
    ConfigError,
    ErrorType,
    FingerprintError,
    InputError,
    ModelError,
    OutputError,
)
from batchvlm.output.compact import compact
from batchvlm.output.folder import OutputFolder
from batchvlm.output.verify import verify
from batchvlm.output.writer import ShardWriter
from batchvlm.pipeline.pipeline import Summary, run_job
from batchvlm.records import Completion, EngineStats, Failure, FinishReason, Sample
from batchvlm.settings.compose import compose
from batchvlm.sources.parquet import ParquetSource
from tests.conftest import picture


class FakeEngine:
    """Answers with the row's index, in a shuffled order; fails on the rows it is told to."""

    def __init__(self, failing: Iterable[int] = (), answer: str = "row {}") -> None:
        self.failing = set(failing)
        self.answer = answer
        self.seen: list[int] = []
        self.stats = EngineStats()

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        for batch in group_by_length(samples, BatchingConfig()):
            for sample in random.Random(0).sample(batch.samples, len(batch.samples)):
                index = sample.row_index
                self.seen.append(index)
                if index in self.failing:
                    yield index, Failure(error_type=ErrorType.ENGINE, message="told to fail")
                    continue
                yield (
                    index,
                    Completion(
                        row_index=index,
                        token_ids=(1, 2, index),
                        logprobs=(-0.5, -2.0, 0.0) if sample.generation.logprobs else None,
                        text=self.answer.format(index),
                        finish_reason=FinishReason.STOP,
                        latency_s=0.5,
                        alternatives=tuple(
                            Completion(
                                row_index=index,
                                token_ids=(9,),
                                text=f"or {n}",
                                finish_reason=FinishReason.LENGTH,
                                latency_s=0.5,
                            )
                            for n in range(1, sample.generation.num_return_sequences)
                        ),
                    ),
                )


def run(out: Path, source: Path, *overrides: str, engine: Any = None, name: str = "run") -> Summary:
    cfg = compose(
        name,
        [
            "data=parquet",
            f"data.path={source}",
            f"output.dir={out}",
            "output.rows_per_shard=10",
            "batching.sort_window=7",
            "runtime.num_workers=0",
            *overrides,
        ],
    )
    return run_job(cfg, engine=engine or FakeEngine())


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Every output row as readers find them: parts by name."""
    rows: list[dict[str, Any]] = ds.dataset(out / "data").to_table().to_pylist()
    return rows


def answers(out: Path) -> list[dict[str, Any]]:
    """Output rows without what differs between two runs of the same job."""
    volatile = {"run_id", "latency_s"}
    return [{k: v for k, v in row.items() if k not in volatile} for row in rows_of(out)]


Writer = Callable[..., Path]


def test_rows_come_out_once_in_order_good_or_bad(tmp_path: Path, write_parquet: Writer) -> None:
    images: list[Any] = [picture(size=(10 + i % 5, 10)) for i in range(37)]
    images[3], images[9], images[36] = b"no image", None, {"bytes": None, "path": "/etc/passwd"}
    source = write_parquet(images, name_column=[f"n{i}" for i in range(37)])
    summary = run(tmp_path / "out", source, engine=FakeEngine(failing=[5, 20]))
    rows = rows_of(tmp_path / "out")
    assert [row["row_index"] for row in rows] == list(range(37))
    assert [row["id"] for row in rows] == [f"in.parquet:{i}" for i in range(37)]
    errors = {row["row_index"]: row["error_type"] for row in rows if row["status"] == "error"}
    assert errors == {
        3: "decode",
        5: "engine",
        9: "missing_image",
        20: "engine",
        36: "forbidden",
    }
    for row in rows:
        if row["row_index"] in errors:
            assert row["generated_text"] is None and row["error_message"]
        else:
            assert row["generated_text"] == f"row {row['row_index']}"
            assert (row["error_type"], row["error_message"]) == (None, None)
            assert (row["finish_reason"], row["completion_tokens"]) == ("stop", 3)
            assert (row["num_images"], row["image_tokens"]) == (1, 36)
            assert row["image_sizes"] == [{"width": 96, "height": 96}]
    metrics = summary.metrics
    assert (summary.num_mine, metrics.num_rows, metrics.num_errors) == (37, 37, 5)
    assert metrics.num_prepared == 37
    assert metrics.prepared_tokens == sum(row["prompt_tokens"] or 0 for row in rows) > 0
    assert len(list((tmp_path / "out" / "data").iterdir())) == summary.num_shards


def test_logprobs_are_a_column_where_asked_for(tmp_path: Path, write_parquet: Writer) -> None:
    source = write_parquet([picture()] * 3)
    run(tmp_path / "out", source, "generation.logprobs=true", engine=FakeEngine(failing=[1]))
    logprobs = [row["logprobs"] for row in rows_of(tmp_path / "out")]
    assert logprobs == [[-0.5, -2.0, 0.0], None, [-0.5, -2.0, 0.0]]


def test_several_answers_are_a_column_where_asked_for(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source = write_parquet([picture()] * 3)
    overrides = ["generation.num_return_sequences=3", "generation.temperature=1"]
    run(tmp_path / "out", source, *overrides, engine=FakeEngine(failing=[1]))
    first, failed, _ = rows_of(tmp_path / "out")
    assert first["generated_text"] == "row 0"
    assert first["generated_texts"] == ["row 0", "or 1", "or 2"]
    assert first["finish_reasons"] == ["stop", "length", "length"]
    assert first["finish_reason"] == "stop"
    assert first["completion_tokens"] == 3 + 1 + 1
    assert (failed["generated_text"], failed["generated_texts"]) == (None, None)


def test_the_output_opens_with_every_reader(tmp_path: Path, write_parquet: Writer) -> None:
    n, times = pa.array(range(12), pa.int16()), pa.array(range(12), pa.time64("ns"))
    source = write_parquet([picture()] * 12, n=n, t=times)
    run(tmp_path / "out", source, "output.keep_columns=[n,image,t]", "output.token_ids=true")
    table = ds.dataset(tmp_path / "out" / "data").to_table()
    assert table["t"].combine_chunks().equals(times)
    assert table.schema.field("n").type == pa.int16()
    assert table.column_names[:5] == ["id", "row_index", "source_file", "n", "image"]
    data, cache = str(tmp_path / "out" / "data"), str(tmp_path / "cache")
    loaded = datasets.load_dataset("parquet", data_dir=data, split="train", cache_dir=cache)
    assert list(loaded["n"]) == list(range(12))
    assert list(loaded["token_ids"])[5] == [1, 2, 5]


class LosingEngine(FakeEngine):
    """Forgets some rows."""

    def __init__(self, lost: set[int]) -> None:
        super().__init__()
        self.lost = lost

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        return (item for item in super().run(samples) if item[0] not in self.lost)


def test_a_row_that_the_engine_forgets_is_a_row_all_the_same(
    tmp_path: Path, write_parquet: Writer
) -> None:
    summary = run(tmp_path / "out", write_parquet([picture()] * 23), engine=LosingEngine({4, 22}))
    rows = rows_of(tmp_path / "out")
    assert [row["row_index"] for row in rows] == list(range(23))
    assert [row["row_index"] for row in rows if row["error_type"] == "engine"] == [4, 22]
    assert summary.metrics.errors == {"engine": 2}


def test_a_row_that_the_source_forgets_ends_the_run_loudly(
    tmp_path: Path, write_parquet: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet([picture()] * 23)
    read_shard = ParquetSource.read_shard
    with monkeypatch.context() as context:
        context.setattr(
            ParquetSource,
            "read_shard",
            lambda *a, **k: (r for r in read_shard(*a, **k) if r.row_index != 12),
        )
        with pytest.raises(BatchvlmError, match="1 row of shard 1 was never answered"):
            run(tmp_path / "out", source)
    engine = FakeEngine()
    run(tmp_path / "out", source, engine=engine)
    assert engine.seen == [12]
    assert [row["row_index"] for row in rows_of(tmp_path / "out")] == list(range(23))


def test_a_rerun_has_nothing_to_do(tmp_path: Path, write_parquet: Writer) -> None:
    source = write_parquet([picture()] * 25)
    run(tmp_path / "out", source)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "data").iterdir()}
    engine = FakeEngine()
    summary = run(tmp_path / "out", source, engine=engine)
    assert engine.seen == []
    assert (summary.num_found, summary.metrics.num_rows) == (25, 0)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "data").iterdir()}


class Crash(Exception):
    """Stands for whatever ends a process in the middle."""


class CrashingEngine(FakeEngine):
    """Dies after some rows."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        for number, item in enumerate(super().run(samples)):
            if number == self.after:
                raise Crash
            yield item


@pytest.mark.parametrize("after", [0, 1, 13, 23])
def test_a_crash_keeps_every_finished_row(
    tmp_path: Path, write_parquet: Writer, after: int
) -> None:
    images: list[Any] = [picture(size=(8 + i, 8)) for i in range(25)]
    images[11] = b"no image"
    source = write_parquet(images)
    run(tmp_path / "undisturbed", source)
    with pytest.raises(Crash):
        run(tmp_path / "out", source, engine=CrashingEngine(after))
    engine = FakeEngine()
    # Other throughput settings than before the crash: they do not change an answer.
    summary = run(
        tmp_path / "out", source, "batching.sort_window=3", "runtime.num_workers=1", engine=engine
    )
    assert len(engine.seen) == 24 - after
    assert summary.num_found + summary.metrics.num_rows == 25
    assert summary.metrics.num_found == summary.num_found
    assert answers(tmp_path / "out") == answers(tmp_path / "undisturbed")
    assert not list((tmp_path / "out" / "_batchvlm").glob("segments/*"))


def test_an_interrupted_commit_keeps_every_finished_row(
    tmp_path: Path, write_parquet: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet([picture()] * 8)

    def interrupted(writer: ShardWriter) -> Path:
        raise Crash

    with monkeypatch.context() as context:
        context.setattr(ShardWriter, "commit", interrupted)
        with pytest.raises(Crash):
            run(tmp_path / "out", source)
    engine = FakeEngine()
    summary = run(tmp_path / "out", source, engine=engine)
    assert engine.seen == []
    assert summary.num_found == 8
    assert [row["row_index"] for row in rows_of(tmp_path / "out")] == list(range(8))


def test_another_question_is_refused_with_the_difference(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source = write_parquet([picture()] * 3)
    out = tmp_path / "out"
    run(out, source)
    for override, key in {
        "task.prompt=Why?": "task.prompt: 'Describe the image.' -> 'Why?'",
        "generation.max_new_tokens=7": "generation.max_new_tokens: 256 -> 7",
        "model.max_image_pixels=100": "model.max_image_pixels",
        "output.rows_per_shard=5": "output.rows_per_shard: 10 -> 5",
        "output.token_ids=true": "output.token_ids",
    }.items():
        with pytest.raises(FingerprintError) as caught:
            run(out, source, override)
        assert key in str(caught.value) and "\n" not in str(caught.value)
    write_parquet([picture("blue")] * 3)
    with pytest.raises(FingerprintError, match=r"input\.files\.in\.parquet"):
        run(out, source)


def test_a_model_that_does_not_load_claims_no_folder(tmp_path: Path, write_parquet: Writer) -> None:
    """Whoever mends the model's name must not be told that the folder has other answers."""
    source = write_parquet([picture()] * 3)
    (tmp_path / "empty").mkdir()
    cfg = compose(
        "run",
        [
            "data=parquet",
            f"data.path={source}",
            f"output.dir={tmp_path / 'out'}",
            "model=hub",
            f"model.path={tmp_path / 'empty'}",
        ],
    )
    with pytest.raises(ModelError, match=r"no config\.json there, so this is no model folder"):
        run_job(cfg)
    assert not (tmp_path / "out").exists()


def other_value(value: Any, default: Any) -> Any:
    """Another value than that, of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case None:
            return 5
    return default


def test_no_throughput_setting_trips_the_guard(tmp_path: Path, write_parquet: Writer) -> None:
    """Every field of these groups, one after the other, so a new one is tried too."""
    source = write_parquet([picture()] * 3)
    out = tmp_path / "out"
    run(out, source)
    cfg = compose()
    others = {
        "engine.name": "generate",
        "engine.device": "cpu",
        "engine.memory_fraction": "0.5",
        "retry.errors": "[oom]",
        "output.on_mismatch": "overwrite",
        "runtime.task_id": "1",
        "runtime.max_error_rate": "0.9",
    }
    keys = [
        f"{group}.{field.name}"
        for group in ("batching", "runtime", "engine", "retry")
        for field in dataclasses.fields(getattr(cfg, group))
        if field.name != "endpoint"  # an engine of its own
    ]
    keys += ["output.flush_every_s", "output.flush_every_rows", "output.on_mismatch"]
    before = {path: path.stat().st_ino for path in (out / "data").iterdir()}
    for key in keys:
        group, name = key.split(".")
        value = others.get(key, other_value(getattr(getattr(cfg, group), name), None))
        assert value is not None, f"name another value for {key}"
        more = ["runtime.num_tasks=2"] if key == "runtime.task_id" else []
        run(out, source, *more, f"{key}={value}")
    run(out, source, "model.attn_implementation=eager")
    assert before == {path: path.stat().st_ino for path in (out / "data").iterdir()}


def test_another_question_may_go_to_a_folder_of_its_own(
    tmp_path: Path, write_parquet: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = write_parquet([picture()] * 3), tmp_path / "out"
    run(out, source)
    old = answers(out)
    beside = ["task.prompt=Why?", "output.on_mismatch=new_folder"]
    summary = run(out, source, *beside)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    new = summary.folder.root
    assert new.parent == tmp_path and str(new) in said and "'Why?'" in said
    (fingerprint,) = {row["fingerprint"] for row in rows_of(new)}
    assert new.name == f"out-{fingerprint}"
    assert answers(out) == old
    # Again: that folder is found, and nothing is left to do.
    engine = FakeEngine()
    assert run(out, source, *beside, engine=engine).folder.root == new
    assert engine.seen == []


def test_another_question_may_overwrite(tmp_path: Path, write_parquet: Writer) -> None:
    source, out = write_parquet([picture()] * 25), tmp_path / "out"
    run(out, source)
    over = "output.on_mismatch=overwrite"
    # Another cut too: no old part may be taken for a new one.
    new = ["task.prompt=Why?", "output.rows_per_shard=13"]
    with pytest.raises(Crash):
        run(out, source, *new, over, engine=CrashingEngine(20))
    with pytest.raises(FingerprintError, match=r"'Why\?' -> 'Describe"):
        run(out, source)
    engine = FakeEngine()
    run(out, source, *new, over, engine=engine)
    assert len(engine.seen) == 5
    run(tmp_path / "plain", source, *new)
    assert answers(out) == answers(tmp_path / "plain")
    # A layout alone counts as well.
    run(out, source, "task.prompt=Why?", "output.rows_per_shard=5", over)
    assert {p.name[-16:] for p in (out / "data").iterdir()} == {"of-00007.parquet"}
    assert [row["row_index"] for row in rows_of(out)] == list(range(25))


def test_a_model_that_does_not_load_overwrites_nothing(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source, out = write_parquet([picture()] * 3), tmp_path / "out"
    run(out, source)
    old = answers(out)
    (tmp_path / "empty").mkdir()
    cfg = compose(
        "run",
        [
            "data=parquet",
            f"data.path={source}",
            f"output.dir={out}",
            "model=hub",
            f"model.path={tmp_path / 'empty'}",
            "output.on_mismatch=overwrite",
        ],
    )
    with pytest.raises(ModelError):
        run_job(cfg)
    assert answers(out) == old


def test_tasks_share_one_output(tmp_path: Path, write_parquet: Writer) -> None:
    source = write_parquet([picture()] * 35)
    slices = ["runtime.num_tasks=3"]
    for task_id in (2, 0):
        run(tmp_path / "out", source, *slices, f"runtime.task_id={task_id}")
    assert len(rows_of(tmp_path / "out")) < 35
    run(tmp_path / "out", source, *slices, "runtime.task_id=1")
    assert [row["row_index"] for row in rows_of(tmp_path / "out")] == list(range(35))


def test_extract_fills_parsed_and_json_valid(tmp_path: Path, write_parquet: Writer) -> None:
    source = write_parquet([picture()] * 2)
    schema = {"type": "object", "properties": {"row": {"type": "integer", "maximum": 0}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    engine = FakeEngine(answer='{{"row": {}}}')
    run(
        tmp_path / "out",
        source,
        f"task.output.json_schema={tmp_path / 'schema.json'}",
        engine=engine,
        name="extract",
    )
    good, bad = rows_of(tmp_path / "out")
    assert (good["status"], good["parsed"], good["json_valid"]) == ("success", {"row": 0}, True)
    assert (bad["status"], bad["error_type"], bad["parsed"], bad["json_valid"]) == (
        "error",
        "invalid_json",
        None,
        False,
    )
    # An answer that breaks the schema is still an answer: a person must see it.
    assert bad["generated_text"] == '{"row": 1}'


def test_a_missing_column_is_named_with_those_there_are(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source = write_parquet([picture()], question=["?"])
    for override in (
        "data.columns.image=img",
        'task.prompt="{{ img }}"',
        "output.keep_columns=[img]",
        "data.columns.id=img",
        "generation.columns.seed=img",
    ):
        with pytest.raises(InputError) as caught:
            run(tmp_path / "out", source, override)
        assert override.split("=")[0] in str(caught.value)
        assert "image" in str(caught.value) and "question" in str(caught.value)
    with pytest.raises(InputError, match=r"'question', which is string; .* takes a number"):
        run(tmp_path / "out", source, "generation.columns.seed=question")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "names"),
    [
        (r'task.prompt="What?\nIn a word."', ["task.prompt"]),
        (r'task.system="a\n{{ question }}"', ["task.system"]),
        (r'task.answer_prefix="a\n"', ["task.answer_prefix"]),
        (r'generation.stop=["\n"]', ["generation.stop"]),
        (r'''task.prompt="{{ question }}{{ '\n' }}{% set a = '\n' %}Say: {{ a }}?"''', []),
        ('task.prompt="What?\nIn a word."', []),
        ('generation.stop=["\n"]', []),
    ],
)
def test_a_line_break_that_is_none_is_named(
    tmp_path: Path,
    write_parquet: Writer,
    caplog: pytest.LogCaptureFixture,
    override: str,
    names: list[str],
) -> None:
    source = write_parquet([picture()], question=["?"])
    run(tmp_path / "out", source, override)
    said = [r.getMessage() for r in caplog.records if "two characters" in r.getMessage()]
    assert [message.partition(" ")[0] for message in said] == names


def test_an_input_without_rows(tmp_path: Path, write_parquet: Writer) -> None:
    with pytest.raises(InputError, match="holds no rows"):
        run(tmp_path / "out", write_parquet([]))
    assert not (tmp_path / "out").exists()


def test_a_kept_column_may_not_hide_one_of_ours(tmp_path: Path, write_parquet: Writer) -> None:
    source = write_parquet([picture()], status=["mine"])
    with pytest.raises(ConfigError, match=r"output\.keep_columns"):
        run(tmp_path / "out", source, "output.keep_columns=[status]")


def test_max_rows(tmp_path: Path, write_parquet: Writer) -> None:
    run(tmp_path / "out", write_parquet([picture()] * 30), "data.max_rows=13")
    assert [row["row_index"] for row in rows_of(tmp_path / "out")] == list(range(13))


def test_metrics_are_left_in_the_folder(tmp_path: Path, write_parquet: Writer) -> None:
    run(tmp_path / "out", write_parquet([picture(), b"x"]))
    path, lines = sorted((tmp_path / "out" / "_batchvlm" / "metrics").iterdir())
    metrics, last = json.loads(path.read_text()), json.loads(lines.read_text().splitlines()[-1])
    assert (metrics["num_rows"], metrics["errors"], last["num_rows"]) == (2, {"decode": 1}, 2)
    assert 0 <= metrics["wait_share"] <= 1
    settings = json.loads((tmp_path / "out" / "_batchvlm" / "run.json").read_text())["settings"]
    assert settings["task"]["prompt"] == "Describe the image."
    part = next((tmp_path / "out" / "data").iterdir())
    assert pq.read_metadata(part).num_rows == 2


def test_every_source_reaches_the_output(tmp_path: Path) -> None:
    """The same pictures by every road: one row each, in order, images found and decoded."""
    pictures = [picture(size=(10 + i, 10)) for i in range(5)]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, data in enumerate(pictures):
        (folder / f"{i}.png").write_bytes(data)
    saved = datasets.Dataset.from_dict(
        {"image": pictures}, features=datasets.Features({"image": datasets.Image()})
    )
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    saved.to_parquet(tmp_path / "files" / "train.parquet")
    uri = "data:image/png;base64," + base64.b64encode(pictures[4]).decode()
    cells: list[Any] = [f"pictures/{i}.png" for i in range(4)]
    lines = [json.dumps({"image": cell}) for cell in [*cells, [uri]]]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    roads = {
        "folder": ["data=folder", f"data.path={folder}"],
        "saved": ["data=hf", f"data.path={tmp_path / 'saved'}"],
        "files": ["data=hf", f"data.path={tmp_path / 'files'}"],
        "stream": ["data=hf", f"data.path={tmp_path / 'files'}", "data.streaming=true"],
        "jsonl": ["data=jsonl", f"data.path={tmp_path / 'in.jsonl'}"],
        "glob": ["data=parquet", f"data.path='{tmp_path}/f*/*.parquet'"],
        "url": ["data=parquet", f"data.path=file://{tmp_path}/files"],
    }
    for name, road in roads.items():
        out = tmp_path / "out" / name
        cfg = compose("run", [*road, f"output.dir={out}", "runtime.num_workers=0"])
        run_job(cfg, engine=FakeEngine())
        rows = rows_of(out)
        assert [row["error_message"] for row in rows] == [None] * 5, name
        assert [row["row_index"] for row in rows] == list(range(5)), name
        assert len({row["id"] for row in rows}) == 5, name
    assert rows_of(tmp_path / "out" / "folder")[2]["id"] == "2.png"


def test_a_part_copied_over_another_is_refused(tmp_path: Path, write_parquet: Writer) -> None:
    source, out = write_parquet([picture()] * 30), tmp_path / "out"
    run(out, source)
    one, other = sorted((out / "data").iterdir())[1:3]
    content = other.read_bytes()
    other.write_bytes(one.read_bytes())
    with pytest.raises(OutputError, match=r"part-00002-of-00004\.parquet holds shard 1"):
        run(out, source)
    # A slice of the job that the part is not of has no quarrel with it.
    run(out, source, "runtime.num_tasks=2", "runtime.task_id=1")
    other.write_bytes(content)
    run(out, source)


def test_merged_parts_are_retried(tmp_path: Path, write_parquet: Writer) -> None:
    source, out = write_parquet([picture()] * 30), tmp_path / "out"
    run(out, source, engine=FakeEngine(failing=[3, 14, 29]))
    compact(OutputFolder(out), target_rows=20)
    again = run(out, source)
    assert (again.num_found, again.metrics.found_errors) == (30, {"engine": 3})
    engine = FakeEngine()
    done = run(out, source, "retry.errors=[engine]", engine=engine)
    assert sorted(engine.seen) == [3, 14, 29]
    assert done.metrics.num_rows == 3 and not done.metrics.found_errors
    assert [row["generated_text"] for row in rows_of(out)] == [f"row {i}" for i in range(30)]
    assert verify(OutputFolder(out)).faults == []
