"""From the command line to a checked `JobConfig`: what types cannot say is said here.

Nothing here loads a model, reads a row, or imports torch: a mistake costs a second.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from batchvlm import demo
from batchvlm.config import (
    GENERATION_LIMITS,
    DataConfig,
    JobConfig,
    SourceKind,
    TaskName,
)
from batchvlm.endpoint_settings import check_endpoint
from batchvlm.errors import ConfigError, ErrorType

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_TRACKERS = ("tensorboard", "wandb")
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/@]*:[^/@]*@")
_ROOTS = tuple(f.name for f in fields(JobConfig))


def conf_dir() -> Path:
    """The folder with the config groups: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def register_schema() -> None:
    """Make `JobConfig` known to Hydra as `job_schema`, and the demo's files as resolvers."""
    schema = OmegaConf.structured(JobConfig)
    _unlock(schema)
    # The two places where any key is welcome: it is the processor's, or the server's.
    OmegaConf.set_struct(schema.model._get_node("processor_kwargs"), False)
    OmegaConf.set_struct(schema.engine.endpoint._get_node("extra_body"), False)
    ConfigStore.instance().store(name="job_schema", node=schema)
    paths = {"model": demo.MODEL_DIR, "samples": demo.SAMPLES_PATH}
    OmegaConf.register_new_resolver(
        "batchvlm.demo", lambda what: str(paths[what]), replace=True, use_cache=False
    )
    # The demo's schema goes with the demo's images alone: nobody's scans shall be held against it.
    # The demo's model knows its few questions to the letter.
    OmegaConf.register_new_resolver(
        "batchvlm.instructions_for",
        lambda path: "off" if path == str(demo.MODEL_DIR) else "auto",
        replace=True,
        use_cache=False,
    )
    OmegaConf.register_new_resolver(
        "batchvlm.schema_of",
        lambda data: str(demo.SCHEMA_PATH) if data == "demo" else None,
        replace=True,
        use_cache=False,
    )


def _unlock(node: DictConfig) -> None:
    # OmegaConf marks nodes made from frozen dataclasses read-only; Hydra has yet to merge into
    # them. `read_config` gives back frozen objects.
    OmegaConf.set_readonly(node, None)
    for key in node:
        if not OmegaConf.is_missing(node, key) and isinstance(
            child := node._get_node(key), DictConfig
        ):
            _unlock(child)


def compose(config_name: str = "run", overrides: Sequence[str] = ()) -> JobConfig:
    """Compose and check a job as the command line does.

    Args:
        config_name: a primary config in `conf/`: run, caption, vqa or extract.
        overrides: Hydra overrides, such as `["data=parquet", "data.path=in.parquet"]`.

    Raises:
        ConfigError: a setting is unknown, missing, of the wrong type, out of range or impossible.
    """
    register_schema()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            node = hydra_compose(config_name, overrides=list(overrides))
    except Exception as error:
        if not is_mistake(error):
            raise
        raise explain(error) from error
    return read_config(node)


def read_config(node: DictConfig) -> JobConfig:
    """Turn a composed node into the checked, frozen `JobConfig`."""
    with flag_override(node, "struct", False):
        node.pop("hydra", None)
    try:
        _refuse_unknown(node, JobConfig)
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise ConfigError(
                f"{missing[0]} is required and not set", hint=f"add {missing[0]}=... to the command"
            )
        cfg = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(cfg, JobConfig)
    check_config(cfg)
    return cfg


def _refuse_unknown(node: DictConfig, cls: type, prefix: str = "") -> None:
    # Hydra's `+key=value` adds keys that no class knows.
    known = {f.name: f for f in fields(cls)}
    for key in node:
        if key not in known:
            raise _unknown_key(f"{prefix}{key!s}")
        factory = known[str(key)].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            _refuse_unknown(node[key], factory, f"{prefix}{key!s}.")


def is_mistake(error: Exception) -> bool:
    """Whether Hydra or OmegaConf found something wrong with what the user asked for."""
    broken = HydraException | OmegaConfBaseException | YAMLError | UnicodeDecodeError
    return isinstance(error, broken) or (
        # Hydra's word for `group=null`.
        str(error).startswith("Config group override must be")
    )


def explain(error: Exception) -> ConfigError:
    """Say in one line what Hydra or OmegaConf found wrong."""
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return _broken_file(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    chain = list(_causes(error))
    override = re.search(r"Could not override '([^']+)'", " ".join(map(str, chain)))
    cause = next((e for e in chain if isinstance(e, OmegaConfBaseException)), None)
    if cause is not None:
        key = override.group(1) if override else str(cause.full_key or "")
        reason = str(cause.msg or cause).splitlines()[0]
        if key and "not in" in reason:
            return _unknown_key(key)
        if "is not Optional" in reason:
            return ConfigError(f"{key} cannot be null", hint=f"give it a value: {key}=...")
        if "is not a ListConfig" in reason:
            value = getattr(cause, "value", None)
            return ConfigError(f"{key}={value} is no list", hint=f"write '{key}=[{value}]'")
        return ConfigError(f"{key}: {reason}" if key else reason)
    if override:
        return _unknown_key(override.group(1))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("See https://")]
    if len(lines) > 1 and lines[1].startswith("Available options"):
        options = itertools.takewhile(lambda line: not line.startswith("Config search"), lines[2:])
        hint = f"there are {', '.join(options)}"
        if option := re.search(r"Could not find '(\w+)/([^']+)'", lines[0]):
            group, name = option.groups()
            if group in ("data", "model"):
                hint += f"; a name of your own is {group}.path={name}"
            return ConfigError(f"{group}={name} is no option of {group}", hint=hint)
        return ConfigError(lines[0], hint=hint)
    return ConfigError(lines[0] if lines else type(error).__name__, hint="; ".join(lines[1:3]))


def _unreadable(override: str) -> ConfigError:
    key, equals, value = override.partition("=")
    if not equals:
        # What most people try first is the input's name alone.
        hint = f"an input is named by data=parquet data.path={override}, say; --help tells more"
        return ConfigError(f"{override} is no setting, which is written key=value", hint=hint)
    hint = "quote a value with spaces, braces or commas twice: 'task.prompt=\"Is it red?\"'"
    if value.startswith("[") != value.endswith("]"):
        hint = f"write a list as '{key}=[{value.strip('[]')}]'"
    return ConfigError(f"cannot read the override {override}", hint=hint)


def _broken_file(error: YAMLError | UnicodeDecodeError) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    place = "a file of your configuration" if mark is None else f"{mark.name}, line {mark.line + 1}"
    return ConfigError(f"{place}: no YAML that can be read: {problem}", hint="mend that file")


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown_key(key: str) -> ConfigError:
    known = list(_dotted(JobConfig))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    leaf = key.rsplit(".", 1)[-1]
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    hint = f"did you mean {near[0]}?" if near else "batchvlm run --cfg job lists every setting"
    return ConfigError(f"{key} is no setting", hint=hint)


def _dotted(cls: type, prefix: str = "") -> Iterable[str]:
    for f in fields(cls):
        name = f"{prefix}{f.name}"
        if isinstance(f.default_factory, type) and is_dataclass(f.default_factory):
            yield from _dotted(f.default_factory, f"{name}.")
        else:
            yield name


def image_columns(cfg: JobConfig) -> tuple[str, ...]:
    """The image columns in slot order, whichever way they were written."""
    image = cfg.data.columns.image
    if image is None:
        return ()
    return (image,) if isinstance(image, str) else tuple(image)


def check_config(cfg: JobConfig) -> None:
    """Refuse values out of range and settings that cannot go together.

    Raises:
        ConfigError: names the setting, its value, the limit and what to do.
    """
    _check_ranges(cfg)
    _check_choices(cfg)
    _check_combinations(cfg)


def _at_least(setting: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise ConfigError(f"{setting}={value} must be at least {low:g}")


def _between(setting: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{setting}={value} must lie between {low} and {high}")


def _check_ranges(cfg: JobConfig) -> None:
    gen, batching, runtime = cfg.generation, cfg.batching, cfg.runtime
    for key, (low, high) in GENERATION_LIMITS.items():
        _between(f"generation.{key}", getattr(gen, key), low, high)
    _between("generation.min_new_tokens", gen.min_new_tokens, 0, gen.max_new_tokens)
    _at_least("batching.max_batch_tokens", batching.max_batch_tokens, 1)
    _at_least("batching.max_batch_size", batching.max_batch_size, 1)
    _at_least("batching.sort_window", batching.sort_window, 1)
    _at_least("batching.max_window_bytes", batching.max_window_bytes, 1)
    _at_least("output.rows_per_shard", cfg.output.rows_per_shard, 1)
    _at_least("output.flush_every_s", cfg.output.flush_every_s, 0)
    _at_least("output.flush_every_rows", cfg.output.flush_every_rows, 1)
    _at_least("retry.max_attempts", cfg.retry.max_attempts, 1)
    _at_least("retry.invalid_json", cfg.retry.invalid_json, 0)
    _at_least("data.max_rows", cfg.data.max_rows, 1)
    _at_least("data.max_image_bytes", cfg.data.max_image_bytes, 1)
    _at_least("data.fetch_timeout_s", cfg.data.fetch_timeout_s, 0.1)
    _at_least("data.fetch_attempts", cfg.data.fetch_attempts, 1)
    _at_least("data.fetch_concurrency", cfg.data.fetch_concurrency, 1)
    _at_least("data.max_source_pixels", cfg.data.max_source_pixels, 1)
    _at_least("model.max_image_pixels", cfg.model.max_image_pixels, 1)
    _at_least("model.max_prompt_tokens", cfg.model.max_prompt_tokens, 1)
    _at_least("runtime.num_tasks", runtime.num_tasks, 1)
    _at_least("runtime.num_workers", runtime.num_workers, 0)
    _at_least("runtime.num_threads", runtime.num_threads, 1)
    _at_least("runtime.sample_timeout_s", runtime.sample_timeout_s, 0.1)
    _at_least("runtime.log_every_s", runtime.log_every_s, 0.1)
    _at_least("runtime.max_error_rate_after", runtime.max_error_rate_after, 1)
    _at_least("runtime.stall_timeout_s", runtime.stall_timeout_s, 1)
    _at_least("runtime.grace_s", runtime.grace_s, 0.1)
    _at_least("tracking.every_s", cfg.tracking.every_s, 0.1)
    endpoint = cfg.engine.endpoint
    _between("engine.endpoint.max_concurrency", endpoint.max_concurrency, 1, 1024)
    _at_least("engine.endpoint.timeout_s", endpoint.timeout_s, 0.1)
    _at_least("engine.endpoint.max_attempts", endpoint.max_attempts, 1)
    _at_least("engine.endpoint.patience_s", endpoint.patience_s, 0)
    _at_least("runtime.walltime_margin_s", runtime.walltime_margin_s, 0)
    if runtime.max_error_rate is not None:
        _between("runtime.max_error_rate", runtime.max_error_rate, 0, 1)
    if not 0 <= runtime.task_id < runtime.num_tasks:
        raise ConfigError(
            f"runtime.task_id={runtime.task_id} must lie between 0 and "
            f"runtime.num_tasks - 1 = {runtime.num_tasks - 1}"
        )


def _check_choices(cfg: JobConfig) -> None:
    if cfg.model.dtype not in _DTYPES:
        raise ConfigError(f"model.dtype={cfg.model.dtype} must be one of {', '.join(_DTYPES)}")
    where = cfg.model.device_map
    if not (where is None or isinstance(where, dict) or where in _DEVICE_MAPS):
        raise ConfigError(
            f"model.device_map={where} must be one of {', '.join(_DEVICE_MAPS)}, or a mapping of "
            "modules to devices"
        )
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", cfg.engine.device):
        raise ConfigError(
            f"engine.device={cfg.engine.device} must be auto, cpu, cuda, cuda:N, xpu or mps"
        )
    image = cfg.data.columns.image
    is_names = isinstance(image, list) and all(isinstance(name, str) for name in image)
    if not (image is None or isinstance(image, str) or is_names):
        raise ConfigError(f"data.columns.image={image} must be a column's name or a list of names")
    schema = cfg.task.output.json_schema
    if not (schema is None or isinstance(schema, str | dict)):
        raise ConfigError(
            "task.output.json_schema must be the path of a schema file or the schema itself, "
            f"not {type(schema).__name__}"
        )

    for key, value, meaning in (
        ("data.path", cfg.data.path, "name the input"),
        ("data.image_root", cfg.data.image_root, "name a folder, or null: the input's own"),
        ("model.path", cfg.model.path, "name a model of the Hub or a folder"),
        ("output.dir", cfg.output.dir, "name a folder"),
    ):
        if value is not None and not value.strip():
            raise ConfigError(f"{key} is empty", hint=meaning)
        if value is not None and _PASSWORD.match(value):
            raise ConfigError(
                f"{key} is a URL with a password, which the output would keep for ever",
                hint="leave credentials to the environment, as the place's own tools find them",
            )
    for name in cfg.retry.errors:
        if name not in list(ErrorType):
            raise ConfigError(
                f"retry.errors names {name!r}, which is no error type",
                hint=f"there are {', '.join(ErrorType)}",
            )
    for name in cfg.tracking.trackers:
        if name not in _TRACKERS:
            raise ConfigError(
                f"tracking.trackers names {name!r}", hint=f"there are {', '.join(_TRACKERS)}"
            )
    if "" in cfg.generation.stop:
        raise ConfigError("generation.stop holds an empty string, which ends every answer")
    for key, column in to_plain(cfg.generation.columns).items():
        if column == "":
            raise ConfigError(f"generation.columns.{key} is empty", hint="name a column, or null")


def _check_combinations(cfg: JobConfig) -> None:
    model = cfg.model
    for key, needs in (
        ("quantization_skip", "quantization"),
        ("adapter_revision", "adapter"),
        ("adapter_subfolder", "adapter"),
    ):
        if getattr(model, key) is not None and getattr(model, needs) is None:
            raise ConfigError(f"model.{key} has no effect without model.{needs}")
    _check_output(cfg)
    gen = cfg.generation
    if gen.num_return_sequences > 1 and not (gen.temperature > 0 or gen.columns.temperature):
        raise ConfigError(
            f"generation.num_return_sequences={gen.num_return_sequences} greedy answers are all "
            "the same",
            hint="set generation.temperature above 0",
        )
    if cfg.data.source is not SourceKind.hf:
        for key in ("subset", "split", "revision", "streaming"):
            if getattr(cfg.data, key) != getattr(DataConfig, key):
                raise ConfigError(
                    f"data.{key} has no effect with data.source={cfg.data.source.value}",
                    hint="it belongs to data=hf",
                )
    check_endpoint(cfg)
    if cfg.data.allow_hosts and not cfg.data.allow_remote:
        raise ConfigError(
            "data.allow_hosts has no effect without data.allow_remote=true",
            hint="add data.allow_remote=true",
        )
    if any(entry.lower().startswith(("file:", "local:")) for entry in cfg.data.allow_hosts):
        raise ConfigError(
            "data.allow_hosts names files of this machine", hint="data.image_root is for those"
        )
    for entry in cfg.data.allow_hosts:
        if not entry.strip() or re.fullmatch(r"[^:/]+:\d+|[^:/]+/.*", entry):
            raise ConfigError(
                f"data.allow_hosts: {entry!r} is no host",
                hint="write the name alone, as images.intra, or a place, as s3://bucket/folder",
            )
    if cfg.data.allow_remote and find_spec("aiohttp") is None:
        raise ConfigError(
            "data.allow_remote=true needs aiohttp, which is not installed",
            hint="pip install 'batchvlm[remote]'",
        )
    _check_dialog(cfg)
    brings_text = cfg.data.columns.messages or cfg.data.columns.turns
    if not image_columns(cfg) and not brings_text and not cfg.task.prompt.strip():
        raise ConfigError(
            "the rows bring neither images nor messages, and task.prompt is empty",
            hint="set data.columns.image, data.columns.messages or task.prompt",
        )


def _check_output(cfg: JobConfig) -> None:
    output = cfg.task.output
    forms = ("json_schema", "pydantic", "choice", "regex", "grammar", "type")
    named = [f"task.output.{name}" for name in forms if getattr(output, name) is not None]
    columns = [
        f"task.output.{name}"
        for name in ("json_schema_column", "choice_column")
        if getattr(output, name) is not None
    ]
    # Rows may bring schemas with any task: some requests of a batch API do.
    for_extract = [*named, *(name for name in columns if "choice" in name)]
    if cfg.task.name is not TaskName.extract and for_extract:
        raise ConfigError(
            f"{for_extract[0]} has no effect with task={cfg.task.name.value}",
            hint="choose task=extract",
        )
    if cfg.task.name is TaskName.extract and not (named or columns):
        raise ConfigError(
            "task=extract has no schema",
            hint="set task.output.json_schema=FILE or task.output.json_schema_column=COLUMN; "
            "or pydantic, choice, choice_column, regex, grammar or type there",
        )
    if len(named) > 1 or len(columns) > 1:
        both = named if len(named) > 1 else columns
        raise ConfigError(f"{both[0]} and {both[1]} are both set", hint="keep one of them")
    for name in ("pydantic", "regex", "grammar", "type", "json_schema_column", "choice_column"):
        if getattr(output, name) == "":
            raise ConfigError(f"task.output.{name} is empty", hint="give it a value, or null")
    if output.choice is not None:
        if not output.choice or "" in output.choice:
            raise ConfigError("task.output.choice needs answers to choose from, none of them empty")
        if len(set(output.choice)) < len(output.choice):
            raise ConfigError("task.output.choice names an answer twice")


def _check_dialog(cfg: JobConfig) -> None:
    columns, gen = cfg.data.columns, cfg.generation
    if cfg.task.name is not TaskName.dialog:
        if columns.turns:
            raise ConfigError(
                f"data.columns.turns has no effect with task={cfg.task.name.value}",
                hint="choose task=dialog",
            )
        return
    if not columns.turns:
        raise ConfigError("task=dialog has no turns", hint="set data.columns.turns=COLUMN")
    for key, value in {
        "data.columns.messages": columns.messages,
        "task.output.json_schema_column": cfg.task.output.json_schema_column,
        "generation.num_return_sequences": gen.num_return_sequences > 1,
        "generation.columns.num_return_sequences": gen.columns.num_return_sequences,
    }.items():
        if value:
            raise ConfigError(f"{key} does not go with task=dialog", hint="leave it out")


def to_plain(value: Any) -> Any:
    """A config object as JSON-ready values: enums by name, dataclasses as dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return getattr(value, "value", value)
