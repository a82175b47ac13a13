"""What `batchvlm plan` counts and prints, held against what a run then finds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import Gemma4Config

from batchvlm.before.commands import plan as plan_command
from batchvlm.before.footprint import estimate_footprint
from batchvlm.before.plan import Plan, make_plan
from batchvlm.before.table import histogram, table
from batchvlm.before.tokens import TokenCounter
from batchvlm.config import EngineName
from batchvlm.engine.select import name_engine
from batchvlm.errors import ErrorType
from batchvlm.model.loading import ModelLimits, load_skeleton
from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import save_run
from batchvlm.output.schema import Provenance
from batchvlm.output.writer import ShardWriter
from batchvlm.pipeline.job import Job, open_job
from batchvlm.preprocess.preprocessor import Preprocessor, room_behind
from batchvlm.records import Failure
from batchvlm.runtime.launch import num_cores
from batchvlm.settings.compose import compose
from tests.engine.families.qwen import qwen2_vl
from tests.output.make import make_result

from .test_drawn import demo_job


def planned(job: Job, *, num_sampled: int = 1000, with_speed: bool = False) -> Plan:
    return make_plan(job, num_sampled=num_sampled, with_speed=with_speed)


def test_headers_tell_what_preparing_a_row_finds(tmp_path: Path) -> None:
    job = demo_job(tmp_path, "task=vqa", "model.max_prompt_tokens=65")
    counter, preprocessor = TokenCounter(job), Preprocessor(job.preprocess_spec())
    outcomes = []
    for record in job.source.read_shard(job.run.plan[0], job.prompt_columns):
        counted, sample = counter.count(record), preprocessor.prepare(record)
        if record.id == "broken-truncated":
            continue  # its header is whole
        if isinstance(sample, Failure):
            assert counted.failure == sample
            outcomes.append(str(sample.error_type))
        else:
            assert counted.failure is None
            assert counted.prompt_tokens == sample.prompt_tokens
            assert counted.image_tokens == sample.image_tokens
            assert counted.max_new_tokens == sample.generation.max_new_tokens
    assert set(outcomes) == {"decode", "missing_image", "too_large", "prompt_too_long"}
    assert 29 - 1 - len(outcomes) > 15


def test_a_processor_that_knows_tokens_from_sizes_is_asked_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2-VL's does; its first rows are counted in both ways."""
    _, processor = qwen2_vl()
    limits = ModelLimits(
        max_positions=None, image_token_id=processor.image_token_id, patch_size=None
    )
    monkeypatch.setattr("batchvlm.before.tokens.load_processor", lambda cfg: processor)
    monkeypatch.setattr("batchvlm.before.tokens.load_limits", lambda cfg: limits)
    job = demo_job(tmp_path)
    quick, exact = TokenCounter(job), TokenCounter(job)
    exact._is_quick = False
    seen: list[Any] = []
    real = quick._by_processor
    monkeypatch.setattr(quick, "_by_processor", lambda *a: seen.append(a) or real(*a))  # type: ignore[func-returns-value]
    records = list(job.source.read_shard(job.run.plan[0], job.prompt_columns))
    found = [quick.count(record) for record in records]
    assert quick._is_quick and len(seen) == 3
    assert [row.prompt_tokens for row in found] == [
        exact.count(record).prompt_tokens for record in records
    ]
    assert len({row.prompt_tokens for row in found}) > 5


def test_a_plan_of_the_demo(tmp_path: Path) -> None:
    found = planned(demo_job(tmp_path))
    lines = list(table(found))
    assert lines[0] == "input      29 rows in 1 file; 1 shard of at most 29 rows"
    assert lines[1].endswith("out: nothing done yet")
    assert "1.63 M parameters in float32; engine slots" in lines[2]
    assert "looked at  every row" in lines
    assert any(line.split() == ["prompt", "tokens", *["58"] * 5] for line in lines)
    assert "will fail: 4 of 29 rows (13.8%)" in lines
    assert any("broken-bomb: the header claims 30000 x 30000 pixels" in line for line in lines)
    assert any("'no-such-folder/no-such-file.png' cannot be read" in line for line in lines)
    assert "time       unknown; --calibrate answers some rows to estimate it" in lines
    # Exactly what the safetensors file holds.
    assert found.footprint.weight_bytes == pytest.approx(6.5e6, rel=0.02)
    assert not (tmp_path / "out").exists()


def test_layers_that_differ_take_what_each_takes(tmp_path: Path) -> None:
    """Gemma 4: some layers have larger heads, and the last ones the keys of those before."""
    text = {
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
    }
    Gemma4Config(text_config=text, vision_config={}).save_pretrained(tmp_path)
    cfg = compose("run", ["model=hub", f"model.path={tmp_path}", "model.dtype=float32"])
    found = estimate_footprint(cfg, row_tokens=100)
    assert found.token_bytes == 2 * 2 * (16 + 32) * 4


@pytest.mark.parametrize(
    ("kind", "size_bytes", "engine"),
    [
        ("quanto_int8", 4_188_160, EngineName.slots),
        ("quanto_int4", 3_823_616, EngineName.generate),
        ("bnb_nf4", 3_823_616, EngineName.slots),
    ],
)
def test_a_quantized_model_takes_what_it_takes_once_it_is_loaded(
    kind: str, size_bytes: int, engine: EngineName
) -> None:
    pytest.importorskip("bitsandbytes" if kind.startswith("bnb") else "optimum.quanto")
    found = estimate_footprint(compose("run", [f"model.quantization={kind}"]), row_tokens=100)
    # The bytes are those of the weights and their scales in a loaded model.
    assert found.weight_bytes == pytest.approx(size_bytes, rel=0.01)
    assert (found.dtype, found.engine) == (f"float32 and {kind}", engine)


@pytest.mark.parametrize("has_index", [False, True])
def test_a_checkpoint_that_is_quantized_has_the_size_of_its_files(
    tmp_path: Path, has_index: bool
) -> None:
    path = shutil.copytree(compose("run").model.path, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(bytes(1000))
    if has_index:
        index = {"metadata": {"total_size": 990}, "weight_map": {}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    cfg = compose("run", ["model=hub", f"model.path={path}", "model.dtype=float32"])
    found = estimate_footprint(cfg, row_tokens=100)
    assert found.weight_bytes == (990 if has_index else 1000)
    assert found.dtype == "float32 and awq"
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    if not has_index:  # counted as if it were not quantized
        assert estimate_footprint(cfg, row_tokens=100).weight_bytes > 6_000_000


def test_on_a_gpu_a_quantized_model_is_foreseen_to_generate() -> None:
    model = load_skeleton(compose("run").model)
    model.config.quantization_config = object()
    name, reason = name_engine(model, compose("run"), device=torch.device("cuda"))
    assert name is EngineName.generate and reason.startswith("quantized weights were tried")


def test_padding_slices_and_a_part_of_the_input(tmp_path: Path) -> None:
    job = demo_job(
        tmp_path,
        *("task=vqa", "engine=generate", "output.rows_per_shard=10"),
        *("runtime.num_tasks=2", "runtime.task_id=1", "batching.max_batch_size=8"),
    )
    found = planned(job, num_sampled=12)
    lines = list(table(found))
    assert "task       1 of 2: 13 rows" in lines
    assert lines[4].startswith("looked at  12 rows from 12 places of the input")
    assert found.footprint.engine is EngineName.generate
    assert found.num_batches >= 2 and 0 < found.padding_share < 0.3
    (padding,) = [line for line in lines if line.startswith("padding")]
    assert f"{found.padding_share:.0%} of the prompts, in batches of" in padding
    assert any(line.startswith("will fail: ") and "of the whole input)" in line for line in lines)


def test_calibrating_answers_rows(tmp_path: Path) -> None:
    found = planned(demo_job(tmp_path, "generation.max_new_tokens=8"), with_speed=True)
    assert found.estimate is not None
    speed = found.estimate.speed
    assert speed.num_rows == 24  # all that can be prepared
    assert speed.prompt_tokens == 24 * 58 and 24 <= speed.completion_tokens <= 24 * 8
    # All rows have as many tokens, so the estimate is the trial, scaled.
    share = 25 / 24  # the half file shows only when it is decoded
    assert found.estimate.engine_s == pytest.approx(share * speed.run_s, rel=0.02)
    # The cores do the engine's work and that of the workers.
    work_s = share * speed.run_cpu_s + 29 / 24 * speed.prepare_s
    assert found.estimate.shared_s == pytest.approx(work_s / num_cores(), rel=0.02)
    assert found.estimate.total_s >= speed.load_s + found.estimate.shared_s
    lines = list(table(found))
    assert any(line.startswith("speed ") and "by 24 rows answered" in line for line in lines)
    assert any(line.startswith("time ") and "for 29 rows on one device" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_dialog_counts_with_all_its_turns(tmp_path: Path) -> None:
    turns = [["Why?"], ["Why?", "How?", "When?"], ["Why?", "word " * 100]]
    pq.write_table(pa.table({"turns": turns}), tmp_path / "in.parquet")
    job = demo_job(
        tmp_path, "task=dialog", "data=parquet", f"data.path={tmp_path / 'in.parquet'}",
        "data.columns.turns=turns", "data.columns.image=null", "model.max_prompt_tokens=100",
        "generation.max_new_tokens=4", "generation.ignore_eos=true",
    )  # fmt: skip
    found = planned(job, with_speed=True)
    short, long = found.counts
    assert long.prompt_tokens > 2 * short.prompt_tokens
    assert (short.max_new_tokens, long.max_new_tokens) == (4, 12)
    (failed,) = found.failed
    assert failed.failure is not None and failed.failure.error_type is ErrorType.PROMPT_TOO_LONG
    assert found.estimate is not None
    speed = found.estimate.speed
    assert (speed.num_rows, speed.completion_tokens) == (2, 16)
    assert found.estimate.engine_s == pytest.approx(speed.run_s, rel=0.01)


def test_every_answer_to_a_row_is_counted(tmp_path: Path) -> None:
    settings = ("max_new_tokens=2", "num_return_sequences=3", "temperature=1", "ignore_eos=true")
    job = demo_job(tmp_path, "data.max_rows=2", *(f"generation.{text}" for text in settings))
    estimate = planned(job, with_speed=True).estimate
    assert estimate is not None and estimate.speed.completion_tokens == 2 * 3 * 2


def test_an_encoder_decoder_has_positions_for_the_answer_alone() -> None:
    limits = ModelLimits(max_positions=64, image_token_id=None, patch_size=None)
    assert room_behind(limits, 50) == 14
    assert room_behind(replace(limits, is_encoder_decoder=True), 50) == 63


def test_one_object_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show, overrides = plan_command(["--json", "task=vqa", "--sample", "10", "data.max_rows=20"])
    assert overrides == ["task=vqa", "data.max_rows=20"]
    show(compose("run", [*overrides, f"output.dir={tmp_path / 'out'}"]))
    found = json.loads(capsys.readouterr().out)
    assert (found["num_rows"], found["num_sampled"], found["engine"]) == (20, 10, "slots")
    assert found["failures"].keys() <= {"decode", "missing_image", "too_large"}
    assert found["estimated_s"] is None


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ([7, 7, 7], ["  7 - 7  " + "█" * 40 + " 3"]),
        (
            [0, 1, 1, 1, 15],
            [
                "   0 -  1  " + "█" * 40 + " 4",
                *[f"  {low:>2} - {low + 1:>2}  0" for low in (2, 4, 6, 8, 10, 12)],
                "  14 - 15  " + "█" * 10 + " 1",
            ],
        ),
        ([1] * 1000 + [8], ["  1 - 1  " + "█" * 40 + " 1,000"]),
    ],
)
def test_a_histogram(values: list[int], lines: list[str]) -> None:
    shown = list(histogram(values))
    assert shown[: len(lines)] == lines
    assert len(shown) <= 8
    if max(values) == 8:
        assert shown[-1] == "  8 - 8  █ 1"


def test_another_question_in_the_folder_is_no_mistake_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever tries prompts has not decided yet where the answers shall go."""
    out = OutputFolder(tmp_path / "out")
    save_run(out, demo_job(tmp_path).run)
    show, overrides = plan_command(["task.prompt=Why?", f"output.dir={out.root}"])
    for on_mismatch, words in (
        ("error", "a run would refuse it (output.dir, output.on_mismatch)"),
        ("new_folder", "a run would write to a new folder beside it"),
    ):
        show(compose("run", [*overrides, f"output.on_mismatch={on_mismatch}"]))
        line = capsys.readouterr().out.splitlines()[1]
        assert line.endswith(f"out: holds the answers of another job; {words}")
    layout = [f"output.dir={out.root}", "output.rows_per_shard=3"]
    show(compose("run", [*layout, "output.on_mismatch=overwrite"]))
    assert "out: was started with other settings; a run would" in capsys.readouterr().out
    show(compose("run", [f"output.dir={out.root}"]))
    assert capsys.readouterr().out.splitlines()[1].endswith("out: nothing done yet")


def test_rows_of_unfinished_shards_are_done(tmp_path: Path) -> None:
    job = demo_job(tmp_path, "output.rows_per_shard=8")
    save_run(job.folder, job.run)
    about = Provenance(model="m", fingerprint=job.run.fingerprint, run_id="r")
    num_shards = len(job.run.plan)
    for shard, num_rows in zip(job.run.plan, (8, 4), strict=False):
        writer = ShardWriter(job.folder, shard, num_shards, job.schema, about, flush_every_s=1e9)
        for row in range(num_rows):
            writer.add(make_result(shard, row, kept={}))
        writer.flush()
        if num_rows == shard.num_rows:
            writer.commit()
    plan = planned(job)
    assert (plan.num_done, plan.num_todo) == (12, plan.num_rows - 12)
    # Of these twelve, two with an error.
    again = planned(demo_job(tmp_path, "output.rows_per_shard=8", "retry.errors=[decode]"))
    assert (again.num_done, again.num_todo) == (10, plan.num_rows - 10)


def test_mistakes_of_a_plan_are_those_of_a_run(tmp_path: Path) -> None:
    from batchvlm.errors import InputError

    with pytest.raises(InputError, match="no_such_column"):
        open_job(compose("run", ["task.prompt='{{ no_such_column }}'"]))
