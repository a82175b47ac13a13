"""Bounds, sizes and patterns of a rewritten schema that the compiler misreads or refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from batchvlm.constraints.negate import Schema

_MAX_INTEGER = 9_223_372_036_854_774_784
"""The largest float within 64 bits: the compiler reads bounds as floats."""
_MAX_EDGE = 1 << 40
"""Up to here a whole number has neighbours that the compiler tells from it."""
_LEAST = 1e-20
"""What is next to 0: a number nearer to it is none that anybody writes."""
_EXCLUSIVE = (("exclusiveMinimum", "minimum", max, 1), ("exclusiveMaximum", "maximum", min, -1))
_KINDS = {
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
}


def settle_bounds(schema: Schema) -> None:
    """Write bounds of numbers as the compiler reads them right.

    Above 0 and up to 0.5, say, it takes 0 in: a whole number that is excluded becomes its
    neighbour, which is included. Integers of 64 bits lose the last thousand at the lower end.
    """
    for node in _nodes(schema):
        types = node.get("type")
        if {"integer"} == ({types} if isinstance(types, str) else set(types or ())) - {"null"}:
            if -(1 << 63) <= node.get("minimum", 0) < -_MAX_INTEGER:
                node["minimum"] = -_MAX_INTEGER
            continue
        for exclusive, inclusive, stricter, sign in _EXCLUSIVE:
            edge = node.get(exclusive)
            # Away from 0 alone: below 2, its neighbour would make 1.9 a mere beginning.
            if edge is None or not 0 <= edge * sign < _MAX_EDGE or edge != int(edge):
                continue
            # It reads floats to the last place but one.
            near = edge + sign * (4 * math.ulp(edge) if edge else _LEAST)
            del node[exclusive]
            node[inclusive] = stricter(near, node.get(inclusive, near))


def leave_out_refused(schema: Schema, is_refused: Callable[[Schema], bool]) -> set[str]:
    """Take out each bound, size or pattern that the compiler refuses even alone.

    Args:
        schema: rewritten; changed in place.
        is_refused: whether the compiler refuses a schema.

    Returns:
        The keywords that were taken out.
    """
    left_out: set[str] = set()
    for node in _nodes(schema):
        for kind, keys in _KINDS.items():
            named = "integer" if kind == "number" and node.get("type") == "integer" else kind
            for key in node.keys() & keys:
                if is_refused({"type": named, key: node[key]}):
                    del node[key]
                    left_out.add(key)
    return left_out


def _nodes(schema: Schema) -> Iterator[dict[str, Any]]:
    """A schema and all that lie within it, without following references."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if not isinstance(node, dict):
            continue
        yield node
        for key in ("allOf", "anyOf", "oneOf", "prefixItems"):
            stack += node.get(key, [])
        for key in ("properties", "patternProperties", "$defs"):
            stack += node.get(key, {}).values()
        stack += [node[key] for key in ("items", "additionalProperties") if key in node]
