"""Check a sweep before its first job: jobs with other answers need output folders of their own."""

from __future__ import annotations

from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from batchvlm.config import JobConfig
from batchvlm.errors import BatchvlmError, ConfigError
from batchvlm.settings.compose import is_mistake, names_the_time, read_config
from batchvlm.words import setting


class RefusedSweepError(BaseException):
    """Ends a sweep from a callback, whose `Exception`s Hydra turns into warnings.

    Args:
        reason: what to report.
    """

    def __init__(self, reason: ConfigError) -> None:
        super().__init__(reason)
        self.reason = reason


class SweepCheck(Callback):
    """Refuses a sweep whose second job would find the answers of the first in its folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare jobs that differ in one setting.

        Raises:
            RefusedSweepError: they share `output.dir`, and have other answers.
        """
        try:
            reason = _why_refused(config)
        except Exception as error:
            # A mistake in a job's settings is reported by that job.
            if isinstance(error, BatchvlmError) or is_mistake(error):
                return
            raise
        if reason is not None:
            raise RefusedSweepError(reason)


def _why_refused(config: DictConfig) -> ConfigError | None:
    parser = OverridesParser.create(config_loader=_hydra().config_loader)
    given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    parsed = parser.parse_overrides(given)
    swept = {o.key_or_group: _values(o) for o in parsed if o.is_discrete_sweep()}
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    first = {key: values[0] for key, values in swept.items()}

    def job(number: int, chosen: dict[str, str]) -> DictConfig:
        return _composed(config, number, [*fixed, *chosen.values()])

    node = job(0, first)
    if names_the_time(node):
        return None
    written = OmegaConf.to_container(node.output, resolve=False)
    assert isinstance(written, dict)
    cfg = _read(node)
    shared = []
    for key, values in swept.items():
        # One other value tells whether the folder's name depends on the setting.
        if len(values) > 1 and _is_in_the_way(cfg, _read(job(1, first | {key: values[1]}))):
            shared.append(key)
    if not shared:
        return None
    groups = config.hydra.runtime.choices
    names = (f"hydra:runtime.choices.{key}" if key in groups else key for key in shared)
    own = "-".join([str(written["dir"]), *(f"${{{name}}}" for name in names)])
    return ConfigError(
        f"the jobs of this sweep differ in {', '.join(shared)} and share "
        f"output.dir={cfg.output.dir}, which holds one run",
        hint=f"give each job its own folder: {setting('output.dir', own)}",
    )


def _hydra() -> Hydra:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return hydra


def _values(override: Override) -> list[str]:
    """Return an override for each value of a sweep."""
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _composed(config: DictConfig, number: int, overrides: list[str]) -> DictConfig:
    """Return the settings of a job as Hydra's launcher composes them."""
    node = _hydra().config_loader.load_sweep_config(config, overrides)
    with open_dict(node):
        node.hydra.job.id = node.hydra.job.num = number
    return node


def _read(node: DictConfig) -> JobConfig:
    HydraConfig.instance().set_config(node)  # for `${hydra:job.num}`
    return read_config(node)


def _is_in_the_way(first: JobConfig, second: JobConfig) -> bool:
    """Whether a job would find another's answers, which it neither continues nor replaces."""
    is_checked = second.output.on_mismatch is type(second.output).on_mismatch
    return (
        is_checked
        and first.output.dir == second.output.dir
        and _question(first) != _question(second)
    )


def _question(cfg: JobConfig) -> list[Any]:
    """Return what a folder belongs to, without reading the input."""
    from batchvlm.identity import answer_identity, output_layout  # not at the start of every run

    data = cfg.data
    source = [data.source, data.path, data.subset, data.split, data.revision]
    return [answer_identity(cfg, ()), output_layout(cfg), source]
