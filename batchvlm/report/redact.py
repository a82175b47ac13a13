"""Remove passwords from settings and texts that are shown, because reports may be published."""

from __future__ import annotations

import re
from typing import Any

# User and password (which may contain a slash), query and fragment (which may hold signatures).
_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^\s'\"/@:]*:[^\s'\"@]*@|[^\s'\"/?#@]*@)?"
    r"([^\s'\"?#]*)(?:[?#][^\s'\"]*)?"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SECRET = re.compile(r"token$|secret|passw|credential|api_?key|access_?key|authorization", re.I)


def redact(text: str) -> str:
    """Return the text without user, password, query and fragment of URLs, and Hub tokens."""
    return _TOKEN.sub("hf_***", _URL.sub(r"\1\2", text))


def redact_all(value: Any, name: str = "") -> Any:
    """Redact every text in nested settings; replace the value of settings named like a secret."""
    match value:
        case str() if value and _SECRET.search(name):
            return "***"
        case str():
            return redact(value)
        case dict():
            return {key: redact_all(item, str(key)) for key, item in value.items()}
        case list() | tuple():
            return [redact_all(item, name) for item in value]
    return value
