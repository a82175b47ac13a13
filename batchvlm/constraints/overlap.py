"""A conservative check whether two schemas are disjoint: no value fits both."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchvlm.constraints.negate import Schema

Resolve = Callable[[str], Schema | None]

_MAX_DEPTH = 12
_TYPE_NAMES = {
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}


@dataclass(slots=True)
class View:
    """An object schema merged with its references and `allOf`."""

    properties: dict[str, Schema] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    is_closed: bool = False
    """Whether undeclared properties are forbidden."""
    is_plain: bool = True
    """Whether the view, with `type: object`, is the whole schema."""


_VIEWED = frozenset(
    {"type", "properties", "required", "additionalProperties", "allOf", "$ref", "title"}
    | {"description"}
)


def view(schema: Schema, resolve: Resolve, depth: int = 0) -> View | None:
    """Return the view of a rewritten schema; None if it cannot be determined."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return None
    seen = View(is_plain=set(schema) <= _VIEWED)
    parts = [schema]
    if "$ref" in schema:
        target = resolve(schema["$ref"])
        below = view(target, resolve, depth + 1) if target is not None else None
        if below is None:
            return None
        _merge_into(seen, below)
    for part in schema.get("allOf", []):
        below = view(part, resolve, depth + 1)
        if below is None:
            seen.is_plain = False
        else:
            _merge_into(seen, below)
    for part in parts:
        own = View(
            properties=dict(part.get("properties", {})),
            required=set(part.get("required", [])),
            is_closed=part.get("additionalProperties") is False
            and not part.get("patternProperties"),
            is_plain=part.get("additionalProperties", True) in (True, False),
        )
        _merge_into(seen, own)
    return seen


def _merge_into(seen: View, other: View) -> None:
    for name, part in other.properties.items():
        mine = seen.properties.get(name, True)
        if mine is True or mine == part:
            seen.properties[name] = part
        elif part is not True:
            seen.properties[name] = {"allOf": [mine, part]}
    seen.required |= other.required
    seen.is_closed |= other.is_closed
    seen.is_plain &= other.is_plain


def are_disjoint(
    one: Schema, other: Schema, own: Mapping[str, Any], resolve: Resolve, depth: int = 0
) -> bool:
    """Whether it is certain that no value fits both; False if it is unknown.

    Args:
        one, other: rewritten schemas.
        own: keywords that apply to both of them.
        resolve: returns the target of a `$ref`.
    """
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict) or depth > _MAX_DEPTH:
        return False
    for part, against in ((one, other), (other, one)):
        branches = part.get("anyOf", [])
        if 0 < len(branches) <= 16 and all(
            are_disjoint(branch, against, {}, resolve, depth + 1) for branch in branches
        ):
            return True
        if "allOf" in part and any(
            are_disjoint(p, against, {}, resolve, depth + 1) for p in part["allOf"]
        ):
            return True
    types, others = types_of(one, resolve), types_of(other, resolve)
    if types is not None and others is not None and not types & others:
        return True
    values, against_values = _values(one, resolve), _values(other, resolve)
    if values is not None and against_values is not None:
        return not values & against_values
    common = _intersect(_intersect(types, others), types_of(dict(own), resolve))
    if common != {"object"}:
        return False
    seen, against_seen = view(one, resolve), view(other, resolve)
    if seen is None or against_seen is None:
        return False
    beside = set(own.get("required", []))
    for mine, its in ((seen, against_seen), (against_seen, seen)):
        for name in mine.required | beside:
            if name in its.properties:
                part = its.properties[name]
                if are_disjoint(mine.properties.get(name, True), part, {}, resolve, depth + 1):
                    return True
            elif its.is_closed:
                return True
    return False


def _intersect(one: set[str] | None, other: set[str] | None) -> set[str] | None:
    if one is None or other is None:
        return one if other is None else other
    return one & other


def _values(schema: Schema, resolve: Resolve) -> set[str] | None:
    """Return the values of `enum` or `const` as text; None if the schema has neither."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict):
            return None
        if "const" in schema:
            return {_text(schema["const"])}
        if "enum" in schema:
            return {_text(value) for value in schema["enum"]}
        if "$ref" not in schema:
            return None
        schema = resolve(schema["$ref"])
    return None


def _text(value: Any) -> str:
    # 1 and 1.0 are the same number in JSON.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def types_of(schema: Schema, resolve: Resolve, depth: int = 0) -> set[str] | None:
    """Return the types that a rewritten schema allows, `integer` as `number`; None for any."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return None
    known: set[str] | None = None
    if "type" in schema:
        named = schema["type"]
        known = {named} if isinstance(named, str) else set(named)
        known = {"number" if kind == "integer" else kind for kind in known}
    if "$ref" in schema and (target := resolve(schema["$ref"])) is not None:
        known = _intersect(known, types_of(target, resolve, depth + 1))
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        known = _intersect(known, {_TYPE_NAMES[type(value)] for value in values})
    for part in schema.get("allOf", []):
        known = _intersect(known, types_of(part, resolve, depth + 1))
    for key in ("anyOf", "oneOf"):
        branches = [types_of(part, resolve, depth + 1) for part in schema.get(key, [])]
        if branches and all(types is not None for types in branches):
            known = _intersect(known, set().union(*(types for types in branches if types)))
    return known
