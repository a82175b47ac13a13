"""The pages of docs/: current, without dead links, and with commands that work."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from batchvlm.before import commands as before
from batchvlm.cli import COMMANDS
from batchvlm.errors import ConfigError
from batchvlm.settings.compose import compose

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

SLURM = {"SLURM_ARRAY_TASK_COUNT": "16", "SLURM_ARRAY_TASK_ID": "3"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SETTINGS = {"run", "plan", "preview"}
"""Commands that take the settings of a job."""


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, as a shell under SLURM would split them."""
        joined = self.text.replace("\\\n", " ")
        for name, value in SLURM.items():
            joined = joined.replace(f"${name}", value)
        lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [words[1:] if words[0] == "exec" else words for words in lines if words]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2])


def name_of(page: Path) -> str:
    return page.stem


def test_the_page_of_settings_is_what_the_settings_say() -> None:
    """If this fails: `python docs/settings_page.py`."""
    made = runpy.run_path(str(DOCS / "settings_page.py"))["page"]()
    assert made == (DOCS / "settings.md").read_text(encoding="utf-8")
    assert "| `generation.top_p` | number | 1 | Draw among the likeliest" in made
    assert made.count("\n| `") > 80
    assert not re.search(r"\n\| `[^|]*` \|  \|", made), "a setting without a type"
    assert "| or null |" not in made and "e+" not in made
    assert "@package" not in made and "the rows of that (its columns, and image)." in made


def test_the_site_builds_without_a_dead_link(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "-q", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "site" / "guarantees.html").read_text(encoding="utf-8")
    assert "Every input row is in the output exactly once" in shown
    assert "Adding things" not in shown and "Source layout" not in shown


def test_the_readme_links_to_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_ones_that_there_are(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            compile(block.text, where, "exec")
        if block.language == "bash":
            for words in block.commands:
                check(words, where)


def check(words: list[str], where: str) -> None:
    match words:
        case [assignment, *rest] if re.fullmatch(r"[A-Z_]+=\S*", assignment):
            check(rest, where)
        case ["batchvlm" | ".venv/bin/batchvlm", "run", *rest]:
            composed(rest, where)
        case ["batchvlm", "plan" | "preview" as name, *rest]:
            _, overrides = getattr(before, name)(rest)
            composed(overrides, where)
        case ["batchvlm", name, *_] if name in set(COMMANDS) - SETTINGS:
            pass  # run below
        case ["srun" | "torchrun", *rest]:
            place = next(
                i for i, word in enumerate(rest) if word == "batchvlm" or word.startswith("jobs/")
            )
            check(rest[place:] if rest[place] == "batchvlm" else ["python", *rest[place:]], where)
        case ["accelerate", "launch", script, *rest] | ["python", script, *rest]:
            assert (ROOT / script).is_file(), where
            composed(rest, where, Path(script).stem)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in targets:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{where}: make {target}"
        case ["pip", "install", what]:
            for extra in re.findall(r"[\w-]+", what.partition("[")[2]):
                assert extra in EXTRAS, f"{where}: {what}"
        case ["sbatch", *_, script]:
            assert (ROOT / script).is_file(), f"{where}: {script}"
        case ["eval", "$(batchvlm -sc install=bash)"]:
            pass  # tests/test_cli.py
        case _:
            pytest.fail(f"{where}: nobody checks {shlex.join(words)}")


def composed(overrides: list[str], where: str, config_name: str = "run") -> None:
    if "..." in overrides or any(word.startswith("-") for word in overrides):
        return  # not all of it is there, or Hydra has more to say
    try:
        compose(config_name, overrides)
    except ConfigError as error:
        pytest.fail(f"{where}: {error}")


RUNNER = """
import json, sys
from batchvlm.cli import main

if __name__ == "__main__":
    for where, step in json.load(open(sys.argv[1])):
        print("===", where, step, flush=True)
        if isinstance(step, str):
            exec(compile(step, where, "exec"), {})
        elif code := main(step):
            sys.exit(f"{where}: exit code {code}")
"""


@pytest.mark.docs
def test_what_the_tutorial_and_the_cookbook_tell_to_type(tmp_path: Path) -> None:
    """Everything that the bundled model can do, in the order of the pages, in one folder."""
    steps: list[tuple[str, str | list[str]]] = []
    for page in (DOCS / "tutorial.md", DOCS / "cookbook.md"):
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            if block.language == "python":
                steps.append((where, block.text))
                continue
            if block.language != "bash" or any(w[0] == "sbatch" for w in block.commands):
                continue  # what a cluster writes is not here to look at
            for words in block.commands:
                if words[0] == "batchvlm" and not any(w.startswith("model") for w in words):
                    quick = ["runtime.num_workers=0"] if words[1] == "run" else []
                    steps.append((where, [*words[1:], *quick]))
    names = [step[0] for _, step in steps if isinstance(step, list)]
    assert {"run", "plan", "preview", "status", "verify", "report", "compare"} <= set(names)
    assert len(steps) >= 15
    (tmp_path / "runner.py").write_text(RUNNER)
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    done = subprocess.run(
        [sys.executable, "runner.py", "steps.json"],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "every input row is there exactly once" in done.stdout
    assert (tmp_path / "mine" / "report.html").stat().st_size > 100_000
    assert "100.0%" in done.stdout or re.search(r"^\d\d\.\d%$", done.stdout, re.MULTILINE)
