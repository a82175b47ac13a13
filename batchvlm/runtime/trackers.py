"""Exports the counters of a running job to TensorBoard, Weights & Biases and Prometheus.

A tracker that fails during a run does not end it: it is disabled with one warning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from batchvlm.config import TrackingConfig
from batchvlm.errors import ConfigError
from batchvlm.runtime.metrics import Metrics
from batchvlm.words import described

log = logging.getLogger(__name__)

_EXTRAS = {"tensorboard": "metrics", "wandb": "wandb"}
"""Tracker -> the extra of this package that installs it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Identifies the process and the job that the counters belong to."""

    output: str
    """Name of the output folder."""
    task_id: int = 0
    rank: int = 0
    is_one_of_many: bool = False
    """Whether the job has other processes."""

    @property
    def name(self) -> str:
        return f"task-{self.task_id:05d}-rank-{self.rank:03d}"


class Trackers:
    """Writes the counters to all trackers periodically, and on exit of the context.

    Args:
        cfg: names the trackers.
        metrics: the counters, updated elsewhere.
        place: identifies this process.
        folder: where trackers write their files, unless `cfg.dir` is set.
        settings: settings of the job, for trackers that show them.
        clock: seconds, monotonic.

    Raises:
        ConfigError: a tracker does not start.
    """

    def __init__(
        self,
        cfg: TrackingConfig,
        metrics: Metrics,
        place: Place,
        *,
        folder: Path,
        settings: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cfg = cfg
        self._metrics = metrics
        self._clock = clock
        self._last_s = clock()
        self._writers: dict[str, Callable[[], object]] = {}
        self._open: list[Any] = []
        folder = Path(cfg.dir) if cfg.dir else folder
        for name in cfg.trackers:
            tracker = _open_tracker(name, cfg, place, folder)
            tracker.store_init_configuration(_flat(settings))
            self._open.append(tracker)
            self._writers[name] = lambda tracker=tracker: tracker.log(  # type: ignore[misc]
                numbers(metrics), step=metrics.num_rows
            )
        if cfg.prometheus_file:
            self._writers["prometheus"] = _prometheus(cfg.prometheus_file, metrics, place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
        for tracker in self._open:
            with suppress(Exception):
                tracker.finish()

    def tick(self) -> None:
        """Write the counters if a write is due."""
        if self._writers and self._clock() - self._last_s >= self._cfg.every_s:
            self.write()

    def write(self) -> None:
        """Write the counters to all trackers."""
        self._last_s = self._clock()
        for name, write in list(self._writers.items()):
            try:
                write()
            except Exception as error:  # a library or its server may raise anything
                del self._writers[name]
                log.warning("the run goes on without %s: %s", name, described(error))


def numbers(metrics: Metrics) -> dict[str, float]:
    """Return the values that trackers plot, by name."""
    return {
        "rows": metrics.num_rows,
        "errors": metrics.num_errors,
        **{f"errors/{kind}": count for kind, count in metrics.errors.items()},
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.completion_tokens,
        "rows_per_s": metrics.rows_per_s,
        "completion_tokens_per_s": metrics.completion_tokens_per_s,
        "wait_share": metrics.wait_share,
        "padding_share": metrics.engine.padding_share,
    }


def prepare_trackers(cfg: TrackingConfig) -> None:
    """Check that the packages of the configured trackers are installed, before a model is loaded.

    Call it before any thread starts: it clears the environment for a moment.

    Raises:
        ConfigError: a package is missing.
    """
    for name in cfg.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers names {name}, which is not installed",
                hint=f"pip install 'batchvlm[{_EXTRAS[name]}]'",
            )
    if cfg.prometheus_file and find_spec("prometheus_client") is None:
        raise ConfigError(
            "tracking.prometheus_file is set and prometheus-client is not installed",
            hint="pip install 'batchvlm[metrics]'",
        )
    if cfg.trackers:
        from accelerate import PartialState
        from accelerate.utils import clear_environment

        # accelerate's trackers need its state. Each process creates one of its own: that of a
        # launch would wait for every rank.
        with clear_environment():
            PartialState(cpu=True)


def _open_tracker(name: str, cfg: TrackingConfig, place: Place, folder: Path) -> Any:
    from accelerate import tracking

    kinds = {"tensorboard": tracking.TensorBoardTracker, "wandb": tracking.WandBTracker}
    # accelerate's trackers write in the main process only; here each process has its own counters.
    kind = type(kinds[name].__name__, (kinds[name],), {"main_process_only": False})
    title = f"{place.output}/{place.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if name == "wandb":
            tracker = kind(cfg.project, name=title, group=place.output, dir=str(folder))
        else:
            tracker = kind(title, logging_dir=str(folder))
        if hasattr(tracker, "start"):
            tracker.start()
    except Exception as error:  # such as a missing login, or a folder that is not writable
        raise ConfigError(
            f"tracking.trackers: {name} does not start: {described(error)}",
            hint="fix the cause, or remove it from tracking.trackers",
        ) from error
    return tracker


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names; values other than numbers become text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float) else str(value)
    return flat


def _prometheus(file: str, metrics: Metrics, place: Place) -> Callable[[], object]:
    from prometheus_client import CollectorRegistry, write_to_textfile

    path = Path(file)
    if place.is_one_of_many:
        path = path.with_name(f"{path.stem}-{place.name}{path.suffix}")
    registry = CollectorRegistry()
    registry.register(_Collector(metrics, place))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise ConfigError(
            f"tracking.prometheus_file={file} cannot be written: {error.strerror}",
            hint="name a file in a folder that you can write to",
        ) from error
    return lambda: write_to_textfile(str(path), registry)


@dataclass(frozen=True, eq=False)
class _Collector:
    """Provides the counters to prometheus-client."""

    metrics: Metrics
    place: Place

    def collect(self) -> Iterator[Any]:
        """Yield all metric families."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        metrics = self.metrics
        labels = ["output", "task", "rank"]
        values = [self.place.output, str(self.place.task_id), str(self.place.rank)]

        rows = CounterMetricFamily("batchvlm_rows", "Rows done", labels=[*labels, "status"])
        rows.add_metric([*values, "success"], metrics.num_success)
        rows.add_metric([*values, "error"], metrics.num_errors)
        yield rows
        errors = CounterMetricFamily(
            "batchvlm_errors", "Rows with an error", labels=[*labels, "type"]
        )
        for kind, count in metrics.errors.items():
            errors.add_metric([*values, kind], count)
        yield errors
        totals: tuple[tuple[str, str, float], ...] = (
            ("prompt_tokens", "Prompt tokens of rows done", metrics.prompt_tokens),
            ("image_tokens", "Image tokens of rows done", metrics.image_tokens),
            ("completion_tokens", "Tokens of answers", metrics.completion_tokens),
            ("run_seconds", "Seconds since the model was ready", metrics.run_s),
            ("wait_seconds", "Seconds that the engine waited for data", metrics.wait_s),
        )
        for name, about, number in totals:
            family = CounterMetricFamily(f"batchvlm_{name}", about, labels=labels)
            family.add_metric(values, number)
            yield family
        found = GaugeMetricFamily(
            "batchvlm_rows_found", "Rows that earlier runs had finished", labels=labels
        )
        found.add_metric(values, metrics.num_found)
        yield found
