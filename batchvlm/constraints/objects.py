"""Rewrite the object keywords of a JSON schema for grammars."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from batchvlm.constraints.negate import Schema, all_of, any_of, words_pattern
from batchvlm.constraints.strings import translate

if TYPE_CHECKING:
    from batchvlm.constraints.rewrite import Rewriter

_MAX_SUBSETS = 64
"""Subsets of the optional properties that are written out to count properties."""
_MAX_LEAST = 48
"""Most optional properties for which "at least one of them" is written out."""


def rewrite(
    rewriter: Rewriter,
    schema: Mapping[str, Any],
    own: dict[str, Any],
    parts: list[Schema],
    resolver: Any,
) -> None:
    """Add the object keywords of `schema` to `own`, or to `parts` (schemas that also apply)."""
    if "properties" in schema:
        own["properties"] = {
            name: rewriter.visit(part, resolver) for name, part in schema["properties"].items()
        }
    if isinstance(schema.get("required"), list):
        own["required"] = list(dict.fromkeys(schema["required"]))
    if schema.get("patternProperties"):
        _patterns(rewriter, schema["patternProperties"], own, resolver)
    if "additionalProperties" in schema:
        own["additionalProperties"] = rewriter.visit(schema["additionalProperties"], resolver)
    patterns = own.get("patternProperties", {})
    if own.get("properties") and len(patterns) == 1 and _takes_all(next(iter(patterns))):
        # The pattern applies to every undeclared name; declared ones are merged with it already.
        own["additionalProperties"] = own.pop("patternProperties").popitem()[1]
    if "propertyNames" in schema:
        _names(rewriter, schema["propertyNames"], own, resolver)
    if "unevaluatedProperties" in schema and "additionalProperties" not in own:
        _unevaluated(rewriter, schema, own, parts, resolver)
    _depend(rewriter, schema, parts, resolver)
    if "minProperties" in schema or "maxProperties" in schema:
        _count(rewriter, schema, own, parts)


def _patterns(
    rewriter: Rewriter, patterns: Mapping[str, Schema], own: dict[str, Any], resolver: Any
) -> None:
    by_pattern: dict[str, Schema] = {}
    for pattern, part in patterns.items():
        translated = translate(pattern)
        if translated is None:
            rewriter.leave_out("patternProperties")
        else:
            by_pattern[translated] = rewriter.visit(part, resolver)
    # A declared property whose name matches a pattern has to fit both schemas.
    properties = own.get("properties", {})
    for name in properties:
        for pattern in patterns:
            translated = translate(pattern)
            if translated in by_pattern and _finds(pattern, name):
                properties[name] = all_of([properties[name], by_pattern[translated]])
    own["patternProperties"] = by_pattern


def _takes_all(pattern: str) -> bool:
    """Whether a pattern matches every name of one line."""
    return re.fullmatch(r"\^?(\.\*\$?|\[[^\]^]+\]\*)?", pattern) is not None


def _finds(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _names(rewriter: Rewriter, names: Schema, own: dict[str, Any], resolver: Any) -> None:
    names = rewriter.target(rewriter.visit(names, resolver))
    if names is True:
        return
    if names is False:
        own["maxProperties"] = 0
        return
    rules = {k: v for k, v in names.items() if k not in ("type", "title", "description")}
    patterns: list[str] | None = None
    if "enum" in rules or "const" in rules:
        values = rules["enum"] if "enum" in rules else [rules["const"]]
        patterns = [words_pattern([v for v in values if isinstance(v, str)])]
    elif set(rules) <= {"minLength", "maxLength", "pattern"}:
        low, high = rules.get("minLength", 0), rules.get("maxLength", "")
        patterns = [rules["pattern"]] if "pattern" in rules else []
        if low or high != "":
            patterns.append(rf"^[\s\S]{{{low},{high}}}$")
    elif set(rules) == {"anyOf"} and all(
        isinstance(b, dict) and set(b) <= {"type", "pattern"} for b in rules["anyOf"]
    ):
        # The complement of a list of words is one of these.
        patterns = [b["pattern"] for b in rules["anyOf"] if "pattern" in b][:1]
    rest = own.get("additionalProperties", True)
    if patterns is None or len(patterns) > 1 or "patternProperties" in own:
        rewriter.leave_out("propertyNames")
        return
    if not patterns:
        return
    properties = own.get("properties", {})
    for name in properties:
        if not _finds(patterns[0], name):
            properties[name] = False
    own["patternProperties"] = {patterns[0]: rest}
    own["additionalProperties"] = False
    if properties:
        # A declared name that matches the pattern would be constrained twice.
        del own["patternProperties"][patterns[0]]
        if rest is not False:
            rewriter.leave_out("propertyNames")
            own["additionalProperties"] = rest


def _unevaluated(
    rewriter: Rewriter,
    schema: Mapping[str, Any],
    own: dict[str, Any],
    parts: Sequence[Schema],
    resolver: Any,
) -> None:
    rest = schema["unevaluatedProperties"]
    if rest is True or rest == {}:
        return
    known: dict[str, Schema] = {}
    patterns: dict[str, Schema] = {}
    is_plain = not any(k in schema for k in ("anyOf", "oneOf", "if", "dependentSchemas"))
    below = [rewriter.visit(part, resolver) for part in schema.get("allOf", [])]
    for part in _flat([*parts, *below], rewriter):
        if part is None:
            is_plain = False
            break
        known.update(dict.fromkeys(part.get("properties", {}), True))
        patterns.update(dict.fromkeys(part.get("patternProperties", {}), True))
        is_plain &= part.get("additionalProperties") in (None, True)
    if not is_plain:
        rewriter.leave_out("unevaluatedProperties")
        return
    own["properties"] = known | own.get("properties", {})
    if patterns:
        own["patternProperties"] = patterns | own.get("patternProperties", {})
    own["additionalProperties"] = rewriter.visit(rest, resolver)


def _flat(parts: Sequence[Schema], rewriter: Rewriter) -> Iterator[dict[str, Any] | None]:
    """Yield the schemas that always apply, and None if others depend on the value."""
    for part in parts:
        if isinstance(part, bool):
            continue
        if "$ref" in part:
            target = rewriter.resolve(part["$ref"])
            if target is None:
                yield None
                return
            yield from _flat([target], rewriter)
        if any(key in part for key in ("anyOf", "oneOf")):
            yield None
        yield from _flat(part.get("allOf", []), rewriter)
        yield part


def _depend(
    rewriter: Rewriter, schema: Mapping[str, Any], parts: list[Schema], resolver: Any
) -> None:
    both = schema.get("dependencies", {})
    names = {k: v for k, v in both.items() if isinstance(v, list)}
    names |= schema.get("dependentRequired", {})
    schemas = {k: v for k, v in both.items() if not isinstance(v, list)}
    schemas |= schema.get("dependentSchemas", {})
    for name, needed in names.items():
        missing = {"properties": {name: False}}
        parts.append(any_of([missing, {"required": [name, *needed]}]))
    for name, part in schemas.items():
        missing = {"properties": {name: False}}
        present = all_of([{"required": [name]}, rewriter.visit(part, resolver)])
        parts.append(any_of([b for b in (missing, present) if b is not False]))


def _count(
    rewriter: Rewriter, schema: Mapping[str, Any], own: dict[str, Any], parts: list[Schema]
) -> None:
    """Rewrite `minProperties` and `maxProperties`.

    Grammars support them if no declared property is optional; otherwise sets of properties are
    written out, up to limits.
    """
    low = int(schema.get("minProperties", 0))
    high = int(schema["maxProperties"]) if "maxProperties" in schema else None
    properties = own.get("properties", {})
    required = own.get("required", [])
    optional = [n for n, part in properties.items() if part is not False and n not in required]
    is_open = own.get("additionalProperties", True) is not False or bool(
        own.get("patternProperties")
    )
    low = low if low > len(required) else 0
    if high is not None and not is_open and len(required) + len(optional) <= high:
        high = None
    if not low and high is None:
        return
    bounds = {"minProperties": low or None, "maxProperties": high}
    bounds = {key: value for key, value in bounds.items() if value is not None}
    if not optional:
        own |= bounds
        return
    others = {"type": _not_objects(own)}
    if 2 ** len(optional) <= _MAX_SUBSETS:
        branches = []
        for num in range(len(optional) + 1):
            num_known = num + len(required)
            if (high is not None and num_known > high) or (not is_open and num_known < low):
                continue
            for present in combinations(optional, num):
                absent = {name: False for name in optional if name not in present}
                branch: dict[str, Any] = {"type": "object", "properties": absent}
                if present:
                    branch["required"] = list(present)
                if is_open:
                    branch |= bounds
                branches.append(branch)
        rewriter.count(len(branches) * len(optional))
    elif high is None and low == len(required) + 1 and len(optional) <= _MAX_LEAST:
        branches = [{"type": "object", "required": [name]} for name in optional]
        if is_open:
            absent = dict.fromkeys(optional, False)
            branches.append({"type": "object", "properties": absent, **bounds})
        rewriter.count(len(optional))
    else:
        rewriter.leave_out("minProperties" if low else "maxProperties")
        return
    parts.append(any_of([*([others] if others["type"] else []), *branches]))


def _not_objects(own: Mapping[str, Any]) -> list[str]:
    named = own.get("type", ["array", "string", "number", "boolean", "null"])
    return [kind for kind in ([named] if isinstance(named, str) else named) if kind != "object"]
