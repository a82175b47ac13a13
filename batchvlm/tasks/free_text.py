"""Captioning and question answering: the answer is the text, or the JSON that the row asks for."""

from __future__ import annotations

from collections.abc import Sequence

from batchvlm.config import TaskOutputConfig
from batchvlm.tasks import Reading
from batchvlm.tasks.extract import Extract


class FreeText:
    """Takes an answer as it is; where the row brings a JSON schema, reads it as extract does."""

    def __init__(self, cfg: TaskOutputConfig) -> None:
        self._extract = Extract(cfg)

    def read(
        self, text: str, *, json_schema: str | None, choices: Sequence[str] | None = None
    ) -> Reading:
        """Nothing to parse without a schema; see `Task.read`."""
        if json_schema is None:
            return Reading()
        return self._extract.read(text, json_schema=json_schema)
