"""Check settings beyond their types: ranges, choices and combinations.

This module does not import torch, so mistakes show within a second.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import asdict
from importlib.util import find_spec

from batchvlm import demo
from batchvlm.config import (
    GENERATION_LIMITS,
    DataConfig,
    EngineName,
    GenerationConfig,
    Guided,
    JobConfig,
    SourceKind,
    TaskName,
    TaskOutputConfig,
)
from batchvlm.errors import ConfigError, ErrorType
from batchvlm.settings.endpoint import check_endpoint
from batchvlm.words import ends_in_number, setting

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_TRACKERS = ("tensorboard", "wandb")
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_DEMO_DATA, _DEMO_MODEL = "demo", "batchvlm-demo"  # their names in conf/
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/@]*:[^/@]*@")


def _is_host_entry(entry: str) -> bool:
    """Whether an entry of `data.allow_hosts` is a host or an object-store address."""
    protocol, separator, _ = entry.partition("://")
    if separator:
        return _WORD.fullmatch(protocol) is not None and protocol.lower() not in _WEB
    try:
        ipaddress.ip_address(re.sub(r"^\[(.*)\]$", r"\1", entry).rstrip("."))
    except ValueError:
        # IP addresses in other notations, such as 127.1, are never allowed.
        return bool(_HOST.fullmatch(entry)) and not ends_in_number(entry)
    return True


_WEB = ("http", "https")
_MAX_S = 1_000_000_000
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*")
_HOST = re.compile(r"[\w\-]+(\.[\w\-]+)*\.?")


def check_config(cfg: JobConfig) -> None:
    """Check ranges, choices and combinations of settings.

    Raises:
        ConfigError: names the setting, its value, the limit and what to do.
    """
    _check_ranges(cfg)
    _check_choices(cfg)
    _check_tracking(cfg)
    _check_demo(cfg)
    _check_combinations(cfg)


def _at_least(setting: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise ConfigError(f"{setting}={value} must be at least {low:g}")


def _between(setting: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{setting}={value} must lie between {low} and {high}")


def _seconds(setting: str, value: float | None, low: float) -> None:
    _at_least(setting, value, low)
    # An infinite timeout would raise in the middle of a run, in some thread.
    if value is not None and value > _MAX_S:
        raise ConfigError(f"{setting}={value} must be at most {_MAX_S:,} seconds")


def _check_ranges(cfg: JobConfig) -> None:
    gen, batching, runtime = cfg.generation, cfg.batching, cfg.runtime
    for key, (low, high) in GENERATION_LIMITS.items():
        _between(f"generation.{key}", getattr(gen, key), low, high)
    _between("generation.min_new_tokens", gen.min_new_tokens, 0, gen.max_new_tokens)
    _at_least("batching.max_batch_tokens", batching.max_batch_tokens, 1)
    _at_least("batching.max_batch_size", batching.max_batch_size, 1)
    _at_least("batching.sort_window", batching.sort_window, 1)
    _at_least("batching.max_window_bytes", batching.max_window_bytes, 1)
    _between("engine.memory_fraction", cfg.engine.memory_fraction, 0.01, 1)
    _at_least("engine.max_slots", cfg.engine.max_slots, 1)
    _at_least("engine.max_prefill_tokens", cfg.engine.max_prefill_tokens, 1)
    _at_least("engine.cpu_streams", cfg.engine.cpu_streams, 1)
    _at_least("output.rows_per_shard", cfg.output.rows_per_shard, 1)
    _seconds("output.flush_every_s", cfg.output.flush_every_s, 0)
    _at_least("output.flush_every_rows", cfg.output.flush_every_rows, 1)
    _at_least("retry.max_attempts", cfg.retry.max_attempts, 1)
    _at_least("retry.invalid_json", cfg.retry.invalid_json, 0)
    _at_least("data.max_rows", cfg.data.max_rows, 1)
    _at_least("data.max_image_bytes", cfg.data.max_image_bytes, 1)
    _seconds("data.fetch_timeout_s", cfg.data.fetch_timeout_s, 0.1)
    _at_least("data.fetch_attempts", cfg.data.fetch_attempts, 1)
    _at_least("data.fetch_concurrency", cfg.data.fetch_concurrency, 1)
    _at_least("data.max_source_pixels", cfg.data.max_source_pixels, 1)
    _at_least("model.max_image_pixels", cfg.model.max_image_pixels, 1)
    _at_least("model.gpus_per_replica", cfg.model.gpus_per_replica, 1)
    _at_least("model.max_prompt_tokens", cfg.model.max_prompt_tokens, 1)
    _at_least("runtime.num_tasks", runtime.num_tasks, 1)
    _at_least("runtime.num_workers", runtime.num_workers, 0)
    _at_least("runtime.num_threads", runtime.num_threads, 1)
    _seconds("runtime.sample_timeout_s", runtime.sample_timeout_s, 0.1)
    _seconds("runtime.log_every_s", runtime.log_every_s, 0.1)
    _at_least("runtime.max_error_rate_after", runtime.max_error_rate_after, 1)
    _seconds("runtime.stall_timeout_s", runtime.stall_timeout_s, 1)
    _seconds("runtime.grace_s", runtime.grace_s, 0.1)
    _seconds("tracking.every_s", cfg.tracking.every_s, 0.1)
    endpoint = cfg.engine.endpoint
    _between("engine.endpoint.max_concurrency", endpoint.max_concurrency, 1, 1024)
    _seconds("engine.endpoint.timeout_s", endpoint.timeout_s, 0.1)
    _at_least("engine.endpoint.max_attempts", endpoint.max_attempts, 1)
    _seconds("engine.endpoint.patience_s", endpoint.patience_s, 0)
    _seconds("runtime.walltime_margin_s", runtime.walltime_margin_s, 0)
    if runtime.max_error_rate is not None:
        _between("runtime.max_error_rate", runtime.max_error_rate, 0, 1)
    if not 0 <= runtime.task_id < runtime.num_tasks:
        raise ConfigError(
            f"runtime.task_id={runtime.task_id} must lie between 0 and "
            f"runtime.num_tasks - 1 = {runtime.num_tasks - 1}"
        )


def _check_choices(cfg: JobConfig) -> None:
    dtype = cfg.model.dtype
    by_part = dtype if isinstance(dtype, dict) else {None: dtype}
    for part, name in by_part.items():
        if name not in _DTYPES:
            key = "model.dtype" if part is None else f"model.dtype.{part}"
            raise ConfigError(f"{key}={name} must be one of {', '.join(_DTYPES)}")
    if not by_part:
        raise ConfigError("model.dtype={} names no part", hint="leave it out, or name a dtype")
    if cfg.model.tp_plan not in (None, "auto"):
        raise ConfigError(f"model.tp_plan={cfg.model.tp_plan} must be auto, or null")
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
    if isinstance(image, list) and None in image:
        raise holds_null("data.columns.image")
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
                f"{key} is a URL with a password, which the output would store",
                hint="leave credentials to the environment, as the place's own tools find them",
            )
    for name in cfg.retry.errors:
        if name not in list(ErrorType):
            raise ConfigError(
                f"retry.errors names {name!r}, which is no error type",
                hint=f"there are {', '.join(ErrorType)}",
            )
    if "" in cfg.generation.stop:
        raise ConfigError("generation.stop holds an empty string, which ends every answer")
    for key, column in asdict(cfg.generation.columns).items():
        if column == "":
            raise ConfigError(f"generation.columns.{key} is empty", hint="name a column, or null")


def holds_null(key: str) -> ConfigError:
    """Return the error of a list of texts with a null in it, as Hydra and YAML read that word."""
    return ConfigError(
        f"{key} holds a null, which is no text",
        hint=f"""if the word is meant, quote it: '{key}=["null"]'""",
    )


def _check_tracking(cfg: JobConfig) -> None:
    """Check that trackers write to a disk: they would treat a URL as the name of a local folder."""
    tracking = cfg.tracking
    for name in tracking.trackers:
        if name not in _TRACKERS:
            raise ConfigError(
                f"tracking.trackers names {name!r}", hint=f"there are {', '.join(_TRACKERS)}"
            )
    for key in ("dir", "prometheus_file"):
        value = getattr(tracking, key)
        if value and _URL.match(value):
            raise ConfigError(
                f"tracking.{key}={value} is a URL, and trackers write on a disk",
                hint="name a place there",
            )
    is_store = _URL.match(cfg.output.dir) and not cfg.output.dir.startswith("file:")
    if tracking.trackers and not tracking.dir and is_store:
        raise ConfigError(
            f"tracking.trackers: {tracking.trackers[0]} cannot write into the output folder, which "
            "is in an object store",
            hint="set tracking.dir to a folder on a disk",
        )


def _check_demo(cfg: JobConfig) -> None:
    """Refuse another input or model together with the name and settings of the demo's."""
    data, model = cfg.data, cfg.model
    if data.name == _DEMO_DATA and data.path != str(demo.SAMPLES_PATH):
        raise ConfigError(
            f"data.path={data.path} is set, but no kind of input",
            hint=f"write data=parquet {setting('data.path', data.path)} (or data=hf, folder, "
            "jsonl, openai, webdataset)",
        )
    if model.name == _DEMO_MODEL and model.path != str(demo.MODEL_DIR):
        raise ConfigError(
            f"model.path={model.path} is set together with the demo's settings",
            hint=f"write model=hub {setting('model.path', model.path)}",
        )


def _check_combinations(cfg: JobConfig) -> None:
    model = cfg.model
    for key, needs in (
        ("quantization_skip", "quantization"),
        ("adapter_revision", "adapter"),
        ("adapter_subfolder", "adapter"),
    ):
        if getattr(model, key) is not None and getattr(model, needs) is None:
            raise ConfigError(f"model.{key} has no effect without model.{needs}")
    for key in ("quantization", "adapter", "device_map", "tp_plan"):
        if getattr(model, key) is None:
            continue
        if isinstance(model.dtype, dict):
            raise ConfigError(
                f"model.dtype by part does not go with model.{key}",
                hint="name one dtype for the whole model",
            )
        if model.tp_plan is not None and key != "tp_plan":
            raise ConfigError(f"model.tp_plan does not go with model.{key}", hint="leave one out")
    if model.tp_plan is not None and cfg.engine.name is EngineName.endpoint:
        raise ConfigError("model.tp_plan has no effect with engine=endpoint", hint="leave it out")
    if model.gpus_per_replica is not None and model.device_map is None and model.tp_plan is None:
        raise ConfigError(
            "model.gpus_per_replica has no effect without model.device_map or model.tp_plan"
        )
    _check_output(cfg)
    _check_scores(cfg)
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
        if not _is_host_entry(entry):
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
    if cfg.task.continue_final_message and not cfg.data.columns.messages:
        raise ConfigError(
            "task.continue_final_message has no effect without data.columns.messages",
            hint="task.answer_prefix begins the answers to other prompts",
        )
    if cfg.data.columns.image_optional and (brings_text or not cfg.data.columns.image):
        raise ConfigError(
            "data.columns.image_optional has no effect without image columns and task.prompt",
            hint="leave it out: messages may have no image",
        )
    if not cfg.data.columns.image and not brings_text and not cfg.task.prompt.strip():
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
    # Rows may have schemas with any task: some requests of a batch API do.
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
    takes_form = cfg.task.name is TaskName.extract or columns
    if not takes_form and output.guided is not TaskOutputConfig.guided:
        raise ConfigError(
            f"task.output.guided has no effect with task={cfg.task.name.value}, whose answers have "
            "no form",
            hint="choose task=extract, or set task.output.json_schema_column=COLUMN",
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


_DECODING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "min_new_tokens", "stop", "ignore_eos", "num_return_sequences"),
)


def _check_scores(cfg: JobConfig) -> None:
    """Check settings of scoring: it decodes nothing, so settings of decoding have no effect."""
    if not cfg.task.scores:
        return
    output, gen, defaults = cfg.task.output, cfg.generation, GenerationConfig()
    named = [
        n
        for n in ("json_schema", "regex", "grammar", "type", "json_schema_column")
        if getattr(output, n) is not None
    ]
    if cfg.task.name is not TaskName.extract or named:
        what = f"task.output.{named[0]}" if named else f"task={cfg.task.name.value}"
        raise ConfigError(
            f"task.scores=true scores choices, and does not go with {what}",
            hint="choose task=extract with task.output.choice=[A,B] or "
            "task.output.choice_column=COLUMN",
        )
    if cfg.engine.name is EngineName.endpoint:
        raise ConfigError(
            "task.scores=true does not go with engine=endpoint: no server says how likely a text "
            "is that it would not choose",
            hint="run the model here, or leave task.scores out",
        )
    if cfg.model.tp_plan is not None:
        raise ConfigError(
            "task.scores=true does not go with model.tp_plan",
            hint="set model.device_map=auto in its place, or leave task.scores out",
        )
    if output.guided is Guided.off:
        raise ConfigError("task.output.guided=off has no effect with task.scores=true")
    for key in _DECODING:
        is_set = getattr(gen, key) != getattr(defaults, key)
        if is_set or getattr(gen.columns, key):
            where = (
                f"generation.{key}={getattr(gen, key)}" if is_set else f"generation.columns.{key}"
            )
            raise ConfigError(
                f"{where} has no effect with task.scores=true, which decodes nothing",
                hint="leave it out",
            )


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
