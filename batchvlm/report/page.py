"""A self-contained HTML file with inline styles, script and data, which loads nothing.

All data is escaped by Jinja2, or embedded as JSON that the script inserts as text only. The content
security policy in the head allows this script and no other, and no requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batchvlm import __version__

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **context: Any) -> str:
    """Render a template with the page's style, script and security policy, and the date."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src 'sha256-{_digest(style)}'",
            f"script-src 'sha256-{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return (
        _environment()
        .get_template(template)
        .render(
            **context,
            style=Markup(style),
            script=Markup(script),
            policy=policy,
            version=__version__,
            made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def embed(value: Any) -> Markup:
    """Return JSON for a `<script type="application/json">` that cannot end the element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["share"] = share
    environment.globals["embed"] = embed
    return environment


def share(part: float, whole: float) -> str:
    """Return a percentage; it is "0%" or "100%" only if that is exact, or if `whole` is 0."""
    if not whole:
        return "0%"
    value = 100 * part / whole
    text = f"{value:.1f}"
    if text in ("0.0", "100.0") and 0 < part < whole:
        return "<0.1%" if text == "0.0" else ">99.9%"
    return f"{text.removesuffix('.0')}%"
