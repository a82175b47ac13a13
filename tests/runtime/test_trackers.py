"""Counts for TensorBoard, Weights & Biases and Prometheus, read back as these read them."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from prometheus_client.parser import text_string_to_metric_families

from batchvlm.config import TrackingConfig
from batchvlm.errors import ConfigError
from batchvlm.runtime.metrics import Metrics
from batchvlm.runtime.trackers import Place, Trackers, check_installed

PLACE = Place(output="captions", task_id=3, rank=1, is_one_of_many=True)


@pytest.fixture(autouse=True)
def state() -> None:
    PartialState(cpu=True)


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


def test_wandb_is_asked_for_a_run_of_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package is large and wants a server: a stand-in takes what accelerate hands it."""
    seen: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda values, step: seen.append((step, values["rows"])),
        finish=lambda: seen.append("finish"),
    )
    wandb: Any = types.ModuleType("wandb")
    wandb.init = lambda **kwargs: seen.append(kwargs) or run  # type: ignore[func-returns-value]
    wandb.config = types.SimpleNamespace(update=lambda values, **kwargs: seen.append(values))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = TrackingConfig(trackers=["wandb"], project="mine")
    with Trackers(cfg, some_metrics(), PLACE, folder=tmp_path, settings={"a": {"b": 1}}):
        pass
    assert seen[0]["project"] == "mine"
    assert (seen[0]["name"], seen[0]["group"]) == ("captions/task-00003-rank-001", "captions")
    assert seen[1:] == [{"a.b": 1}, (7, 7), "finish"]


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
    with pytest.raises(ConfigError, match="names wandb, which is not installed; pip install wandb"):
        check_installed(TrackingConfig(trackers=["wandb"]))
    with pytest.raises(ConfigError, match=r"prometheus-client is not installed; pip install 'batc"):
        check_installed(TrackingConfig(prometheus_file="x.prom"))
    check_installed(TrackingConfig())
    (tmp_path / "file").write_text("")
    cfg = TrackingConfig(prometheus_file=str(tmp_path / "file" / "x.prom"))
    with pytest.raises(ConfigError, match=r"prometheus_file=.* cannot be written"):
        Trackers(cfg, Metrics(), PLACE, folder=tmp_path, settings={})
