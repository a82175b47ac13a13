"""Formatting of numbers and texts for a terminal."""

from __future__ import annotations

import re
import shlex
from collections import Counter

_BYTES = ("bytes", "kB", "MB", "GB", "TB")
_POWERS = ("", " k", " M", " B", " T")


def printable(text: str, *, keep: str = "") -> str:
    """Replace control characters by spaces: text of a model or a file must not control a terminal.

    Args:
        keep: control characters to keep, such as line ends.
    """
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


def one_line(value: object) -> str:
    """Convert a value, such as an error, to one line of text of at most 200 characters."""
    return " ".join(str(value).split())[:200]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:300] for line in lines if line), type(error).__name__)


def described(error: BaseException) -> str:
    """Describe an error in one line: its type, and its message if it has one."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def setting(key: str, value: str) -> str:
    """Quote a setting for Hydra and shell: `data.path=a.parquet`, `'data.path="my a.parquet"'`."""
    if re.fullmatch(r"[\w./:@%-]+", value, re.ASCII):
        return f"{key}={value}"
    # In Hydra a backslash needs escaping only before a quote.
    inner = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value)
    text = f'{key}="{inner}"'
    if "'" in text and not re.search(r"[$`\\!]", text):
        return '"' + text.replace('"', '\\"') + '"'
    return shlex.quote(text) if "'" in text else f"'{text}'"


def counted(counts: Counter[str]) -> str:
    """Format counts as `1,200 strict, 3 none`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {name}" for name, count in ordered)


def number_of(count: int, word: str) -> str:
    """Format a count with its noun: `1 row`, `1,200 rows`, `2 processes`."""
    plural = "es" if word.endswith(("s", "ch")) else "s"
    return f"{count:,} {word}" + ("" if count == 1 else plural)


def duration(seconds: float) -> str:
    """Format a duration: `95 s`, `12 min`, `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def num_bytes(number: float) -> str:
    """Format a number of bytes in powers of 1,000: `643 kB`."""
    return _scaled(number, tuple(f" {unit}" for unit in _BYTES))


def large_number(number: float) -> str:
    """Format a number in powers of 1,000: `1.63 M`."""
    return _scaled(number, _POWERS)


def _scaled(number: float, units: tuple[str, ...]) -> str:
    place = 0
    # A number that would be rounded to 1,000 is shown as 1 of the next unit.
    while number >= 999.5 and place < len(units) - 1:
        number /= 1000
        place += 1
    return f"{number:.3g}{units[place]}"


def ends_in_number(host: str) -> bool:
    """Whether a host's last label is a number in any notation, as in no domain name."""
    last = host.lower().rstrip(".").rpartition(".")[2]
    return re.fullmatch(r"\d+|0x[0-9a-f]*", last) is not None
