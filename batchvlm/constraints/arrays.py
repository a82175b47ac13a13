"""Rewrite the array keywords of a JSON schema for grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import permutations
from typing import TYPE_CHECKING, Any

from batchvlm.constraints.negate import Schema, any_of

if TYPE_CHECKING:
    from batchvlm.constraints.rewrite import Rewriter

_MAX_PLACES = 8
"""Positions that are tried for the item that `contains` requires."""
_MAX_ORDERS = 80
"""Arrays of distinct values that are written out for `uniqueItems`."""


def rewrite(
    rewriter: Rewriter,
    schema: Mapping[str, Any],
    own: dict[str, Any],
    parts: list[Schema],
    resolver: Any,
) -> None:
    """Add the array keywords of `schema` to `own`, or to `parts` (schemas that also apply)."""
    first, rest = schema.get("prefixItems"), schema.get("items")
    if isinstance(rest, list):  # up to 2019-09
        first, rest = rest, schema.get("additionalItems")
    if first is not None:
        own["prefixItems"] = [rewriter.visit(item, resolver) for item in first]
    if rest is not None:
        own["items"] = rewriter.visit(rest, resolver)
    for key in ("minItems", "maxItems"):
        if key in schema:
            own[key] = int(schema[key])
    if schema.get("unevaluatedItems") is False and "items" not in own:
        if any(key in schema for key in ("allOf", "anyOf", "oneOf", "if", "$ref", "contains")):
            rewriter.leave_out("unevaluatedItems")
        else:
            own["items"] = False
    elif "unevaluatedItems" in schema and "items" not in own:
        rewriter.leave_out("unevaluatedItems")
    if "contains" in schema:
        _contain(rewriter, schema, own, parts, resolver)
    if schema.get("uniqueItems") is True:
        _unique(rewriter, own, parts)


def _contain(
    rewriter: Rewriter,
    schema: Mapping[str, Any],
    own: dict[str, Any],
    parts: list[Schema],
    resolver: Any,
) -> None:
    wanted = rewriter.visit(schema["contains"], resolver)
    least, most = schema.get("minContains", 1), schema.get("maxContains")
    if most is not None:
        rewriter.leave_out("maxContains")
    if least == 0:
        return
    items = own.get("items", True)
    if wanted is True or (_is_same(items, wanted) and "prefixItems" not in own):
        own["minItems"] = max(own.get("minItems", 0), int(least))
        return
    if least > 1:
        rewriter.leave_out("minContains")
    num_places = min(own.get("maxItems", _MAX_PLACES + 1), _MAX_PLACES)
    if own.get("maxItems", _MAX_PLACES + 1) > num_places:
        rewriter.leave_out("contains")  # the item may also be at a later position
    places = [
        {
            "type": "array",
            "prefixItems": [*(True for _ in range(place)), wanted],
            "minItems": place + 1,
        }
        for place in range(num_places)
    ]
    rewriter.count(num_places**2)
    parts.append(any_of([*_no_arrays(own), *places]))


def _unique(rewriter: Rewriter, own: dict[str, Any], parts: list[Schema]) -> None:
    """Rewrite `uniqueItems`: exact for at most one item and for items with few values."""
    most = own.get("maxItems")
    if most is not None and most <= 1:
        return
    items = own.get("items", True)
    if items is False:
        most = len(own.get("prefixItems", []))
        if most <= 1:
            return
    each = rewriter.target(items)
    values = each.get("enum") if isinstance(each, dict) else None
    if values is not None and "prefixItems" not in own:
        lengths = range(own.get("minItems", 0), min(len(values), most or len(values)) + 1)
        num_orders = sum(_num_orders(len(values), length) for length in lengths)
        if num_orders <= _MAX_ORDERS:
            rewriter.count(num_orders * max(1, len(values)))
            orders = [list(p) for length in lengths for p in permutations(values, length)]
            parts.append(any_of([*_no_arrays(own), *({"const": order} for order in orders)]))
            return
        own["maxItems"] = min(len(values), most or len(values))
    rewriter.leave_out("uniqueItems")


def _num_orders(num: int, length: int) -> int:
    orders = 1
    for i in range(length):
        orders *= num - i
        if orders > _MAX_ORDERS:
            break
    return orders


def _no_arrays(own: Mapping[str, Any]) -> list[Schema]:
    """Return a schema for the types other than array that `own` allows; [] if there is none."""
    named = own.get("type")
    if named is None:
        return [{"type": ["object", "string", "number", "boolean", "null"]}]
    left = [kind for kind in ([named] if isinstance(named, str) else named) if kind != "array"]
    return [{"type": left}] if left else []


def _is_same(one: Schema, other: Schema) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
