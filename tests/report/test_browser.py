"""The page in a real Chromium: search, filter, sort, paging, keyboard, phone, dark, hostile text.

BATCHVLM_REQUIRE_BROWSER=1 makes a missing browser a failure; else these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from batchvlm.errors import ErrorType
from batchvlm.report.compare import compare
from batchvlm.report.differ import page as comparison_page
from batchvlm.report.outputs import Output
from batchvlm.report.page import render
from batchvlm.report.report import report
from tests.report.conftest import EVIL, NUM_ROWS, answer
from tests.report.make import answered, failed, make_output

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-dev-shm-usage"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "no chromium with chromium-driver here"
        if os.environ.get("BATCHVLM_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def page(output: Output, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report(output, num_sampled=500, num_failed=500), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Any, page: str) -> Any:
    show(browser, page, width=1200)
    return browser


def show(browser: Any, page: str, *, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page)


def by_id(browser: Any, name: str) -> Any:
    return browser.find_element(By.ID, name)


def choose(browser: Any, name: str, value: str) -> None:
    Select(by_id(browser, name)).select_by_value(value)


def ids(browser: Any) -> list[str]:
    return [item.text for item in browser.find_elements(By.CSS_SELECTOR, "#list h3")]


def count(browser: Any) -> str:
    return str(by_id(browser, "count").text)


def test_search(opened: Any) -> None:
    assert count(opened) == f"{NUM_ROWS} of {NUM_ROWS} rows, showing 1 to 20"
    by_id(opened, "search").send_keys("CAT number 4")
    found = ids(opened)
    # Words in any order, anywhere in the row: 4, 14, 24, 34, 40 to 49, 54 less the failed ones.
    assert "row-004" in found and "row-041" in found and "row-012" not in found
    by_id(opened, "search").send_keys("9.")
    assert ids(opened) == ["row-049"]
    by_id(opened, "search").send_keys(" nothing has this")
    assert ids(opened) == [] and count(opened) == f"0 of {NUM_ROWS} rows"
    by_id(opened, "clear").click()
    assert len(ids(opened)) == 20


def test_filter_by_status_and_error(opened: Any) -> None:
    choose(opened, "status", "error")
    assert count(opened).startswith(f"7 of {NUM_ROWS}")
    choose(opened, "error", "oom")
    assert ids(opened) == ["row-005"]
    assert "too large: https://host/x" in by_id(opened, "list").text
    choose(opened, "status", "success")
    assert ids(opened) == []


def test_sort(opened: Any) -> None:
    choose(opened, "sort", "length")
    choose(opened, "order", "down")
    assert ids(opened)[:2] == ["row-009", EVIL]
    choose(opened, "sort", "seconds")
    assert ids(opened)[0] == "row-059"
    choose(opened, "sort", "error")
    choose(opened, "order", "up")
    assert ids(opened)[:2] == ["row-003", "row-013"]


def test_paging_by_keyboard_keeps_the_focus(opened: Any) -> None:
    button = opened.find_element(By.CSS_SELECTOR, "#pager-above .next")
    seen = ids(opened)
    opened.execute_script("arguments[0].focus()", button)
    for _ in range(5):  # three pages: two presses do nothing
        opened.switch_to.active_element.send_keys(Keys.ENTER)
        seen += [name for name in ids(opened) if name not in seen]
    assert len(seen) == NUM_ROWS
    assert opened.switch_to.active_element == button
    assert button.get_attribute("aria-disabled") == "true"
    assert "Page 3 of 3" in opened.find_element(By.ID, "pager-below").text
    choose(opened, "size", "100")
    assert len(ids(opened)) == NUM_ROWS


def test_every_control_is_reached_by_tab_and_has_a_name(opened: Any) -> None:
    reached = []
    for _ in range(60):
        opened.switch_to.active_element.send_keys(Keys.TAB)
        element = opened.switch_to.active_element
        reached.append(element.get_attribute("id") or element.get_attribute("class"))
        assert element.accessible_name, element.get_attribute("outerHTML")
        if element.get_attribute("id") == "clear":
            break
    assert reached[0] == "skip"
    assert reached[-7:] == ["search", "status", "error", "sort", "order", "size", "clear"]
    outline = opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    assert by_id(opened, "count").get_attribute("aria-live") == "polite"


def test_a_hostile_answer_stays_text(opened: Any) -> None:
    by_id(opened, "search").send_keys("alert(1)")
    assert ids(opened) == [EVIL]
    card = opened.find_element(By.CSS_SELECTOR, "#list article")
    assert EVIL in card.text
    assert card.find_elements(By.CSS_SELECTOR, "script, [onerror], b") == []
    assert not opened.execute_script("return document.querySelectorAll('img[src=x]').length")
    assert opened.execute_script("return document.scripts.length") == 2


def test_the_policy_stops_a_script_that_got_in(browser: Any, page: str) -> None:
    """Were something to slip past the escaping, the browser still would not run it."""
    show(browser, page, width=1200)
    browser.get_log("browser")
    browser.execute_script(
        """
        const script = document.createElement("script");
        script.textContent = "window.wasRun = true";
        document.body.append(script);
        const image = document.createElement("img");
        image.setAttribute("onerror", "window.wasRun = true");
        image.src = "http://127.0.0.1:9/x.png";
        document.body.append(image);
        """
    )
    deadline = time.monotonic() + 10
    refused: list[str] = []
    while len(refused) < 3 and time.monotonic() < deadline:
        refused += [entry["message"] for entry in browser.get_log("browser")]
    assert any("script-src" in line for line in refused), refused
    assert any("img-src" in line for line in refused), refused
    assert browser.execute_script("return window.wasRun === undefined")


def test_nothing_goes_wrong_and_nothing_is_fetched(opened: Any, page: str) -> None:
    assert opened.get_log("browser") == []
    fetched = opened.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in fetched if not name.startswith("data:")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(browser: Any, page: str, scheme: str) -> None:
    show(browser, page, width=360, scheme=scheme)
    for element in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", element)
    choose(browser, "sort", "length")
    choose(browser, "order", "down")
    widths = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert widths[0] <= widths[1] <= 360
    # No error type is broken within its word.
    lines = browser.execute_script(
        "return [...document.querySelectorAll('.errors tbody th')].map((cell) => {"
        "const range = document.createRange(); range.selectNodeContents(cell);"
        "return range.getClientRects().length; })"
    )
    assert lines and set(lines) == {1}


def test_light_and_dark_are_both_readable(browser: Any, page: str) -> None:
    papers = []
    for scheme in ("light", "dark"):
        show(browser, page, width=1200, scheme=scheme)
        style = browser.execute_script(
            """
            const of = (selector, name) => {
              const value = getComputedStyle(document.querySelector(selector))[name];
              return value.match(/[\\d.]+/g).slice(0, 3).map(Number);
            };
            return {
              paper: of("body", "backgroundColor"), ink: of("body", "color"),
              card: of(".card", "backgroundColor"), soft: of(".soft", "color"),
              label: of("figure svg text", "fill"), link: of("nav a", "color"),
              badge: of(".badge", "color"), badgeBack: of(".badge", "backgroundColor"),
            };
            """
        )
        papers.append(luminance(style["paper"]))
        for text, back in (
            *(("ink", "paper"), ("ink", "card"), ("soft", "paper"), ("soft", "card")),
            *(("label", "card"), ("link", "paper"), ("badge", "badgeBack")),
        ):
            assert contrast(style[text], style[back]) >= 4.5, (scheme, text, back, style)
    assert papers[0] > 0.9 and papers[1] < 0.05


def luminance(color: list[float]) -> float:
    """WCAG's relative luminance of an sRGB colour."""
    parts = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[float], b: list[float]) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_long_answer_opens_and_closes(opened: Any) -> None:
    by_id(opened, "search").send_keys("row-009")
    button = opened.find_element(By.CSS_SELECTOR, "#list button.plain")
    assert button.text == "Show all 2,000 characters"
    text = opened.find_elements(By.CSS_SELECTOR, "#list .text")[-1]
    before = len(text.text)
    button.click()
    assert button.get_attribute("aria-expanded") == "true" and len(text.text) > before + 900


def test_thumbnails_are_images_with_a_description(opened: Any) -> None:
    images = opened.find_elements(By.CSS_SELECTOR, "#list img")
    assert len(images) == 18  # of twenty rows, two have broken images
    assert images[0].get_attribute("alt") == "Image 1 of row 0"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not images[0].get_property("naturalWidth"):
        pass
    assert images[0].get_property("naturalWidth") == 40
    # However long the text beside it.
    assert [images[0].get_property(f"client{name}") for name in ("Width", "Height")] == [40, 30]


def test_ten_thousand_rows_are_searched_at_once(browser: Any, tmp_path: Path) -> None:
    """No time is asserted, only that all of them are there and the page shows twenty."""
    rows = [
        {
            **{"row": n, "id": f"row-{n}", "file": "f", "status": "success", "error": ""},
            **{"message": "", "finish": "stop", "attempts": 1, "promptTokens": 9},
            **{"imageTokens": 4, "tokens": n % 77, "seconds": 0.5, "images": [], "note": ""},
            **{"prompt": "What is it?", "fields": [], "answers": []},
        }
        for n in range(10_000)
    ]
    context: dict[str, Any] = dict.fromkeys(
        ("sections", "notices", "facts", "settings", "curves", "distributions", "errors"), ()
    )
    text = render(
        "report.html.jinja",
        **context,
        **{"title": "t", "subtitle": "", "prompt_label": "", "prompt": ""},
        **{"system": None, "answer_prefix": None, "work": None},
        **{"answers": (), "sample_note": "", "rows": rows},
        **{"statuses": [("success", 10_000)], "error_types": [], "sorts": [("tokens", "tokens")]},
    )
    path = tmp_path / "page.html"
    path.write_text(text)
    show(browser, path.as_uri(), width=1200)
    by_id(browser, "search").send_keys("row-12")
    assert count(browser) == "111 of 10,000 rows, showing 1 to 20"
    assert len(ids(browser)) == 20


def test_a_comparison_marks_what_differs(
    browser: Any, output: Output, source: Path, tmp_path: Path
) -> None:
    def other(row: int) -> dict[str, object]:
        if row == 2:
            return failed(ErrorType.OOM, "too large")
        return answered(f"A dog number {row}.") if row == 4 else answer(row)

    b = make_output(tmp_path / "b", source, other, "task.prompt='{{ question }}'")
    path = tmp_path / "compare.html"
    path.write_text(comparison_page(output, b, compare(output, b, num_sampled=50)))
    show(browser, path.as_uri(), width=1200)
    choose(browser, "status", "error only in B")
    assert ids(browser) == ["row-002"]
    choose(browser, "status", "changed answer")
    assert ids(browser) == ["row-004"]
    marks = [
        [item.text for item in browser.find_elements(By.CSS_SELECTOR, f"#list {tag}")]
        for tag in ("del", "ins")
    ]
    assert marks == [["cat"], ["dog"]]
    assert browser.get_log("browser") == []
    show(browser, path.as_uri(), width=360)
    widths = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert widths[0] <= widths[1]
    assert json.loads(browser.execute_script("return JSON.stringify(innerWidth)")) == 360
