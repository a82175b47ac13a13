"""The rules of the source layout: which module may import which, and how long a file may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import batchvlm

PACKAGE = Path(batchvlm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

GROUND = {
    *("batchvlm.config", "batchvlm.errors", "batchvlm.records"),
    *("batchvlm.arguments", "batchvlm.words"),
}
# What a package or module may import besides the ground floor and itself: packages, or single
# modules of them. The top floor joins the stages.
ALLOWED = {
    "batchvlm.config": set(),
    "batchvlm.errors": set(),
    "batchvlm.records": {"batchvlm.errors"},
    "batchvlm.words": set(),
    "batchvlm.arguments": set(),
    "batchvlm.settings": {"batchvlm.demo"},
    "batchvlm.plan": set(),
    "batchvlm.sources": set(),
    "batchvlm.fetch": set(),
    "batchvlm.constraints": set(),
    "batchvlm.forms": {"batchvlm.constraints"},
    "batchvlm.prompts": {"batchvlm.forms"},
    "batchvlm.model": set(),
    "batchvlm.preprocess": {"batchvlm.model", "batchvlm.prompts"},
    "batchvlm.batching": set(),
    "batchvlm.engine": {
        *("batchvlm.batching", "batchvlm.constraints", "batchvlm.forms", "batchvlm.model"),
        "batchvlm.preprocess.pixels",
    },
    "batchvlm.tasks": {"batchvlm.constraints", "batchvlm.forms"},
    "batchvlm.output": set(),
    "batchvlm.identity": {"batchvlm.forms", "batchvlm.model", "batchvlm.settings"},
    "batchvlm.runtime": {"batchvlm.model", "batchvlm.preprocess"},
    "batchvlm.report": {
        *("batchvlm.identity", "batchvlm.output", "batchvlm.preprocess.images"),
        *("batchvlm.prompts", "batchvlm.sources"),
    },
    "batchvlm.export": {"batchvlm.output", "batchvlm.report"},
    "batchvlm.demo": set(),
}
# What a package in the engine may import of it, besides itself.
ALLOWED_IN_ENGINE = {
    "batchvlm.engine.forward": {"batchvlm.engine.collate", "batchvlm.engine.faults"},
    "batchvlm.engine.slots": {
        *("batchvlm.engine.answers", "batchvlm.engine.choices", "batchvlm.engine.collate"),
        *("batchvlm.engine.faults", "batchvlm.engine.forward", "batchvlm.engine.generate"),
        *("batchvlm.engine.protocol", "batchvlm.engine.sampling", "batchvlm.engine.stops"),
    },
}
TOP = {
    *("batchvlm.pipeline", "batchvlm.before", "batchvlm.commands", "batchvlm.cli"),
    "batchvlm.__main__",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def room_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def is_within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def imports_of(path: Path) -> set[str]:
    """The package's own modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & NAMES or {node.module}
    return found & NAMES


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_stage_imports_the_ground_floor_and_what_it_stands_on(path: Path) -> None:
    name = module_name(path)
    room = room_of(name)
    if room in TOP or room == "batchvlm":
        return
    imported = imports_of(path) - {"batchvlm"}  # of which a module may take the version
    others = {other for other in imported if not is_within(other, ALLOWED[room] | GROUND | {room})}
    assert not others, f"{name} imports {sorted(others)}"


@pytest.mark.parametrize("package", ALLOWED_IN_ENGINE)
def test_the_forward_knows_nothing_of_slots_and_both_nothing_of_other_engines(package: str) -> None:
    allowed = ALLOWED_IN_ENGINE[package] | {package}
    for path in MODULES:
        if is_within(module_name(path), {package}):
            inner = {name for name in imports_of(path) if is_within(name, {"batchvlm.engine"})}
            others = {name for name in inner if not is_within(name, allowed)}
            assert not others, f"{module_name(path)} imports {sorted(others)}"


def test_nothing_below_imports_the_top_floor() -> None:
    for path in MODULES:
        if room_of(module_name(path)) not in TOP:
            assert not any(is_within(name, TOP) for name in imports_of(path)), path


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_file_outgrows_one_thought(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def test_the_ground_floor_is_light() -> None:
    """A configuration mistake must not cost the seconds that torch takes to import."""
    import subprocess
    import sys

    code = (
        "import sys; from batchvlm.settings.compose import compose; compose('run');"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'pyarrow'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
