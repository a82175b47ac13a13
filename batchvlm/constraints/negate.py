"""The complement of a JSON schema, where it can be expressed without `not`.

Grammars do not support complements, but most schemas that people write under `not`, `if`, `oneOf`
or `dependencies` have a complement that is a schema again: a forbidden property, a number outside a
range, a text other than some words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

Schema = Any
"""A bool or a dict; mostly a schema that `rewrite.py` has rewritten."""

TYPES = ("object", "array", "string", "number", "boolean", "null")
_ASIDE = frozenset({"$schema", "$defs", "title", "description", "default", "examples", "$comment"})
_MAX_DEPTH = 24
_MAX_WORD_CHARS = 4096


class NoComplementError(Exception):
    """The complement of a schema cannot be expressed without `not`."""


class Complement:
    """Computes complements of rewritten schemas.

    Args:
        resolve: returns the target of a `$ref`; None if it is not known (yet).
        is_inner: if the exact complement cannot be expressed, return a subset of it: the schema
            refuses every value in the subset, but the subset lacks some values it refuses.
    """

    def __init__(self, resolve: Callable[[str], Schema | None], *, is_inner: bool) -> None:
        self._resolve = resolve
        self._is_inner = is_inner
        self.is_exact = True
        """Whether all complements so far were exact."""

    def of(self, schema: Schema, depth: int = 0) -> Schema:
        """Return the schema that accepts exactly the values that this one refuses.

        Raises:
            NoComplementError: it cannot be expressed without `not`, and not `is_inner`.
        """
        if isinstance(schema, bool):
            return not schema
        if depth > _MAX_DEPTH:
            raise NoComplementError("nested too deeply")
        branches: list[Schema] = []
        for key, value in schema.items():
            if key in _ASIDE:
                continue
            try:
                branches += self._of_keyword(key, value, schema, depth + 1)
            except NoComplementError:
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
                    {"type": "object", "properties": {name: complement}, "required": [name]}
                    for name, part in value.items()
                    if (complement := self.of(part, depth)) is not False
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
                return [{"type": "string", "pattern": complement_pattern(value)}]
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
                    raise NoComplementError("it refers to itself")
                return [self.of(target, depth)]
            case "additionalProperties" if value is True or value == {}:
                return []
            case "items" | "prefixItems" if schema.get("maxItems") == 0:
                return []
        raise NoComplementError(f"the complement of {key!r} is not a schema")


def any_of(branches: Sequence[Schema]) -> Schema:
    """Return a schema for values that fit at least one of these."""
    if not branches:
        return False
    if any(branch is True or branch == {} for branch in branches):
        return True
    return branches[0] if len(branches) == 1 else {"anyOf": list(branches)}


def all_of(parts: Sequence[Schema]) -> Schema:
    """Return a schema for values that fit all of these."""
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
        raise NoComplementError("numbers that are no integers are no type")
    left = [kind for kind in TYPES if kind not in named]
    return {"type": left} if left else False


def _other_values(values: Sequence[Any]) -> list[Schema]:
    """Return schemas for all other values, one or more for each type."""
    texts = [v for v in values if isinstance(v, str)]
    bools = [v for v in values if isinstance(v, bool)]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    others = [v for v in values if isinstance(v, dict | list)]
    if any(others):
        raise NoComplementError("objects and arrays have no complement")
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
        branches.append({"type": "string", "pattern": words_pattern(texts, is_complement=True)})
    else:
        branches.append({"type": "string"})
    edges = sorted(set(numbers))
    if not all(math.isfinite(edge) for edge in edges):
        raise NoComplementError("a number that is none")
    low: Any = None
    for edge in [*edges, None]:
        bounds = {"exclusiveMinimum": low, "exclusiveMaximum": edge}
        branches.append({"type": "number", **{k: v for k, v in bounds.items() if v is not None}})
        low = edge
    return branches


def words_pattern(words: Sequence[str], *, is_complement: bool = False) -> str:
    """Return a pattern for exactly these words, or with `is_complement` for every other text.

    Raises:
        NoComplementError: the words are too long for the pattern of their complement.
    """
    if not is_complement:
        return f"^(?:{'|'.join(map(re.escape, words))})$"
    if sum(map(len, words)) > _MAX_WORD_CHARS:
        raise NoComplementError("too many words")
    return f"^{_none_of(sorted(set(words)))}$"


def complement_pattern(pattern: str) -> str:
    """Return a pattern for the texts in which this one finds nothing.

    Raises:
        NoComplementError: the pattern is not a list of plain words, anchored at the start or at
            both ends.
    """
    found = re.fullmatch(r"\^(?:\((?:\?:)?([^()]+)\)|([^()|]+?))(\$?)", pattern)
    if not found:
        raise NoComplementError("patterns have no complement")
    words = [_plain(word) for word in (found[1] or found[2]).split("|")]
    if found[3]:
        words += [f"{word}\n" for word in words]  # Python's `$` also matches before a final newline
    if sum(map(len, words)) > _MAX_WORD_CHARS:
        raise NoComplementError("too many words")
    return f"^{_none_of(sorted(set(words)), is_prefix=not found[3])}$"


def _plain(text: str) -> str:
    """Return the text that a pattern without operators matches.

    Raises:
        NoComplementError: the pattern has an operator.
    """
    plain = re.sub(r"\\([^A-Za-z0-9])", r"\1", text)
    if re.search(r"[.*+?\[\]{}^$|\\]", re.sub(r"\\[^A-Za-z0-9]", "", text)):
        raise NoComplementError("patterns have no complement")
    return plain


def _none_of(words: Sequence[str], *, is_prefix: bool = False) -> str:
    """Return a pattern for texts other than the words, or (`is_prefix`) that start with none."""
    if is_prefix and "" in words:
        raise NoComplementError("every text begins so")
    heads = sorted({word[0] for word in words if word})
    listed = "".join(f"\\x{{{ord(head):x}}}" for head in heads)
    anything = r"[\s\S]*"
    branches = [f"[^{listed}]{anything}" if heads else rf"[\s\S]{anything}"]
    for head in heads:
        tails = [word[1:] for word in words if word[:1] == head]
        if is_prefix and "" in tails:
            continue  # any continuation starts with a word
        branches.append(f"\\x{{{ord(head):x}}}{_none_of(tails, is_prefix=is_prefix)}")
    may_end = "" if "" in words else "?"
    return f"(?:{'|'.join(branches)}){may_end}"
