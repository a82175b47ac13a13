"""Sampled rows for the page's script: plain JSON values of limited length."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from batchvlm.errors import ErrorType
from batchvlm.report.inputs import Asked, Inputs
from batchvlm.report.outputs import Output
from batchvlm.report.redact import redact
from batchvlm.report.totals import leaves
from batchvlm.words import number_of

MAX_CHARS = 20_000
"""Limit of one text; a longer one is cut and ends with a note."""
_MAX_FIELDS = 60
# Opening the images of these rows again might hang or kill this process, too.
_UNSAFE = {ErrorType.TIMEOUT, ErrorType.PREPROCESS}

_COLUMNS = (
    *("row_index", "id", "source_file", "status", "error_type", "error_message", "attempts"),
    *("generated_text", "generated_texts", "parsed", "json_valid", "finish_reason"),
    *("prompt_tokens", "image_tokens", "completion_tokens", "num_images", "latency_s"),
)


def read_rows(output: Output, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Read some rows of an output.

    Args:
        rows: row indices, ascending.

    Raises:
        OutputError: a part cannot be read.
    """
    wanted = set(rows)
    found = []

    def holds_one(low: int, high: int) -> bool:
        place = bisect_left(rows, low)
        return place < len(rows) and rows[place] <= high

    for batch in output.batches(_COLUMNS, wants_group=holds_one):
        for place, row in enumerate(batch.column("row_index").to_pylist()):
            if row in wanted:
                found.extend(batch.slice(place, 1).to_pylist())
    return sorted(found, key=lambda row: int(row["row_index"]))


def gallery(output: Output, rows: Sequence[int], inputs: Inputs, *, images: bool) -> list[Any]:
    """Return the rows for the page's script, with their prompts.

    Args:
        images: whether to make thumbnails.
    """
    found = read_rows(output, rows)
    asked = inputs.read(
        [row["row_index"] for row in found],
        with_images=[images and row["error_type"] not in _UNSAFE for row in found],
    )
    return [_entry(row, prompt, images) for row, prompt in zip(found, asked, strict=True)]


def _entry(row: dict[str, Any], asked: Asked, images: bool) -> dict[str, Any]:
    texts = row.get("generated_texts") or [row["generated_text"]]
    answers = [
        {"label": f"Answer {n}" if len(texts) > 1 else "Answer", "text": cut(text)}
        for n, text in enumerate(texts, start=1)
        if text is not None
    ]
    note = asked.note if images or asked.prompt is None else ""
    num_more = asked.num_images - len(asked.thumbnails)
    if asked.thumbnails and num_more > 0:
        note = note or f"{number_of(num_more, 'more image')} not shown"
    return {
        "row": row["row_index"],
        "id": cut(str(row["id"])),
        "file": row["source_file"],
        "status": row["status"],
        "error": row["error_type"] or "",
        "message": redact(row["error_message"] or ""),
        "finish": row["finish_reason"] or "",
        "attempts": row["attempts"],
        "promptTokens": row["prompt_tokens"],
        "imageTokens": row["image_tokens"],
        "tokens": row["completion_tokens"],
        "seconds": None if row["latency_s"] is None else round(row["latency_s"], 3),
        "images": list(asked.thumbnails),
        "note": "" if row["error_message"] and note == redact(row["error_message"]) else note,
        "prompt": None if asked.prompt is None else cut(asked.prompt),
        "answers": answers,
        "fields": fields_of(row["parsed"]),
    }


def fields_of(parsed: str | None) -> list[list[str]]:
    """Return the dotted path and value of each field of a JSON answer; list items are numbered."""
    if parsed is None:
        return []
    try:
        pairs = list(leaves(json.loads(parsed), numbered=True))
    except (ValueError, RecursionError):
        return []
    shown = [
        [path, cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
        for path, value in pairs[:_MAX_FIELDS]
    ]
    if len(pairs) > _MAX_FIELDS:
        shown.append(["...", f"{len(pairs) - _MAX_FIELDS} more"])
    return shown


def cut(text: str) -> str:
    """Return the text, or if it is too long its start and its length."""
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[:MAX_CHARS]}\n[... {len(text):,} characters in all]"
