"""Distributions and curves as inline SVG, drawn by matplotlib.

Text stays text, and colours are variables of the page's style sheet, so one drawing serves the
light and the dark theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from batchvlm.errors import BatchvlmError, ExitCode
from batchvlm.report.time_line import TimeLine
from batchvlm.report.totals import Latencies, TokenCounts

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
# Placeholder colours for matplotlib, each replaced by a variable of the page's style sheet.
_COLORS = {
    "#010101": "var(--ink-soft)",
    "#020202": "var(--grid)",
    "#030303": "var(--series-1)",
    "#040404": "var(--series-2)",
    "#050505": "var(--error)",
}
_INK, _GRID, _FIRST, _SECOND, _ERROR = _COLORS
# Properties that are moved from style attributes to SVG attributes: the page forbids inline styles.
_KEPT = (
    *("fill", "stroke", "stroke-width", "opacity", "fill-opacity", "stroke-opacity"),
    *("stroke-dasharray", "stroke-dashoffset", "stroke-linejoin", "stroke-linecap"),
    *("font-size", "text-anchor", "clip-path"),
)
_MAX_BINS = 36

Floats = npt.NDArray[np.float64]


class MissingLibraryError(BatchvlmError):
    """matplotlib is not installed."""

    exit_code = ExitCode.USAGE


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing and its data as a table."""

    title: str
    note: str
    """A sentence that explains the plot."""
    svg: Markup
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def check_library() -> None:
    """Check that plots can be drawn.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            "the plots need matplotlib, which is not installed",
            hint="pip install 'batchvlm[report]'",
        ) from error


def curve_plots(line: TimeLine) -> list[Plot]:
    """Plot rows, tokens and waiting over the running time."""
    scale, unit = _time_unit(line.active_s)
    edges = line.edges_s / scale
    centers = (edges[:-1] + edges[1:]) / 2

    def plot(title: str, note: str, values: Floats, label: str, color: str, text: str) -> Plot:
        def draw(axes: Any) -> None:
            axes.stairs(values, edges, color=color, linewidth=1.6, baseline=None)
            axes.stairs(values, edges, color=color, fill=True, alpha=0.18)
            for resume_s in line.resumes_s:
                axes.axvline(resume_s / scale, color=_INK, linewidth=1, linestyle=(0, (2, 3)))
            axes.set(xlabel=f"running time ({unit})", ylabel=label, xlim=(0, edges[-1]))
            axes.set_ylim(bottom=0)
            if label == "%":
                axes.set_ylim(0, 100)

        rows = [
            [_short(x), text.format(y)]
            for x, y in zip(centers.tolist(), values.tolist(), strict=True)
        ]
        return Plot(
            title=title,
            note=note,
            svg=_draw(draw, title),
            head=[f"running time ({unit})", label],
            rows=rows,
        )

    pauses = " Dotted: the job went on after a pause, which is cut out." * bool(line.resumes_s)
    return [
        plot(
            "Rows per second",
            f"Of all processes together.{pauses}",
            line.rows_per_s,
            "rows/s",
            _FIRST,
            "{:,.2f}",
        ),
        plot(
            "Output tokens per second",
            f"Of all processes together.{pauses}",
            line.tokens_per_s,
            "tokens/s",
            _FIRST,
            "{:,.0f}",
        ),
        plot(
            "Waiting for data",
            "Share of the time in which the engine had no prepared row.",
            100 * line.wait_share,
            "%",
            _SECOND,
            "{:.1f}",
        ),
    ]


def token_plot(title: str, counts: TokenCounts) -> Plot:
    """Plot the distribution of the number of tokens of a row."""
    high = counts.max
    cut = counts.quantile(0.995)
    num_above = 0
    if high > 2 * cut + 8:
        num_above, high = int(counts.counts[cut + 1 :].sum()), cut
    low = int(np.flatnonzero(counts.counts)[0])
    step = max(1, -(-(high - low + 1) // _MAX_BINS))
    edges = np.arange(low, high + step + 1, step, dtype=np.int64)
    sums = np.concatenate(([0], np.cumsum(counts.counts)))
    values = np.diff(sums[np.minimum(edges, len(sums) - 1)])
    if num_above:
        values[-1] = min(values[-1], counts.num - num_above - values[:-1].sum())
    above = f" {num_above:,} rows with more than {cut:,} are not drawn." if num_above else ""
    note = (
        f"Median {counts.quantile(0.5):,}, 95% at most {counts.quantile(0.95):,}, "
        f"largest {counts.max:,}.{above}"
    )
    names = [
        f"{a:,}" if step == 1 else f"{a:,} to {b - 1:,}"
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    return _histogram(title, note, values, edges - 0.5 * (step == 1), "tokens", names, _FIRST)


def latency_plot(latencies: Latencies) -> Plot:
    """Plot the distribution of latencies."""
    used = np.flatnonzero(latencies.counts)
    low, high = int(used[0]), int(used[-1]) + 1
    step = max(1, -(-(high - low) // _MAX_BINS))
    places = np.minimum(np.arange(low, high + step, step), len(latencies.counts))
    sums = np.concatenate(([0], np.cumsum(latencies.counts)))
    edges = latencies.edges_s[places]
    note = (
        f"Half of the rows within {seconds(latencies.quantile(0.5))}, 95% within "
        f"{seconds(latencies.quantile(0.95))}; from the start of a row's batch to its answer."
    )
    names = [
        f"{seconds(a)} to {seconds(b)}"
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    title = "Latency"
    return _histogram(title, note, np.diff(sums[places]), edges, "seconds", names, _SECOND, True)


def paired_plot(title: str, first: TokenCounts, second: TokenCounts) -> Plot:
    """Plot two distributions of tokens, A and B, in one drawing."""
    low = min(int(np.flatnonzero(c.counts)[0]) for c in (first, second))
    high = max(c.quantile(0.995) for c in (first, second))
    step = max(1, -(-(high - low + 1) // _MAX_BINS))
    edges = np.arange(low, high + step + 1, step, dtype=np.int64)

    def binned(counts: TokenCounts) -> Any:
        sums = np.concatenate(([0], np.cumsum(counts.counts)))
        return np.diff(sums[np.minimum(edges, len(sums) - 1)])

    import matplotlib.ticker

    a, b = binned(first), binned(second)

    def draw(axes: Any) -> None:
        axes.stairs(a, edges, color=_FIRST, fill=True, alpha=0.35)
        axes.stairs(b, edges, color=_SECOND, linewidth=1.8, baseline=None)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="tokens", ylabel="rows")

    rows = [
        [f"{low:,} to {high - 1:,}", f"{x:,}", f"{y:,}"]
        for low, high, x, y in zip(
            edges[:-1].tolist(), edges[1:].tolist(), a.tolist(), b.tolist(), strict=True
        )
    ]
    note = f"Filled: A, median {first.quantile(0.5):,}. Line: B, median {second.quantile(0.5):,}."
    return Plot(
        title=title, note=note, svg=_draw(draw, title), head=["tokens", "A", "B"], rows=rows
    )


def _histogram(
    title: str,
    note: str,
    values: Any,
    edges: Any,
    label: str,
    names: Sequence[str],
    color: str,
    is_log: bool = False,
) -> Plot:
    import matplotlib.ticker

    def draw(axes: Any) -> None:
        if is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            if edges[-1] < 30 * edges[0]:
                axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}")
        elif len(values) <= 6:
            axes.set_xticks((edges[:-1] + edges[1:]) / 2)
        else:
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
        axes.stairs(values, edges, color=color, fill=True, alpha=0.85)
        axes.set(xlabel=label, ylabel="rows")
        axes.set_ylim(bottom=0)

    rows = [
        [name, f"{value:,}"] for name, value in zip(names, values.tolist(), strict=True) if value
    ]
    return Plot(title=title, note=note, svg=_draw(draw, title), head=[label, "rows"], rows=rows)


def _draw(draw: Callable[[Any], None], title: str) -> Markup:
    import matplotlib.ticker
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # text, not outlines
        "svg.hashsalt": "batchvlm",  # the same ids for the same drawing
        "font.size": 11.5,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.minor.size": 0,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "grid.color": _GRID,
        "grid.linewidth": 0.8,
    }
    with matplotlib.rc_context(settings):
        # 5 x 2.7 inches: about as wide as a phone, so that text has the same size everywhere.
        figure = Figure(figsize=(5.0, 2.7), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        draw(axes)
        axes.yaxis.set_major_locator(
            matplotlib.ticker.MaxNLocator(5, integer=axes.get_ylabel() == "rows")
        )
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _adapt(file.getvalue(), re.sub(r"\W+", "-", title.lower()))


def _adapt(svg: bytes, name: str) -> Markup:
    """Adapt a drawing to the page: unique ids, the page's colours, no inline styles."""
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    root = ElementTree.fromstring(svg)
    for child in list(root):
        if child.tag not in (f"{_SVG}g", f"{_SVG}defs"):
            root.remove(child)
    for element in root.iter():
        for style in list(element.findall(f"{_SVG}style")):
            element.remove(style)
        for part in element.attrib.pop("style", "").split(";"):
            key, _, value = part.partition(":")
            if key.strip() in _KEPT:
                element.set(key.strip(), value.strip())
        for key, value in list(element.attrib.items()):
            if key == _LINK:
                del element.attrib[key]
                element.set("href", value.replace("#", f"#{name}-"))
            elif key == "id":
                element.set(key, f"{name}-{value}")
            else:
                colored = _COLORS.get(value.lower(), value)
                element.set(key, colored.replace("url(#", f"url(#{name}-"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    # Screen readers get the title and the table instead.
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def seconds(value_s: float) -> str:
    """Return a time with three digits in ms, s, min or h."""
    if value_s < 1:
        return f"{1000 * value_s:.3g} ms"
    scale, unit = _time_unit(value_s)
    return f"{value_s / scale:.3g} {unit}"


def _time_unit(length_s: float) -> tuple[float, str]:
    if length_s < 180:
        return 1.0, "s"
    return (60.0, "min") if length_s < 3 * 3600 else (3600.0, "h")


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
