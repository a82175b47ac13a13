"""Show a comparison: a table for the terminal, and an HTML page with the changed rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any

from batchvlm.output.fingerprint import differences
from batchvlm.report.compare import (
    BOTH,
    CHANGED,
    ONLY_A,
    ONLY_B,
    OUTCOMES,
    SAME,
    Comparison,
    Side,
    are_same,
    drawn_rows,
    paired_fields,
)
from batchvlm.report.gallery import cut, read_rows
from batchvlm.report.inputs import Asked, open_inputs
from batchvlm.report.outputs import Output, job_config, read_processes
from batchvlm.report.page import render, share
from batchvlm.report.plots import check_library, paired_plot, seconds
from batchvlm.report.redact import redact, redact_all
from batchvlm.words import printable

_MAX_WORDS = 1500
"""Limit for both answers together; of longer ones only the common prefix and suffix are found."""
_NUM_FIELDS = 20
_SORTS = (
    ("difference", "how much differs"),
    ("row", "input order"),
    ("id", "id"),
    ("length", "length of A's answer"),
    ("tokens", "A's answer tokens"),
)
_SHOWN_SAME = 50
"""Most rows with the same answer on the page."""


def table(a: Output, b: Output, found: Comparison) -> str:
    """Return the comparison as text for a terminal."""
    lines = [f"A  {a.folder}  {redact(a.model)}", f"B  {b.folder}  {redact(b.model)}", ""]
    if differing := _differences(a, b):
        lines += ["what differs between the runs", *(f"  {printable(x)}" for x in differing), ""]
    lines.append(f"rows in both       {found.num_both:,}, matched by {_key(a, b, found)}")
    for outcome in (SAME, CHANGED, ONLY_A, ONLY_B, BOTH):
        num = found.outcomes[outcome]
        lines.append(f"{outcome:<18} {num:,} ({share(num, found.num_both)})")
    if found.num_json:
        lines.append(
            f"{'same JSON':<18} {found.num_json_same:,} of {found.num_json:,} "
            f"({share(found.num_json_same, found.num_json)})"
        )
    ranked = _ranked_fields(found)
    if ranked:
        # The model generates field names: remove control characters.
        names = [printable(name) for name, _, _ in ranked[:_NUM_FIELDS]]
        width = max(map(len, names))
        lines += ["", "agreement by field, lowest first"]
        lines += [
            f"  {name:<{width}}  {share(same, num):>6}  {same:,} of {num:,}"
            for name, (_, same, num) in zip(names, ranked, strict=False)
        ]
        if len(ranked) > _NUM_FIELDS:
            lines.append(f"  and {len(ranked) - _NUM_FIELDS} more fields")
    rows = sums(a, b, found)
    widths = [max(len(row[i]) for row in [*rows, ["", "A", "B"]]) for i in range(3)]
    lines += ["", f"{'':<{widths[0]}}  {'A':>{widths[1]}}  {'B':>{widths[2]}}"]
    lines += [f"{n:<{widths[0]}}  {x:>{widths[1]}}  {y:>{widths[2]}}" for n, x, y in rows]
    return "\n".join(lines)


def page(
    a: Output, b: Output, found: Comparison, *, images: bool = True, input_path: str | None = None
) -> str:
    """Return the comparison as HTML, with rows side by side.

    Raises:
        BatchvlmError: matplotlib is missing, or a part cannot be read.
    """
    check_library()
    same = drawn_rows(found, [SAME])[:_SHOWN_SAME]
    chosen = sorted({*same, *drawn_rows(found, [o for o in OUTCOMES if o != SAME])})
    others = [found.rows_b[row] for row in chosen] if found.is_by_id else chosen
    rows_a = read_rows(a, chosen)
    rows_b = {row["row_index"]: row for row in read_rows(b, sorted(others))}
    inputs = open_inputs(a.run, job_config(a.run), path=input_path)
    asked = inputs.read(chosen, with_images=[images] * len(chosen))
    rows = [
        _entry(row, rows_b[other], prompt)
        for row, other, prompt in zip(rows_a, others, asked, strict=True)
    ]
    notices = [f"Prompts and images are not shown, since {inputs.problem}."] * bool(inputs.problem)
    if found.is_by_id:
        key = _key(a, b, found)
        notices.append(f"The two runs read different inputs; their rows are matched by {key}.")
    plots = [
        paired_plot(title, found.a.tokens[name], found.b.tokens[name])
        for name, title in (("completion_tokens", "Answer tokens"),)
        if found.a.tokens[name].total and found.b.tokens[name].total
    ]
    num, both = found.num_both, found.num_answered
    facts = [("Rows in both", f"{num:,}", "")]
    facts += [("Same answer", share(found.outcomes[SAME], both), f"of {both:,} answered by both")]
    if found.num_json:
        facts.append(("Same JSON", share(found.num_json_same, found.num_json), ""))
    facts += [
        (name[0].upper() + name[1:], f"{found.outcomes[name]:,}", share(found.outcomes[name], num))
        for name in (CHANGED, ONLY_A, ONLY_B, BOTH)
    ]
    return render(
        "compare.html.jinja",
        title=f"{redact(a.model)} and {redact(b.model)} compared",
        names=[f"{o.folder.root.name}, {redact(o.model)}" for o in (a, b)],
        notices=notices,
        facts=facts,
        sums=sums(a, b, found),
        fields=_ranked_fields(found),
        plots=plots,
        differences=_differences(a, b),
        sample_note=f"{len(rows):,} of {num:,} rows, drawn at random of each outcome.",
        rows=rows,
        statuses=Counter(row["status"] for row in rows).most_common(),
        error_types=Counter(row["error"] for row in rows if row["error"]).most_common(),
        sorts=_SORTS,
    )


def _key(a: Output, b: Output, found: Comparison) -> str:
    """Describe the key by which rows of A and B are matched."""
    if not found.is_by_id:
        return "row_index"
    if all(output.run.settings["data"]["columns"].get("id") for output in (a, b)):
        return "id (the inputs differ)"
    # Removing a row from one input changes this key for all rows after it.
    return "id (the inputs differ), which is a row's place in its file: data.columns.id was not set"


def _ranked_fields(found: Comparison) -> list[tuple[str, int, int]]:
    items = [(name, same, num) for name, (same, num) in found.fields.items()]
    return sorted(items, key=lambda item: (item[1] / item[2], item[0]))


def sums(a: Output, b: Output, found: Comparison) -> list[list[str]]:
    """Return the sums of each output as rows of a table: name, A, B."""

    def per_answer(side: Side, total: int) -> str:
        return f"{total / max(1, side.num_answers):,.1f}"

    def row(name: str, read: Any) -> list[str]:
        return [name, read(found.a), read(found.b)]

    rows = [row("whole output: rows", lambda s: f"{s.num_rows:,}")]
    spent = [sum(p.run_s for p in read_processes(output.folder)) for output in (a, b)]
    if any(spent):
        name = "whole output: computing time, processes added up"
        rows.append([name, *(seconds(s) for s in spent)])
    rows.append(row("rows in both: errors", lambda s: f"{s.errors.total():,}"))
    for kind in sorted(found.a.errors | found.b.errors):
        rows.append(row(f"  {kind}", lambda s, kind=kind: f"{s.errors[kind]:,}"))
    for name in ("prompt_tokens", "image_tokens", "completion_tokens"):
        shown = f"rows in both: {name.replace('_', ' ')}"
        rows.append(row(shown, lambda s, name=name: f"{s.tokens[name].total:,}"))
    rows += [
        row(
            "rows in both: completion tokens an answer",
            lambda s: per_answer(s, s.tokens["completion_tokens"].total),
        ),
        row("rows in both: characters an answer", lambda s: per_answer(s, s.num_chars)),
    ]
    return rows


def _differences(a: Output, b: Output) -> list[str]:
    """Return a line for each setting in which the identities of the two runs differ."""
    one, two = redact_all(dict(a.run.identity)), redact_all(dict(b.run.identity))
    names = {"model.name": (a.model, b.model)}
    lines = [f"{n}: {redact(x)!r} -> {redact(y)!r}" for n, (x, y) in names.items() if x != y]
    return lines + differences(one, two)


def _entry(a: dict[str, Any], b: dict[str, Any], asked: Asked) -> dict[str, Any]:
    outcome = _outcome(a, b)
    answers, difference = _answers(a, b)
    fields = _field_rows(a["parsed"], b["parsed"])
    num_changed = sum(one != two for _, one, two in fields)
    messages = [
        f"{name}: {row['error_type']}, {redact(row['error_message'] or '')}"
        for name, row in (("A", a), ("B", b))
        if row["status"] == "error"
    ]
    return {
        "row": a["row_index"],
        "id": cut(str(a["id"])),
        "file": a["source_file"],
        "status": outcome,
        "badge": {SAME: "success", CHANGED: "changed"}.get(outcome, "error"),
        "error": a["error_type"] or b["error_type"] or "",
        "message": "\n".join(messages),
        "images": list(asked.thumbnails),
        "note": "" if messages else asked.note,
        "prompt": None if asked.prompt is None else cut(asked.prompt),
        "answers": answers,
        "sideBySide": True,
        "fields": fields,
        "fieldHead": ["Field", "A", "B"],
        "fieldTitle": f"Fields ({num_changed} of {len(fields)} differ)",
        "difference": difference,
        "tokens": a["completion_tokens"],
        "meta": [
            ["row", a["row_index"]],
            ["file", a["source_file"]],
            ["tokens of A", a["completion_tokens"]],
            ["tokens of B", b["completion_tokens"]],
            ["latency of A", _latency(a)],
            ["latency of B", _latency(b)],
        ],
    }


def _answers(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """Return the answers of A and B in pairs (a dialog's by turn), and their mean difference."""
    texts_a, texts_b = (row.get("generated_texts") or [row["generated_text"]] for row in (a, b))
    pairs = list(zip_longest(texts_a, texts_b))
    answers = []
    total = 0.0
    for place, pair in enumerate(pairs, start=1):
        one, two = (cut(text or "") for text in pair)
        empty = ["no answer" if text is None else "empty" for text in pair]
        parts_a, parts_b, difference = changes(one, two)
        total += difference
        name = f"Answer {place}" if len(pairs) > 1 else "Answer"
        answers += [
            {
                "label": f"{name} of {side}",
                "text": text,
                "parts": parts,
                "mark": mark,
                "empty": none,
            }
            for side, text, parts, mark, none in (
                ("A", one, parts_a, "del", empty[0]),
                ("B", two, parts_b, "ins", empty[1]),
            )
        ]
    return answers, total / len(pairs)


def _latency(row: dict[str, Any]) -> str | None:
    return None if row["latency_s"] is None else seconds(row["latency_s"])


def _outcome(a: dict[str, Any], b: dict[str, Any]) -> str:
    match a["status"] == "error", b["status"] == "error":
        case True, True:
            return BOTH
        case True, False:
            return ONLY_A
        case False, True:
            return ONLY_B
    is_same = a["generated_text"] == b["generated_text"] and are_same(
        a.get("generated_texts"), b.get("generated_texts")
    )
    return SAME if is_same else CHANGED


def _field_rows(a: str | None, b: str | None) -> list[list[str]]:
    rows = [[name, cut(one), cut(two)] for name, one, two in paired_fields(a, b)]
    # Fields that differ come first.
    return sorted(rows, key=lambda row: row[1] == row[2])


Parts = list[tuple[int, str]]


def changes(a: str, b: str) -> tuple[Parts, Parts, float]:
    """Compare two texts word by word.

    Returns:
        The pieces of each text in order, each with 1 if it is only in that text, else 0; and the
        difference, from 0 (equal) to 1 (nothing in common).
    """
    if a == b:
        return [(0, a)], [(0, b)], 0.0
    one, two = re.findall(r"\w+|\s+|[^\w\s]", a), re.findall(r"\w+|\s+|[^\w\s]", b)
    if len(one) + len(two) > _MAX_WORDS:
        steps: Any = _common_ends(one, two)
    else:
        steps = SequenceMatcher(None, one, two, autojunk=False).get_opcodes()
    parts_a: Parts = []
    parts_b: Parts = []
    num_same = 0
    for kind, a0, a1, b0, b1 in steps:
        is_changed = int(kind != "equal")
        num_same += 0 if is_changed else a1 - a0
        if a1 > a0:
            parts_a.append((is_changed, "".join(one[a0:a1])))
        if b1 > b0:
            parts_b.append((is_changed, "".join(two[b0:b1])))
    return parts_a, parts_b, 1 - 2 * num_same / max(1, len(one) + len(two))


def _common_ends(a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[str, int, int, int, int]]:
    # Comparing every pair of words would take seconds for one row.
    short = min(len(a), len(b))
    head = next((i for i in range(short) if a[i] != b[i]), short)
    tail = next((i for i in range(short - head) if a[-1 - i] != b[-1 - i]), short - head)
    yield "equal", 0, head, 0, head
    yield "replace", head, len(a) - tail, head, len(b) - tail
    yield "equal", len(a) - tail, len(a), len(b) - tail, len(b)
