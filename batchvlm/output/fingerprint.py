"""What the answers depend on, as a short digest, and in words where two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_SHOWN = 72
"""Characters of one value in a line about a difference."""

_SHOWN_BEFORE = 24
"""Of these, characters kept before the first one that differs."""


def fingerprint(identity: Mapping[str, Any]) -> str:
    """The first 16 hex digits of SHA-256 over `identity` as canonical JSON.

    Args:
        identity: JSON values, nested as deep as need be; the order of keys does not matter.

    Raises:
        TypeError: a value is none that JSON knows.
    """
    return hashlib.sha256(canonical(identity).encode("ascii")).hexdigest()[:16]


def canonical(value: Any) -> str:
    """`value` as JSON text that is equal for equal values; ASCII, so that any string survives."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each dotted key on which the two disagree: `task.prompt: 'old' -> 'new'`.

    Long values are shortened to the neighbourhood of the first difference. Of a list the lengths
    are told, or else its first item that differs and how many more do.
    """
    # Through JSON, so that one side may have been stored: a tuple there came back as a list.
    return list(_compare("", json.loads(canonical(old)), json.loads(canonical(new))))


class _Absent:
    """The value of a key that only the other side has."""

    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _compare(key: str, old: Any, new: Any) -> Iterator[str]:
    match old, new:
        case dict(), dict():
            for name in sorted(old.keys() | new.keys()):
                dotted = f"{key}.{name}" if key else name
                yield from _compare(dotted, old.get(name, _ABSENT), new.get(name, _ABSENT))
        case list(), list() if len(old) != len(new):
            yield f"{key}: {_items(old)} -> {_items(new)}"
        case list(), list():
            changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if _differ(a, b)]
            if changed:
                lines = list(_compare(f"{key}[{changed[0]}]", old[changed[0]], new[changed[0]]))
                if len(changed) > 1:
                    lines[-1] += f" (and {len(changed) - 1} more of {len(old)} items)"
                yield from lines
        case _ if _differ(old, new):
            shown_old, shown_new = _shorten(_show(old), _show(new))
            yield f"{key}: {shown_old} -> {shown_new}"


def _differ(old: Any, new: Any) -> bool:
    if old is _ABSENT or new is _ABSENT:
        return True
    # As text: Python takes 1, 1.0 and True for equal and NaN for unequal, the digest does not.
    return canonical(old) != canonical(new)


def _items(values: list[Any]) -> str:
    return f"{len(values)} item{'' if len(values) == 1 else 's'}"


def _show(value: Any) -> str:
    if isinstance(value, str):
        # With a double quote in it, repr always takes single ones: else one apostrophe more
        # would make two values differ from their first character on.
        return repr(value + '"')[:-2] + "'"
    # As it is written on the command line: null, true, false.
    return repr(value) if value is _ABSENT else json.dumps(value)


def _shorten(old: str, new: str) -> tuple[str, str]:
    """Both values, each cut to the part around the first character in which they differ."""
    pairs = enumerate(zip(old, new, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
    start = max(0, first - _SHOWN_BEFORE) if max(len(old), len(new)) > _MAX_SHOWN else 0
    return _cut(old, start), _cut(new, start)


def _cut(text: str, start: int) -> str:
    stop = start + _MAX_SHOWN
    return ("..." if start else "") + text[start:stop] + ("..." if stop < len(text) else "")
