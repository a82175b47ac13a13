"""Writes docs/settings.md: every setting, from the docstrings of batchvlm/config/.

python docs/settings_page.py
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING as REQUIRED

from batchvlm import config
from batchvlm.settings.compose import conf_dir

PAGE = Path(__file__).with_name("settings.md")

_HEAD = """\
<!-- Made by docs/settings_page.py from batchvlm/config/ and conf/: change these. -->
# Every setting

Set any of them on the command line as `group.setting=value`, or choose an option of a group as
`group=option`; `batchvlm run --cfg job` prints what a command would use. A list is written
`'generation.stop=[a,b]'`, a text with spaces `'task.prompt="Is it red?"'`, nothing at all `null`. A
folder of your own options is named by `--config-dir`.
"""

_ANY = {
    "data.columns.image": "text, list or null",
    "task.output.json_schema": "text, mapping or null",
    "model.dtype": "text or mapping",
    "model.device_map": "text, mapping or null",
}
"""What settings take whose class says `Any`."""


def page() -> str:
    """The whole page."""
    lines = [_HEAD]
    for field in fields(config.JobConfig):
        kind = field.default_factory
        assert isinstance(kind, type)
        lines += [f"## {field.name}", "", _one_line(kind.__doc__), ""]
        lines += [
            *_options(field.name),
            "| Setting | Type | Default | Meaning |",
            "|---|---|---|---|",
        ]
        lines += [*_rows(kind, f"{field.name}."), ""]
    return "\n".join(lines).rstrip() + "\n"


def _options(group: str) -> Iterator[str]:
    """The files of a group, each with the comment at its top, but for Hydra's word in it."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        head = [line.removeprefix("#") for line in takewhile(lambda s: s.startswith("#"), lines)]
        about = _one_line(" ".join(line for line in head if "@package" not in line))
        if not about.startswith("See "):
            yield f"- `{group}={file.stem}`: {about}"
    if files:
        yield ""


def _rows(kind: type, prefix: str) -> Iterator[str]:
    """A line of the table for each field, nested ones by their dotted names."""
    docs, types = _docstrings(kind), get_type_hints(kind)
    for field in fields(kind):
        factory = field.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield f"| `{prefix}{field.name}.*` | | | {_cell(_one_line(factory.__doc__))} |"
            yield from _rows(factory, f"{prefix}{field.name}.")
            continue
        default = factory() if factory is not MISSING else field.default
        about = _one_line(docs.get(field.name, ""))
        named = types[field.name]
        if not about and isinstance(named, type) and issubclass(named, Enum):
            about = _one_line(named.__doc__)
        limits = config.GENERATION_LIMITS.get(field.name) if prefix == "generation." else None
        if limits is not None:
            about = f"{about} From {_limit(limits[0])} to {_limit(limits[1])}.".strip()
        cells = [
            f"`{prefix}{field.name}`",
            _ANY.get(f"{prefix}{field.name}") or _type(types[field.name]),
            _default(default),
            _cell(about),
        ]
        yield f"| {' | '.join(cells)} |"


def _docstrings(kind: type) -> dict[str, str]:
    """The text under each field, which Python itself throws away."""
    tree = ast.parse(inspect.getsource(kind))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    found = {}
    for field, below in pairwise(body):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            found[field.target.id] = str(below.value.value)  # type: ignore[attr-defined]
    return found


def _type(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " ".join(f"`{item.value}`" for item in kind)
    names = {"str": "text", "int": "number", "float": "number", "bool": "true or false"}
    parts = [part for part in get_args(kind) if part is not type(None)] or [kind]
    if getattr(kind, "__origin__", None) in (list, dict):
        parts = [kind]
    containers = {list: "list", dict: "mapping"}
    name = getattr(parts[0], "__name__", "")
    text = containers.get(getattr(parts[0], "__origin__", None)) or names.get(name, "")
    if isinstance(parts[0], type) and issubclass(parts[0], Enum):
        text = " ".join(f"`{item.value}`" for item in parts[0])
    assert text, f"what is {kind} called?"
    return f"{text} or null" if type(None) in get_args(kind) else text


def _limit(number: float) -> str:
    return f"{int(number):,}" if float(number).is_integer() else f"{number:g}"


def _default(value: Any) -> str:
    if value == REQUIRED:
        return "required"
    if value is None:
        return "`null`"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return f"`{value}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
