"""Compose a checked `JobConfig` from the command line, and explain mistakes in one line.

This module does not load a model, read a row or import torch, so mistakes show within a second.
"""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, flag_override, read_write
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import YAMLError

from batchvlm import demo
from batchvlm.config import (
    JobConfig,
)
from batchvlm.errors import ConfigError
from batchvlm.settings.checks import check_config, holds_null
from batchvlm.words import setting

_ROOTS = tuple(f.name for f in fields(JobConfig))
_PATH_OPTIONS = {"data": "parquet", "model": "hub"}
"""For each group, the option that takes a path of the user's."""


def conf_dir() -> Path:
    """Return the folder of config groups: in an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def register_schema() -> None:
    """Register `JobConfig` with Hydra as `job_schema`, and resolvers for the demo's files."""
    schema = OmegaConf.structured(JobConfig)
    _unlock(schema)
    # The settings with arbitrary keys, which are the processor's, the template's or the server's.
    OmegaConf.set_struct(schema.model._get_node("processor_kwargs"), False)
    OmegaConf.set_struct(schema.model._get_node("chat_template_kwargs"), False)
    OmegaConf.set_struct(schema.engine.endpoint._get_node("extra_body"), False)
    ConfigStore.instance().store(name="job_schema", node=schema)
    paths = {"model": demo.MODEL_DIR, "samples": demo.SAMPLES_PATH}
    OmegaConf.register_new_resolver(
        "batchvlm.demo", lambda what: str(paths[what]), replace=True, use_cache=False
    )
    # The demo's model only understands its questions verbatim, without further instructions.
    OmegaConf.register_new_resolver(
        "batchvlm.instructions_for",
        lambda path: "off" if path == str(demo.MODEL_DIR) else "auto",
        replace=True,
        use_cache=False,
    )
    # The demo's schema is the default for the demo's images only.
    OmegaConf.register_new_resolver(
        "batchvlm.schema_of",
        lambda data: str(demo.SCHEMA_PATH) if data == "demo" else None,
        replace=True,
        use_cache=False,
    )


def _unlock(node: DictConfig) -> None:
    # OmegaConf makes nodes of frozen dataclasses read-only, but Hydra must merge into them.
    # `read_config` returns frozen objects.
    OmegaConf.set_readonly(node, None)
    for key in node:
        if not OmegaConf.is_missing(node, key) and isinstance(
            child := node._get_node(key), DictConfig
        ):
            _unlock(child)


def compose(config_name: str = "run", overrides: Sequence[str] = ()) -> JobConfig:
    """Compose and check a job like the command line.

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


def names_the_time(node: DictConfig) -> bool:
    """Whether `output.dir` contains Hydra's `${now:...}`, so that it differs between processes."""
    written = OmegaConf.to_container(node, resolve=False)
    assert isinstance(written, dict)
    return "${now:" in str(written.get("output"))


def read_config(node: DictConfig) -> JobConfig:
    """Convert a composed node to a checked, frozen `JobConfig`.

    Raises:
        ConfigError: a setting is unknown, missing, of the wrong type, out of range or impossible.
    """
    with flag_override(node, "struct", False):
        node.pop("hydra", None)
    if OmegaConf.get_type(node) is not JobConfig:
        raise _not_extended()
    try:
        _refuse_unknown(node, JobConfig)
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise ConfigError(
                f"{missing[0]} is required and not set", hint=f"add {missing[0]}=... to the command"
            )
        for key in _TEXTS:
            _read_texts(node, key)
        for key in _PATHS:
            _expand_home(node, key)
        cfg = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(cfg, JobConfig)
    check_config(cfg)
    return cfg


_TEXTS = ("task.output.choice", "generation.stop")
"""Lists of text that are typed as lists of any values: OmegaConf would turn true, and YAML's yes,
into the text "True"."""


def _read_texts(node: DictConfig, key: str) -> None:
    values = OmegaConf.select(node, key)
    if values is None:
        return
    for value in values:
        if isinstance(value, bool):
            raise ConfigError(
                f"{key}: {str(value).lower()} stands for a truth value and is no text",
                hint=f"""quote each text: '{key}=["true","false"]', in YAML ["yes", "no"]""",
            )
        if value is None:
            raise holds_null(key)
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{key} holds a {type(value).__name__}", hint="it takes texts")
    with read_write(node):
        OmegaConf.update(node, key, [str(value) for value in values])


_PATHS = (
    *("data.path", "data.image_root", "model.path", "model.adapter", "output.dir"),
    *("task.output.json_schema", "task.output.grammar"),
    *("tracking.dir", "tracking.prometheus_file"),
)


def _expand_home(node: DictConfig, key: str) -> None:
    """Expand a leading `~` in a path, which a shell does not expand inside quotes."""
    path = OmegaConf.select(node, key)
    if isinstance(path, str) and path.startswith("~"):
        with read_write(node):
            OmegaConf.update(node, key, expanduser(path))


def _refuse_unknown(node: DictConfig, cls: type, prefix: str = "") -> None:
    # Hydra's `+key=value` can add keys that the classes do not have.
    known = {f.name: f for f in fields(cls)}
    for key in node:
        if key not in known:
            raise _unknown_key(f"{prefix}{key!s}")
        factory = known[str(key)].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            _refuse_unknown(node[key], factory, f"{prefix}{key!s}.")


def is_mistake(error: Exception) -> bool:
    """Whether an error of Hydra, OmegaConf or YAML is a mistake in the user's settings."""
    broken = HydraException | OmegaConfBaseException | YAMLError | UnicodeDecodeError
    return isinstance(error, broken) or (
        # Hydra's message for `group=null`.
        str(error).startswith("Config group override must be")
    )


def explain(error: Exception) -> ConfigError:
    """Return an error that explains a mistake found by Hydra or OmegaConf in one line."""
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return _broken_file(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if twice := re.match(r"Ambiguous value for argument '(.*)'\n", str(error)):
        return _ambiguous(twice[1])
    chain = list(_causes(error))
    override = re.search(r"Could not override '([^']+)'", " ".join(map(str, chain)))
    cause = next((e for e in chain if isinstance(e, OmegaConfBaseException)), None)
    if cause is not None:
        key = override.group(1) if override else str(cause.full_key or "")
        reason = str(cause.msg or cause).splitlines()[0]
        if key and "not in" in reason:
            return _unknown_key(key)
        if "Cannot convert 'list' to string" in reason:
            glob = setting("data.path", "in/*.parquet")
            hint = f"write {glob}, say" if key == "data.path" else ""
            return ConfigError(f"{key} takes one text and no list", hint=hint)
        if "is not Optional" in reason:
            return ConfigError(f"{key} cannot be null", hint=f"give it a value: {key}=...")
        if "NoneType is not a subclass of str" in reason and (
            item := re.match(r"(.+)\[\d+\]$", key)
        ):
            return holds_null(item[1])
        if "is not a ListConfig" in reason:
            value = getattr(cause, "value", None)
            return ConfigError(f"{key}={value} is no list", hint=f"write '{key}=[{value}]'")
        is_dollar = isinstance(cause, GrammarParseError | InterpolationResolutionError)
        hint = "${ begins the name of another setting; in a template a dollar is {{ '$' }}"
        return ConfigError(f"{key}: {reason}" if key else reason, hint=hint if is_dollar else "")
    if override:
        return _unknown_key(override.group(1))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("See https://")]
    if len(lines) > 1 and lines[1].startswith("Available options"):
        options = itertools.takewhile(lambda line: not line.startswith("Config search"), lines[2:])
        hint = f"there are {', '.join(options)}"
        if option := re.search(r"Could not find '((?:hydra/)?\w+)/([^']+)'", lines[0]):
            group, name = option.groups()
            near = difflib.get_close_matches(name, hint.removeprefix("there are ").split(", "), n=1)
            if near and not re.search(r"[./]", name):  # else a path
                hint = f"did you mean {group}={near[0]}? batchvlm run --help lists all options"
            elif group in _PATH_OPTIONS:
                path_setting = setting(f"{group}.path", name)
                hint += (
                    f"; one of your own is written {group}={_PATH_OPTIONS[group]} {path_setting}"
                )
            return ConfigError(f"{group}={name} is no option of {group}", hint=hint)
        return ConfigError(lines[0], hint=hint)
    return ConfigError(lines[0] if lines else type(error).__name__, hint="; ".join(lines[1:3]))


def _unreadable(override: str) -> ConfigError:
    """Explain an override that Hydra cannot parse, mostly for a character that must be quoted."""
    key, equals, value = override.partition("=")
    if not equals:
        if override in _dotted(JobConfig):
            return ConfigError(f"{override} has no value", hint=f"write {override}=...")
        # Many people first type only the input's path, or a text without quotes.
        path_setting = setting("data.path", override)
        hint = f"an input is named by data=parquet {path_setting}, say; --help tells more"
        if not re.search(r"[/*]|\.\w", override):
            text = setting("task.prompt", "What is it?")
            hint = f"a text with spaces is quoted, as in {text}; {hint}"
        return ConfigError(f"{override} is no setting, which is written key=value", hint=hint)
    if not re.fullmatch(r"[\w.@/+~:-]+", key, re.ASCII):
        return ConfigError(f"{key} is no setting", hint="write key=value, as data.path=in.parquet")
    listed = "" if key in _of_type(JobConfig, str, str | None) else value
    starts = listed[:1] in ("[", "{") and not listed.startswith("{{")
    is_half_list = listed.startswith("[") != listed.endswith("]")
    if is_half_list and not re.search(r"[\[\]]", value.strip("[]")):
        hint = f"write a list as '{key}=[{value.strip('[]')}]'"
    elif listed.startswith("[") and not re.search(r"[\[\]{}\"]", inner := value[1:-1]):
        hint = f"write {_list(key, inner)}"
    elif starts and listed[-1:] in ("]", "}"):
        hint = f"quote each text in it, and the whole: '{key}={{name: \"a text\"}}'"
    elif key in _PATH_OPTIONS:
        hint = f"write {key}={_PATH_OPTIONS[key]} {setting(f'{key}.path', value)}"
    else:
        if value[:1] in ("'", '"'):  # an unclosed quote
            value = value.strip(value[0])
        hint = f"write {setting(key, value)}"
    return ConfigError(f"cannot read the override {override}", hint=hint)


def _list(key: str, items: str) -> str:
    """Return a list setting as typed in a shell."""
    quoted = ",".join(f'"{item.strip()}"' for item in items.split(","))
    return f"'{key}=[{quoted}]'" if "'" not in items else shlex.quote(f"{key}=[{quoted}]")


def _ambiguous(override: str) -> ConfigError:
    """Explain an override with a comma outside quotes, which is only valid in a sweep."""
    key, _, value = override.partition("=")
    sweep = "several jobs (a sweep): put -m first"
    if key in _ROOTS:
        return ConfigError(f"{key} names several options", hint=f"keep one of them; or, {sweep}")
    if key == "data.columns.image" or key in _of_type(JobConfig, list[str], list[str] | None):
        meant = f"a list: '{key}=[{value}]'"
    else:
        # The quotes around a text that has more of them, as in "{{ names | join(", ") }}".
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        meant = f"a text: {setting(key, value)}"
    return ConfigError(f"{key} has a comma outside quotes", hint=f"{meant}; {sweep}")


def _broken_file(error: YAMLError | UnicodeDecodeError) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    place = "a file of your configuration" if mark is None else f"{mark.name}, line {mark.line + 1}"
    return ConfigError(f"{place}: no YAML that can be read: {problem}", hint="correct that file")


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _not_extended() -> ConfigError:
    """Explain a primary config of the user's own that lacks the settings of batchvlm."""
    return ConfigError(
        "your configuration does not begin with that of batchvlm",
        hint="write `defaults: [run, _self_]` at the top of the file of --config-name",
    )


def _unknown_key(key: str) -> ConfigError:
    known = list(_dotted(JobConfig))
    if key in (*known, *_ROOTS):
        return _not_extended()
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


def _of_type(cls: type, *kinds: Any, prefix: str = "") -> Iterable[str]:
    """Yield the settings of these types."""
    types = get_type_hints(cls)
    for f in fields(cls):
        name = f"{prefix}{f.name}"
        if isinstance(f.default_factory, type) and is_dataclass(f.default_factory):
            yield from _of_type(f.default_factory, *kinds, prefix=f"{name}.")
        elif types[f.name] in kinds:
            yield name


def to_plain(value: Any) -> Any:
    """Convert a config object to JSON values: enums to their values, dataclasses to dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return getattr(value, "value", value)
