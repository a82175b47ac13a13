"""Rewrite the string keywords of a JSON schema, and regular expressions, for grammars."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from batchvlm.constraints.negate import NoComplementError, Schema, complement_pattern

if TYPE_CHECKING:
    from batchvlm.constraints.rewrite import Rewriter

_ENFORCED = frozenset(
    {
        *("date-time", "time", "date", "duration", "email", "hostname"),
        *("ipv4", "ipv6", "uuid", "uri"),
    }
)
"""Formats that llguidance supports."""
# llguidance accepts leap seconds, which validators refuse.
_LEAPING = ("date-time", "time")
_NO_LEAP = "^[^:]+:[0-9]{2}:[0-5]"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"
_URI_CHARS = r"(?:[A-Za-z0-9._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{2})"
_AS_PATTERNS = {
    "idn-email": r"^[^@\s]+@[^@\s]+$",
    "json-pointer": f"^{_POINTER}$",
    # Validators misread zeros after the first digit.
    "relative-json-pointer": rf"^[1-9]{{0,7}}[0-9](?:#|{_POINTER})$",
    # Without the rare parts: an IP literal as host, a user, a colon in a relative path.
    "uri-reference": rf"^(?:[A-Za-z][A-Za-z0-9+.-]*:)?(?://{_URI_CHARS}*(?::[0-9]{{1,5}})?)?"
    rf"(?:/?{_URI_CHARS}+(?:/{_URI_CHARS}*)*|/)?(?:\?(?:{_URI_CHARS}|[/?])*)?"
    rf"(?:#(?:{_URI_CHARS}|[/?])*)?$",
}
# Python's classes include the digits, letters and spaces of all scripts, llguidance's only ASCII. A
# narrower class is safe; its complement is not, nor is its use in a negated class.
_WHOLE = {"d": r"\p{Nd}", "w": r"\p{L}\p{N}_", "s": r"\p{White_Space}\x1c-\x1f"}
_COMPLEMENTS = {name.upper(): f"[^{members}]" for name, members in _WHOLE.items()}
WORDS = _COMPLEMENTS | {"w": f"[{_WHOLE['w']}]"}
"""Classes for answers that are not JSON, where llguidance's \\w includes marks that Python's does
not."""
_ENDS = {"A": "^", "Z": "$"}
_TIMES = re.compile(r"\{(?!\})([0-9]*)(,?)([0-9]*)\}")


def rewrite(
    rewriter: Rewriter, schema: Mapping[str, Any], own: dict[str, Any], parts: list[Schema]
) -> None:
    """Add the string keywords of `schema` to `own`, or to `parts` (schemas that also apply)."""
    for key in ("minLength", "maxLength"):
        if key in schema:
            own[key] = int(schema[key])
    if "pattern" in schema:
        _add_pattern(rewriter, schema["pattern"], own, parts)
    name = schema.get("format")
    if name in _ENFORCED:
        own["format"] = name
        if name in _LEAPING:
            parts.append({"pattern": _NO_LEAP})
    elif name in _AS_PATTERNS and name in rewriter.checked_formats:
        part = {"pattern": _AS_PATTERNS[name]}
        if "pattern" in own:
            parts.append(part)
        else:
            own.update(part)
    elif name in rewriter.checked_formats:
        rewriter.leave_out(f"format {name}")


def _add_pattern(
    rewriter: Rewriter, pattern: str, own: dict[str, Any], parts: list[Schema]
) -> None:
    ahead = re.fullmatch(r"\^\(\?!((?:[^()\\]|\\.)*)\)(.*)", pattern, re.DOTALL)
    if ahead:
        # "Does not start with some words", followed by the rest of the pattern.
        try:
            words, rest = ahead[1], ahead[2]
            is_whole = words.endswith("$")
            complement = complement_pattern(
                f"^(?:{words.removesuffix('$')}){'$' if is_whole else ''}"
            )
        except NoComplementError:
            rewriter.leave_out("pattern")
            return
        parts.append({"pattern": complement})
        pattern = f"^{rest}"
    translated = translate(pattern)
    if translated is None:
        rewriter.leave_out("pattern")
    else:
        own["pattern"] = translated


def translate(pattern: str, classes: Mapping[str, str] = _COMPLEMENTS) -> str | None:
    """Translate a Python pattern to llguidance's syntax; None if that cannot express it.

    Args:
        pattern: a pattern of `re`.
        classes: letter after a backslash -> the class in llguidance's syntax.
    """
    pieces: list[str] = []
    place, is_class, is_negated = 0, False, False
    while place < len(pattern):
        char = pattern[place]
        if char == "\\":
            following = pattern[place + 1 : place + 2]
            place += 2
            if is_class and is_negated and following in _WHOLE:
                pieces.append(_WHOLE[following])
            elif following in classes:
                pieces.append(classes[following])
            elif following in _ENDS and not is_class:
                pieces.append(_ENDS[following])
            elif following.isdigit() and following != "0":
                return None  # a back-reference
            elif following in ("b", "B") and not is_class:
                return None  # a word boundary
            elif following in ("<", ">"):
                pieces.append(following)  # with the backslash, a word boundary in llguidance
            else:
                pieces.append(f"\\{following}")
            continue
        if is_class:
            if char == "]":
                is_class = False
            elif char in "[&~":
                char = f"\\{char}"  # nested classes and operators in llguidance
            pieces.append(char)
            place += 1
            continue
        if char == "[":
            is_class = True
            pieces.append("[")
            place += 1
            is_negated = pattern[place : place + 1] == "^"
            if is_negated:
                pieces.append("^")
                place += 1
            if pattern[place : place + 1] == "]":
                pieces.append(r"\]")  # the first "]" is a literal
                place += 1
            continue
        if char == "{":
            times = _TIMES.match(pattern, place)
            pieces.append(f"{{{times[1] or 0}{times[2]}{times[3]}}}" if times else r"\{")
            place = times.end() if times else place + 1
            continue
        if pattern.startswith(("(?=", "(?!", "(?<=", "(?<!", "(?P=", "(?("), place):
            return None
        pieces.append(char)
        place += 1
    return "".join(pieces)
