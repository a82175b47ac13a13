"""Captioning and question answering: the answer is the text."""

from __future__ import annotations

from batchvlm.tasks import Reading


class FreeText:
    """Takes every answer as it is."""

    def read(self, text: str, *, json_schema: str | None) -> Reading:
        """Nothing to parse; see `Task.read`."""
        return Reading()
