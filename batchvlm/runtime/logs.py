"""Log lines on stderr: for people, or as JSON objects for programs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

DATA = "data"
"""Under this name a log record may carry numbers (`extra={DATA: {...}}`)."""


class JsonFormatter(logging.Formatter):
    """A JSON object a line: `time` (ISO 8601, UTC), `level`, `logger`, `message`, and its data."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, DATA, {}), default=str)


def set_up_logging(*, as_json: bool) -> None:
    """Let the program's log lines go to stderr; a second call may change their form."""
    handler = logging.StreamHandler()
    if as_json:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        )
    root = logging.getLogger()
    for ours in [h for h in root.handlers if getattr(h, "is_ours", False)]:
        root.removeHandler(ours)
    if root.handlers:
        return  # whoever embeds the program has a way of logging
    handler.is_ours = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(logging.INFO)
