"""Fix bounds, sizes and patterns of a rewritten schema that llguidance misreads or refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from batchvlm.constraints.negate import Schema

_MAX_INTEGER = 9_223_372_036_854_774_784
"""The largest float that fits into 64 bits: llguidance reads bounds as floats."""
_MAX_EDGE = 1 << 40
"""Up to this value, llguidance distinguishes a whole number from its neighbouring floats."""
_LEAST = 1e-20
"""Used as the neighbour of 0: nobody writes numbers closer to 0."""
_EXCLUSIVE = (("exclusiveMinimum", "minimum", max, 1), ("exclusiveMaximum", "maximum", min, -1))
_KINDS = {
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
}


def settle_bounds(schema: Schema) -> None:
    """Change number bounds in place so that llguidance reads them correctly.

    For "above 0, up to 0.5" it also accepts 0, so an excluded whole number is replaced by its
    neighbour, which is included. 64-bit integers lose about a thousand values at the lower end.
    """
    for node in _nodes(schema):
        types = node.get("type")
        if {"integer"} == ({types} if isinstance(types, str) else set(types or ())) - {"null"}:
            if -(1 << 63) <= node.get("minimum", 0) < -_MAX_INTEGER:
                node["minimum"] = -_MAX_INTEGER
            continue
        for exclusive, inclusive, stricter, sign in _EXCLUSIVE:
            edge = node.get(exclusive)
            # Only bounds that face away from 0: below 2, the neighbour 1.99... would make 1.9 an
            # incomplete number.
            if edge is None or not 0 <= edge * sign < _MAX_EDGE or edge != int(edge):
                continue
            # llguidance ignores the last place of a float.
            near = edge + sign * (4 * math.ulp(edge) if edge else _LEAST)
            del node[exclusive]
            node[inclusive] = stricter(near, node.get(inclusive, near))


def leave_out_refused(schema: Schema, is_refused: Callable[[Schema], bool]) -> set[str]:
    """Remove each bound, size or pattern that llguidance refuses even alone.

    Args:
        schema: a rewritten schema; changed in place.
        is_refused: whether llguidance refuses a schema.

    Returns:
        The removed keywords.
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
    """Yield a schema and all its subschemas, without following references."""
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
