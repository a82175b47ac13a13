"""The exact opposite of a JSON schema, as far as it can be said without `not`.

Grammars know no complement of a schema, but most of what people write under `not`, `if`, `oneOf` or
`dependencies` has one that is a schema again: a property that is forbidden, a number out of a
range, a text that is none of some words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

Schema = Any
"""A rewritten schema: what `rewrite.py` leaves, a bool or a dict."""

TYPES = ("object", "array", "string", "number", "boolean", "null")
_ASIDE = frozenset({"$schema", "$defs", "title", "description", "default", "examples", "$comment"})
_MAX_DEPTH = 24
_MAX_WORD_CHARS = 4096


class NoOppositeError(Exception):
    """The opposite of this schema cannot be said."""


class Opposite:
    """Finds opposites of rewritten schemas.

    Args:
        resolve: what a `$ref` stands for; None where it is not known (yet).
        is_inner: where the exact opposite cannot be said, say a part of it: what it takes is
            refused by the schema, but not all that is refused is taken.
    """

    def __init__(self, resolve: Callable[[str], Schema | None], *, is_inner: bool) -> None:
        self._resolve = resolve
        self._is_inner = is_inner
        self.is_exact = True
        """Whether all opposites so far were the whole."""

    def of(self, schema: Schema, depth: int = 0) -> Schema:
        """The schema that takes exactly the values that this one refuses.

        Raises:
            NoOppositeError: it cannot be said without `not`.
        """
        if isinstance(schema, bool):
            return not schema
        if depth > _MAX_DEPTH:
            raise NoOppositeError("nested too deeply")
        branches: list[Schema] = []
        for key, value in schema.items():
            if key in _ASIDE:
                continue
            try:
                branches += self._of_keyword(key, value, schema, depth + 1)
            except NoOppositeError:
                if not self._is_inner:
                    raise
                self.is_exact = False
        return any_of([branch for branch in branches if branch is not False])

    def _of_keyword(self, key: str, value: Any, schema: Schema, depth: int) -> list[Schema]:
        match key:
            case "type":
                return [_other_types([value] if isinstance(value, str) else value)]
            case "const":
                return _other_values([value])
            case "enum":
                return _other_values(value)
            case "required":
                return [{"type": "object", "properties": {name: False}} for name in value]
            case "properties":
                return [
                    {"type": "object", "properties": {name: opposite}, "required": [name]}
                    for name, part in value.items()
                    if (opposite := self.of(part, depth)) is not False
                ]
            case "minimum":
                return [{"type": "number", "exclusiveMaximum": value}]
            case "maximum":
                return [{"type": "number", "exclusiveMinimum": value}]
            case "exclusiveMinimum":
                return [{"type": "number", "maximum": value}]
            case "exclusiveMaximum":
                return [{"type": "number", "minimum": value}]
            case "minLength" | "minItems" | "minProperties":
                kind, other = _SIZES[key]
                return [{"type": kind, other: value - 1}] if value > 0 else []
            case "maxLength" | "maxItems" | "maxProperties":
                kind, other = _SIZES[key]
                return [{"type": kind, other: value + 1}]
            case "pattern":
                return [{"type": "string", "pattern": opposite_pattern(value)}]
            case "anyOf":
                return [all_of([self.of(part, depth) for part in value])]
            case "allOf":
                return [self.of(part, depth) for part in value]
            case "oneOf":
                none = all_of([self.of(part, depth) for part in value])
                return [none, *(all_of(pair) for pair in combinations(value, 2))]
            case "$ref":
                target = self._resolve(value)
                if target is None:
                    raise NoOppositeError("it refers to itself")
                return [self.of(target, depth)]
            case "additionalProperties" if value is True or value == {}:
                return []
            case "items" | "prefixItems" if schema.get("maxItems") == 0:
                return []
        raise NoOppositeError(f"the opposite of {key!r} is no schema")


def any_of(branches: Sequence[Schema]) -> Schema:
    """One of these holds."""
    if not branches:
        return False
    if any(branch is True or branch == {} for branch in branches):
        return True
    return branches[0] if len(branches) == 1 else {"anyOf": list(branches)}


def all_of(parts: Sequence[Schema]) -> Schema:
    """All of these hold."""
    parts = [part for part in parts if part is not True and part != {}]
    if any(part is False for part in parts):
        return False
    if not parts:
        return True
    return parts[0] if len(parts) == 1 else {"allOf": list(parts)}


_SIZES = {
    "minLength": ("string", "maxLength"),
    "maxLength": ("string", "minLength"),
    "minItems": ("array", "maxItems"),
    "maxItems": ("array", "minItems"),
    "minProperties": ("object", "maxProperties"),
    "maxProperties": ("object", "minProperties"),
}


def _other_types(types: Iterable[str]) -> Schema:
    named = set(types)
    if "integer" in named and "number" not in named:
        raise NoOppositeError("numbers that are no integers are no type")
    left = [kind for kind in TYPES if kind not in named]
    return {"type": left} if left else False


def _other_values(values: Sequence[Any]) -> list[Schema]:
    """What is none of some values, type by type."""
    texts = [v for v in values if isinstance(v, str)]
    bools = [v for v in values if isinstance(v, bool)]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    others = [v for v in values if isinstance(v, dict | list)]
    if any(others):
        raise NoOppositeError("objects and arrays have no opposite")
    branches: list[Schema] = []
    untouched = ["object" if {} not in others else "", "array" if [] not in others else ""]
    untouched += ["null" if None not in values else ""]
    if kinds := [kind for kind in untouched if kind]:
        branches.append({"type": kinds})
    if {} in others:
        branches.append({"type": "object", "minProperties": 1})
    if [] in others:
        branches.append({"type": "array", "minItems": 1})
    if left := [b for b in (True, False) if b not in bools]:
        branches.append({"enum": left})
    if texts:
        branches.append({"type": "string", "pattern": words_pattern(texts, is_opposite=True)})
    else:
        branches.append({"type": "string"})
    edges = sorted(set(numbers))
    if not all(math.isfinite(edge) for edge in edges):
        raise NoOppositeError("a number that is none")
    low: Any = None
    for edge in [*edges, None]:
        bounds = {"exclusiveMinimum": low, "exclusiveMaximum": edge}
        branches.append({"type": "number", **{k: v for k, v in bounds.items() if v is not None}})
        low = edge
    return branches


def words_pattern(words: Sequence[str], *, is_opposite: bool = False) -> str:
    """A pattern for exactly these words, or for every text that is none of them.

    Raises:
        NoOppositeError: they are too long for a pattern.
    """
    if not is_opposite:
        return f"^(?:{'|'.join(map(re.escape, words))})$"
    if sum(map(len, words)) > _MAX_WORD_CHARS:
        raise NoOppositeError("too many words")
    return f"^{_none_of(sorted(set(words)))}$"


def opposite_pattern(pattern: str) -> str:
    """A pattern for the texts in which this one finds nothing.

    Raises:
        NoOppositeError: it is more than the beginning, or the whole, of some plain words.
    """
    found = re.fullmatch(r"\^(?:\((?:\?:)?([^()]+)\)|([^()|]+?))(\$?)", pattern)
    if not found:
        raise NoOppositeError("patterns have no opposite")
    words = [_plain(word) for word in (found[1] or found[2]).split("|")]
    if found[3]:
        words += [f"{word}\n" for word in words]  # a `$` of Python's also stands before that
    if sum(map(len, words)) > _MAX_WORD_CHARS:
        raise NoOppositeError("too many words")
    return f"^{_none_of(sorted(set(words)), is_prefix=not found[3])}$"


def _plain(text: str) -> str:
    """What a pattern without any operator stands for."""
    plain = re.sub(r"\\([^A-Za-z0-9])", r"\1", text)
    if re.search(r"[.*+?\[\]{}^$|\\]", re.sub(r"\\[^A-Za-z0-9]", "", text)):
        raise NoOppositeError("patterns have no opposite")
    return plain


def _none_of(words: Sequence[str], *, is_prefix: bool = False) -> str:
    """What follows, so that the whole is none of the words (or begins with none)."""
    if is_prefix and "" in words:
        raise NoOppositeError("every text begins so")
    heads = sorted({word[0] for word in words if word})
    listed = "".join(f"\\x{{{ord(head):x}}}" for head in heads)
    anything = r"[\s\S]*"
    branches = [f"[^{listed}]{anything}" if heads else rf"[\s\S]{anything}"]
    for head in heads:
        tails = [word[1:] for word in words if word[:1] == head]
        if is_prefix and "" in tails:
            continue  # whatever follows, it begins with a word
        branches.append(f"\\x{{{ord(head):x}}}{_none_of(tails, is_prefix=is_prefix)}")
    may_end = "" if "" in words else "?"
    return f"(?:{'|'.join(branches)}){may_end}"
