"""Settings without passwords: what is shown to people may be passed on."""

from __future__ import annotations

import re
from typing import Any

# User and password, which may hold a slash; the query and the fragment, where signatures are.
_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^\s'\"/@:]*:[^\s'\"@]*@|[^\s'\"/?#@]*@)?"
    r"([^\s'\"?#]*)(?:[?#][^\s'\"]*)?"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SECRET = re.compile(r"token$|secret|passw|credential|api_?key|access_?key|authorization", re.I)


def redact(text: str) -> str:
    """The text without the passwords and the signatures in its URLs, and without Hub tokens."""
    return _TOKEN.sub("hf_***", _URL.sub(r"\1\2", text))


def redact_all(value: Any, name: str = "") -> Any:
    """The same for every text in nested settings; one whose name says secret is hidden whole."""
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
