"""JSON-schema extraction: the answer is read as JSON and validated."""

from __future__ import annotations

import json
from typing import Any

from batchvlm.config import TaskOutputConfig
from batchvlm.errors import ErrorType
from batchvlm.records import Failure
from batchvlm.schemas import read_schema, why_invalid
from batchvlm.tasks import Reading

_FENCE = "```"


class Extract:
    """Reads answers as JSON that fits the row's schema, else the run's.

    An answer that is not whole is never repaired: no bracket is guessed.

    Raises:
        ConfigError: the run's schema cannot be read.
    """

    def __init__(self, cfg: TaskOutputConfig) -> None:
        self._schema = (
            None
            if cfg.json_schema is None
            else read_schema(cfg.json_schema, "task.output.json_schema")
        )

    def read(self, text: str, *, json_schema: str | None) -> Reading:
        """Parse and validate; see `Task.read`."""
        try:
            value = json.loads(_without_fence(text), parse_constant=_refuse_constant)
            parsed = _canonical(value)
        except (ValueError, RecursionError) as error:
            return _invalid(f"the answer is no JSON: {_reason(error)}")
        schema = json_schema or self._schema
        if schema is not None and (reason := why_invalid(value, schema)) is not None:
            return _invalid(f"the answer breaks the schema: {reason}")
        return Reading(parsed=parsed, json_valid=True)


def _canonical(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON can say and no text column can hold, stays escaped.
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text


def _without_fence(text: str) -> str:
    # Many models wrap JSON in a Markdown code block, whatever the prompt says.
    text = text.strip()
    first, _, rest = text.partition("\n")
    if first.rstrip() in (_FENCE, f"{_FENCE}json", f"{_FENCE}JSON") and rest.endswith(_FENCE):
        return rest.removesuffix(_FENCE)
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:120]


def _invalid(message: str) -> Reading:
    return Reading(
        json_valid=False, failure=Failure(error_type=ErrorType.INVALID_JSON, message=message)
    )
