"""The rules of the source layout: which module may import which, and how long a file may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import batchvlm

PACKAGE = Path(batchvlm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

GROUND = {
    *("batchvlm", "batchvlm.config", "batchvlm.errors", "batchvlm.records"),
    *("batchvlm.arguments", "batchvlm.words"),
}
# What a room may import besides the ground floor and itself. The top floor joins the stages.
ALLOWED = {
    "batchvlm.config": set(),
    "batchvlm.errors": set(),
    "batchvlm.records": {"batchvlm.errors"},
    "batchvlm.words": set(),
    "batchvlm.arguments": set(),
    "batchvlm.endpoint_settings": set(),
    "batchvlm.checks": {"batchvlm.demo", "batchvlm.endpoint_settings"},
    "batchvlm.settings": {"batchvlm.checks", "batchvlm.demo"},
    "batchvlm.plan": set(),
    "batchvlm.sources": set(),
    "batchvlm.messages": set(),
    "batchvlm.schemas": set(),
    "batchvlm.fetch": set(),
    "batchvlm.templates": set(),
    "batchvlm.prompts": {
        *("batchvlm.forms", "batchvlm.messages", "batchvlm.schemas", "batchvlm.templates"),
    },
    "batchvlm.images": set(),
    "batchvlm.recent": set(),
    "batchvlm.pixels": set(),
    "batchvlm.quantization": set(),
    "batchvlm.adapters": {"batchvlm.quantization"},
    "batchvlm.chat_template": set(),
    "batchvlm.dtypes": set(),
    "batchvlm.kinds": set(),
    "batchvlm.workarounds": set(),
    "batchvlm.loading": {
        *("batchvlm.adapters", "batchvlm.chat_template", "batchvlm.dtypes", "batchvlm.kinds"),
        *("batchvlm.quantization", "batchvlm.workarounds"),
    },
    "batchvlm.preprocess": {
        "batchvlm.chat_template",
        "batchvlm.images",
        "batchvlm.loading",
        "batchvlm.pixels",
        "batchvlm.prompts",
        "batchvlm.recent",
    },
    "batchvlm.batching": set(),
    "batchvlm.form_retries": set(),
    "batchvlm.forms": {"batchvlm.constraints", "batchvlm.schemas"},
    "batchvlm.constraints": set(),
    "batchvlm.engine": {
        *("batchvlm.batching", "batchvlm.constraints", "batchvlm.forms", "batchvlm.kinds"),
        *("batchvlm.loading", "batchvlm.pixels", "batchvlm.quantization", "batchvlm.schemas"),
    },
    "batchvlm.tasks": {"batchvlm.constraints", "batchvlm.forms", "batchvlm.schemas"},
    "batchvlm.output": set(),
    "batchvlm.identity": {
        *("batchvlm.adapters", "batchvlm.forms", "batchvlm.loading", "batchvlm.settings"),
    },
    "batchvlm.runtime": {"batchvlm.loading", "batchvlm.preprocess"},
    "batchvlm.report": {
        *("batchvlm.identity", "batchvlm.images", "batchvlm.output", "batchvlm.prompts"),
        "batchvlm.sources",
    },
    "batchvlm.export": {"batchvlm.output", "batchvlm.report"},
    "batchvlm.demo": set(),
}
TOP = {
    *("batchvlm.job", "batchvlm.turns", "batchvlm.collector", "batchvlm.pipeline"),
    *("batchvlm.summary", "batchvlm.follow", "batchvlm.sweep"),
    *("batchvlm.before", "batchvlm.commands", "batchvlm.cli", "batchvlm.__main__"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            is_package = node.module == "batchvlm"
            found |= below if is_package else {node.module}
    return {name for name in found if room_of(name).split(".")[0] == "batchvlm"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_stage_imports_the_ground_floor_and_what_it_stands_on(path: Path) -> None:
    room = room_of(module_name(path))
    if room in TOP or room == "batchvlm":
        return
    allowed = ALLOWED[room] | GROUND | {room}
    imported = {room_of(name) for name in imports_of(path)}
    # Names of the package itself, such as its version.
    imported = {
        name
        for name in imported
        if (PACKAGE / name.split(".")[-1]).exists()
        or (PACKAGE / f"{name.split('.')[-1]}.py").exists()
    }
    assert imported <= allowed, f"{module_name(path)} imports {sorted(imported - allowed)}"


def test_nothing_below_imports_the_top_floor() -> None:
    for path in MODULES:
        if room_of(module_name(path)) not in TOP:
            assert not imports_of(path) & TOP, path


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_file_outgrows_one_thought(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def test_the_ground_floor_is_light() -> None:
    """A configuration mistake must not cost the seconds that torch takes to import."""
    import subprocess
    import sys

    code = (
        "import sys; from batchvlm.settings import compose; compose('run');"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'pyarrow'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
