"""The digest of everything that answers depend on, and the differences of two identities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_SHOWN = 72
"""Characters of one value in a line about a difference."""

_SHOWN_BEFORE = 24
"""Characters of these that are kept before the first difference."""


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of SHA-256 over `identity` as canonical JSON.

    Args:
        identity: nested JSON values; the order of keys does not matter.

    Raises:
        TypeError: a value has no JSON form.
    """
    return hashlib.sha256(canonical(identity).encode("ascii")).hexdigest()[:16]


def canonical(value: Any) -> str:
    """Return JSON text that is equal for equal values; ASCII, so that lone surrogates survive."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each dotted key whose values differ: `task.prompt: 'old' -> 'new'`.

    Long values are cut to the text around their first difference. For lists of unequal length the
    line gives both lengths, for others the first item that differs and how many more differ.
    """
    # Through JSON, because one side may have been stored: tuples come back from it as lists.
    return list(_compare("", json.loads(canonical(old)), json.loads(canonical(new))))


class _Absent:
    """Stands for the value of a key that only the other side has."""

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
    # As text: to Python 1 == 1.0 == True and NaN != NaN, to the digest the opposite holds.
    return canonical(old) != canonical(new)


def _items(values: list[Any]) -> str:
    return f"{len(values)} item{'' if len(values) == 1 else 's'}"


def _show(value: Any) -> str:
    if isinstance(value, str):
        # A double quote in the text makes repr use single quotes. Without it, one more apostrophe
        # would change the quotes, so that the values differ from their first character on.
        return repr(value + '"')[:-2] + "'"
    # As on the command line: null, true, false.
    return repr(value) if value is _ABSENT else json.dumps(value)


def _shorten(old: str, new: str) -> tuple[str, str]:
    """Cut both values to the text around the first character in which they differ."""
    pairs = enumerate(zip(old, new, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
    start = max(0, first - _SHOWN_BEFORE) if max(len(old), len(new)) > _MAX_SHOWN else 0
    return _cut(old, start), _cut(new, start)


def _cut(text: str, start: int) -> str:
    stop = start + _MAX_SHOWN
    return ("..." if start else "") + text[start:stop] + ("..." if stop < len(text) else "")
