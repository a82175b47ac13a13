"""Captions, questions and dialogs: answers are free text, or JSON if the row has a schema."""

from __future__ import annotations

from collections.abc import Sequence

from batchvlm.config import TaskOutputConfig
from batchvlm.tasks import Reading
from batchvlm.tasks.extract import Extract


class FreeText:
    """Accepts any answer; if the row has a JSON schema, parses and validates it like `Extract`."""

    def __init__(self, cfg: TaskOutputConfig) -> None:
        self._extract = Extract(cfg)

    def read(
        self, text: str, *, json_schema: str | None, choices: Sequence[str] | None = None
    ) -> Reading:
        """Read one answer; without a schema the reading is empty. See `Task.read`."""
        if json_schema is None:
            return Reading()
        return self._extract.read(text, json_schema=json_schema)
