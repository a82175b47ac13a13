"""Log lines on stderr, as text or as JSON objects."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

DATA = "data"
"""Key of a log record's machine-readable fields (`extra={DATA: {...}}`)."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object.

    Its keys are `time` (ISO 8601, UTC), `level`, `logger`, `message`, and those of `DATA`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
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
    """Send log lines to stderr. A second call may change their format."""
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
        return  # a program that embeds this one has set up logging itself
    handler.is_ours = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(logging.INFO)
