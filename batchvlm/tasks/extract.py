"""Extraction: parse and validate answers that must have a form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from batchvlm.config import TaskOutputConfig
from batchvlm.constraints.plan import fits
from batchvlm.errors import ErrorType
from batchvlm.forms.forms import run_form
from batchvlm.forms.schemas import why_invalid, why_no_match
from batchvlm.records import Failure, Form, FormKind
from batchvlm.tasks import Reading

_FENCE = "```"


class Extract:
    """Reads answers in the form of the row, else of the run: JSON, a choice, a pattern, a grammar.

    Incomplete answers are never repaired: no bracket is guessed.

    Raises:
        ConfigError: the run's form cannot be read.
    """

    def __init__(self, cfg: TaskOutputConfig) -> None:
        self._form = run_form(cfg)

    def read(
        self, text: str, *, json_schema: str | None, choices: Sequence[str] | None = None
    ) -> Reading:
        """Parse and validate; see `Task.read`."""
        if choices is not None:
            return _read_choice(text, choices)
        form = Form(FormKind.JSON_SCHEMA, json_schema) if json_schema else self._form
        if form is None:
            return _read_json(text, None)
        match form.kind:
            case FormKind.JSON_SCHEMA:
                return _read_json(text, form.text)
            case FormKind.CHOICE:
                return _read_choice(text, json.loads(form.text))
            case FormKind.REGEX:
                reason = why_no_match(text, form.text)
            case FormKind.GRAMMAR:
                reason = None if fits(form, text) else "it is no sentence of the grammar"
        return _invalid(f"the answer: {reason}") if reason else _text(text)


def _read_json(text: str, schema: str | None) -> Reading:
    inner = _without_fence(text)
    try:
        value = json.loads(inner, parse_constant=_refuse_constant)
        parsed = _canonical(value)
    except json.JSONDecodeError as error:
        # One message of the library ends in "at".
        place = f"{error.msg.removesuffix(' at')} at character {text.find(inner) + error.pos + 1}"
        failed = _invalid(f"the answer is no JSON: {place}")
        return replace(failed, is_unfinished=error.msg != "Extra data")
    except (ValueError, RecursionError) as error:
        return _invalid(f"the answer is no JSON: {str(error)[:120]}")
    if schema is not None and (reason := why_invalid(value, schema)) is not None:
        return _invalid(f"the answer breaks the schema: {reason}")
    return Reading(parsed=parsed, json_valid=True)


def _read_choice(text: str, choices: Sequence[str]) -> Reading:
    if text in choices:
        return _text(text)
    # Unguided models may add a line end, and some tokenizers drop a leading space.
    same = {choice for choice in choices if choice.strip() == text.strip()}
    return _text(same.pop()) if len(same) == 1 else _invalid("the answer is none of the choices")


def _text(text: str) -> Reading:
    return Reading(parsed=_canonical(text), json_valid=True)


def _canonical(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        # Lone surrogates, which JSON can express but a text column cannot store, stay escaped.
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text


def _without_fence(text: str) -> str:
    # Many models wrap JSON in a Markdown code block even if the prompt forbids it.
    text = text.strip()
    first, _, rest = text.partition("\n")
    if first.rstrip() in (_FENCE, f"{_FENCE}json", f"{_FENCE}JSON") and rest.endswith(_FENCE):
        return rest.removesuffix(_FENCE)
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _invalid(message: str) -> Reading:
    return Reading(
        json_valid=False, failure=Failure(error_type=ErrorType.INVALID_JSON, message=message)
    )
