"""Counts for TensorBoard, Weights & Biases and Prometheus, read back as these read them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from prometheus_client.parser import text_string_to_metric_families

from batchvlm.config import TrackingConfig
from batchvlm.errors import ConfigError
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.trackers import Place, Trackers, prepare_trackers

PLACE = Place(output="captions", task_id=3, rank=1, is_one_of_many=True)


@pytest.fixture(autouse=True)
def state() -> Iterator[None]:
    """accelerate's as a job finds it: none."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def some_metrics() -> Metrics:
    metrics = Metrics(num_rows=7, num_success=5, completion_tokens=60, run_s=2.0, wait_s=0.5)
    metrics.errors.update(decode=2)
    return metrics


def samples(path: Path) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(path.read_text())
    return {
        (s.name, *(v for k, v in sorted(s.labels.items()) if k in ("status", "type"))): s.value
        for family in families
        for s in family.samples
    }


def test_prometheus(tmp_path: Path) -> None:
    now = 0.0
    metrics = some_metrics()
    cfg = TrackingConfig(prometheus_file=str(tmp_path / "new" / "job.prom"), every_s=10)
    with Trackers(cfg, metrics, PLACE, folder=tmp_path, settings={}, clock=lambda: now) as trackers:
        path = tmp_path / "new" / "job-task-00003-rank-001.prom"
        assert samples(path)[("batchvlm_rows_total", "success")] == 5
        assert samples(path)[("batchvlm_errors_total", "decode")] == 2
        metrics.num_success = 50
        now = 9.0
        trackers.tick()
        assert samples(path)[("batchvlm_rows_total", "success")] == 5
        now = 10.0
        trackers.tick()
        assert samples(path)[("batchvlm_rows_total", "success")] == 50
        metrics.num_success = 51
    assert samples(path)[("batchvlm_rows_total", "success")] == 51
    assert samples(path)[("batchvlm_wait_seconds_total",)] == 0.5
    assert 'output="captions"' in path.read_text() and 'task="3"' in path.read_text()
    assert list(path.parent.iterdir()) == [path]  # nothing half-written beside it


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = some_metrics()
    cfg = TrackingConfig(trackers=["tensorboard"])
    prepare_trackers(cfg)
    settings = {"task": {"name": "caption"}, "generation": {"top_p": 1.0, "stop": ["a"]}}
    with Trackers(cfg, metrics, PLACE, folder=tmp_path, settings=settings) as trackers:
        trackers.write()
        metrics.num_rows = 8
    events = EventAccumulator(str(tmp_path / "captions" / "task-00003-rank-001"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("rows")] == [(7, 7.0), (8, 8.0)]
    assert [e.value for e in events.Scalars("rows_per_s")] == [3.5, 4.0]
    assert [e.value for e in events.Scalars("errors/decode")] == [2.0, 2.0]
    assert [e.value for e in events.Scalars("wait_share")] == [0.25, 0.25]
    (hparams,) = tmp_path.rglob("hparams.yml")
    assert "task.name: caption" in hparams.read_text()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_rank_of_a_launch_waits_for_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(variable, value)
    prepare_trackers(TrackingConfig(trackers=[name]))
    assert os.environ["RANK"] == "1"
    assert PartialState().num_processes == 1
    assert not torch.distributed.is_initialized()


def test_what_fails_is_named_once_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = TrackingConfig(prometheus_file=str(tmp_path / "a" / "job.prom"))
    with (
        caplog.at_level(logging.WARNING),
        Trackers(cfg, some_metrics(), Place(output="o"), folder=tmp_path, settings={}) as trackers,
    ):
        (tmp_path / "a" / "job.prom").unlink()
        (tmp_path / "a").rmdir()
        trackers.write()
        trackers.write()
    assert len(caplog.records) == 1
    assert "the run goes on without prometheus: FileNotFoundError" in caplog.text


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("batchvlm.runtime.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names wandb, which is not installed; pip .*\[wandb\]'"):
        prepare_trackers(TrackingConfig(trackers=["wandb"]))
    with pytest.raises(ConfigError, match=r"prometheus-client is not installed; pip install 'batc"):
        prepare_trackers(TrackingConfig(prometheus_file="x.prom"))
    prepare_trackers(TrackingConfig())
    (tmp_path / "file").write_text("")
    cfg = TrackingConfig(prometheus_file=str(tmp_path / "file" / "x.prom"))
    with pytest.raises(ConfigError, match=r"prometheus_file=.* cannot be written"):
        Trackers(cfg, Metrics(), PLACE, folder=tmp_path, settings={})
