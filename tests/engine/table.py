"""The families as a page, made of test results: `python -m tests.engine.table [FAMILY ...]`.

Runs the tests of the families that are named (of all, if none is), keeps what passed in
`families.json`, and writes `docs/models.md`. A family whose needs are not here keeps the results
that were recorded where they were.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from .families import FAMILIES, Family

HERE = Path(__file__).parent
RESULTS = HERE / "families.json"
PAGE = HERE.parents[1] / "docs" / "models.md"
FILES = ("test_families.py", "test_presets.py", "test_select.py", "slots/test_slots.py")

ALONE = (
    "test_a_mixed_batch_answers_as_transformers_does_row_by_row",
    "test_a_row_is_answered_alike_alone_and_in_any_order",
    "test_each_row_sees_its_own_images",
)
ENGINE = "test_every_family_of_the_tests"
PRESET = "test_a_preset_fits_its_family"
SLOTS = "test_rows_are_answered_as_transformers_answers_each_alone"
TEXT_REFUSED = "test_text_alone_is_an_error_of_its_row_where_a_family_does_not_take_it"
SEVERAL_REFUSED = "test_a_row_that_does_not_have_one_image_is_its_error_where_a_family_takes_one"

HEAD = """\
# Models

Made by `python -m tests.engine.table` from the results of `tests/engine`, with tiny random models
of each family in float32 on a CPU, presets in their own dtype; nobody's published weights are in a
test. "As alone": every row of mixed batches (images of several sizes; several and none where that
is allowed) is answered token by token as transformers' `generate()` answers it alone, by
`generate()` in batches and, where the table says so, over slots. The last column says how many
tests of the family passed, with which versions.

`engine=auto` chooses as the table says, and the log says so. Families that are not listed run by
`generate()`; `engine=slots` tries slots, and the canary ends the run before the first row where the
two differ. With transformers 5.17 all families run by `generate()`: their models take no image
features from outside.

"""

COLUMNS = (
    *("Family", "Preset", "Class in transformers", "Engine", "As alone", "Several images"),
    *("Text alone", "Shared beginnings", "Needs", "Run"),
)

Results = Mapping[str, Mapping[str, Any]]


def page(results: Results) -> str:
    """The whole page."""
    rows = [cells(family, results.get(family.name, {})) for family in FAMILIES]
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cells(family: Family, result: Mapping[str, Any]) -> tuple[str, ...]:
    """A family's line in the table: only what a test has shown is "yes" or "no"."""
    passed = {*result.get("passed", ())}

    def shown(value: str, *tests: str) -> str:
        return value if passed.issuperset(tests) else "not shown"

    engine = shown("slots", ENGINE, SLOTS)
    if family.why_not_slots:
        pace = ", row by row" if family.is_alone else ""
        engine = shown(f"`generate()`{pace}: {family.why_not_slots}", ENGINE)
    is_sharing = not family.why_not_slots and not family.sees_ahead
    needs = [f"`{name}`" for name in family.needs]
    if any(family.needs_torchvision_before):
        needs.append(f"`torchvision` before transformers {dotted(family.needs_torchvision_before)}")
    if family.since > (5, 17):
        needs.append(f"transformers {dotted(family.since)}")
    several = ("yes", *ALONE) if family.takes_several else ("no, one each", SEVERAL_REFUSED)
    text = ("yes", *ALONE)
    if not family.takes_text_alone:
        text = ("no", TEXT_REFUSED if family.takes_several else SEVERAL_REFUSED)
    versions = ", ".join(f"{name} {version}" for name, version in result.get("with", {}).items())
    return (
        family.title,
        shown(f"`{family.name}`", PRESET),
        f"`{family.model_class}`",
        engine,
        shown("yes", *ALONE),
        shown(*several),
        shown(*text),
        shown("yes" if is_sharing else "no", *((ENGINE, SLOTS) if is_sharing else (ENGINE,))),
        ", ".join(needs),
        f"{len(passed)}: {versions}" if passed else "never",
    )


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def read_results() -> dict[str, Any]:
    """What was recorded."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


def family_tests() -> set[str]:
    """Names of the tests that run once for each family, or for some."""
    names = set()
    for file in FILES:
        for node in ast.walk(ast.parse((HERE / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                arguments = {argument.arg for argument in node.args.args}
                if arguments & {"loaded", "family"}:
                    names.add(node.name)
    return names


class Recorder:
    """A pytest plugin: which tests of which families passed.

    Args:
        names: the families to run.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _family_of(item) in self._names]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        family = _family_of(item)
        if family is not None and (report.when == "call" or not report.passed):
            self.outcomes[family][item.originalname].add(report.outcome)  # type: ignore[attr-defined]
        return report

    def results(self) -> Results:
        """Of the families that could be run: the tests that passed."""
        found = {}
        for family, tests in self.outcomes.items():
            # Some parameters of a test are not for every family, and skipped.
            passed = sorted(
                name
                for name, outcomes in tests.items()
                if "passed" in outcomes and "failed" not in outcomes
            )
            if passed:
                found[family] = {"passed": passed, "with": _versions()}
        return found


def _family_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec is not None else ()
    return next((value.name for value in values if isinstance(value, Family)), None)


def _versions() -> dict[str, str]:
    names = ("transformers", "torch", "torchvision")
    here = {d.name for d in metadata.distributions()}
    return {name: metadata.version(name) for name in names if name in here}


def main(names: Sequence[str]) -> int:
    """Run, record and write; returns pytest's exit code."""
    recorder = Recorder(names or [family.name for family in FAMILIES])
    paths = [str(HERE / file) for file in FILES]
    # A family that cannot be run here is skipped, and no reason to stop.
    code = pytest.main(["-q", "-m", "", *paths], plugins=[recorder])
    known = read_results() if RESULTS.exists() else {}
    results = {**known, **recorder.results()}
    order = [family.name for family in FAMILIES if family.name in results]
    text = json.dumps({name: results[name] for name in order}, indent=1)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(read_results()), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    # The classes of this module as the tests import it, not of `__main__`.
    from tests.engine import table

    sys.exit(table.main(sys.argv[1:]))
