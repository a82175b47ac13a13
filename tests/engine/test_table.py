"""The page of models says what the tests have shown, and not less than they show now."""

from __future__ import annotations

from .families import FAMILIES
from .table import ALONE, ENGINE, PAGE, PRESET, SLOTS, family_tests, page, read_results


def test_the_page_is_made_of_the_recorded_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_results()), (
        "python -m tests.engine.table makes it anew"
    )


def test_the_results_are_those_of_the_tests_that_are_here() -> None:
    recorded = {test for result in read_results().values() for test in result["passed"]}
    assert recorded == family_tests(), "python -m tests.engine.table runs them anew"


def test_every_family_was_run() -> None:
    results = read_results()
    assert list(results) == [family.name for family in FAMILIES]
    for family in FAMILIES:
        passed = {*results[family.name]["passed"]}
        assert passed >= {*ALONE, ENGINE, PRESET} | (set() if family.why_not_slots else {SLOTS})


def test_what_no_test_has_shown_is_not_claimed() -> None:
    results = read_results()
    results["llava"]["passed"] = [PRESET]
    line = next(line for line in page(results).splitlines() if line.startswith("| LLaVA |"))
    assert line.count("not shown") == 5 and "yes" not in line
