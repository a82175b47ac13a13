"""Expand references that stand beside other keywords.

llguidance cannot merge a definition with other keywords while it is still compiling that
definition. So the target of a reference is merged here with the keywords beside it. Each such place
becomes a definition of its own, which recursive schemas can refer to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator

from batchvlm.constraints.negate import Schema

_MAX_PLACES = 3_000
_MAX_BRANCHES = 64
_CHOICES = ("anyOf", "oneOf")
_NAMES = ("title", "description")
_OBJECT = ("properties", "patternProperties", "additionalProperties")


class MergeError(ValueError):
    """A definition consists of itself, or expanding the schema exceeds a limit."""


def open_references(schema: Schema) -> Schema:
    """Return the rewritten schema without `$ref` beside, or within, keywords that are combined.

    Raises:
        MergeError: a definition consists of itself, or the expanded schema is too large.
    """
    return _Opener(schema).run()


class _Parts:
    """Schemas that all apply at one place."""

    def __init__(self, parts: Sequence[Schema]) -> None:
        flat: dict[object, Schema] = {}
        for part in parts:
            below = part.parts if isinstance(part, _Parts) else [part]
            for one in below:
                key = one["$ref"] if _is_reference(one) else id(one)
                flat.setdefault(key, one)
        self.parts: list[Schema] = list(flat.values())
        self.key = frozenset(flat)


class _Opener:
    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = {key: value for key, value in schema.items() if key != "$defs"}
        self._definitions = dict(schema.get("$defs", {}))
        self._opened: dict[str, Schema] = {}
        self._places: dict[frozenset[object], str] = {}
        self._kept: list[Any] = []  # keeps objects alive, so that their ids are not reused

    def run(self) -> Schema:
        root = self._visit(self._root)
        done: dict[str, Schema] = {}
        todo = _names_in(root)
        while todo:
            name = todo.pop()
            if name in done:
                continue
            if name not in self._opened:
                self._opened[name] = self._visit(self._definitions[name])
            done[name] = self._opened[name]
            todo |= _names_in(done[name]) - done.keys()
        root, done = _without_false(root, done)
        return {**root, "$defs": done} if done else root

    def _visit(self, schema: Schema) -> Schema:
        """Replace a schema that combines parts by a reference to their merged definition."""
        if isinstance(schema, _Parts):
            combined = schema
            if len(combined.parts) == 1:
                return self._visit(combined.parts[0])
        elif not isinstance(schema, dict) or _is_reference(schema):
            return schema
        elif not _is_combined(schema):
            return self._below(schema)
        else:
            combined = _Parts([schema])
        name = self._places.get(combined.key)
        if name is None:
            if len(self._places) >= _MAX_PLACES:
                raise MergeError("too many references beside other keywords")
            name = self._places[combined.key] = f"m{len(self._places)}"
            self._kept.append(combined)
            self._opened[name] = self._below(self._combine(combined.parts, ()))
        return {"$ref": f"#/$defs/{name}"}

    def _combine(self, parts: Sequence[Schema], under: tuple[str, ...]) -> Schema:
        """Merge parts that all apply into one schema without a reference at its top level."""
        plain: list[dict[str, Any]] = []
        choices: list[tuple[str, list[Schema]]] = []
        todo = [(part, under) for part in reversed(parts)]
        while todo:
            part, names = todo.pop()
            if part is False:
                return False
            if not isinstance(part, dict):
                continue
            own = {k: v for k, v in part.items() if k not in ("$ref", "allOf", *_CHOICES)}
            if own:
                plain.append(own)
            for key in _CHOICES:
                if key in part and all(part[key] is not branches for _, branches in choices):
                    choices.append((key, part[key]))
            below = list(part.get("allOf", []))
            if "$ref" in part:
                name = part["$ref"].rpartition("/")[2]
                if name in names:
                    raise MergeError("a definition consists of itself")
                todo.append((self._definitions[name], (*names, name)))
            todo += [(inner, names) for inner in reversed(below)]
        base: Schema = {}
        for one in plain:
            base = _merge(base, one)
            if base is False:
                return False
        if not choices:
            return base
        if len(choices) > 1 and any(key == "oneOf" for key, _ in choices):
            rest = [
                {key: [self._combine([branch], under) for branch in branches]}
                for key, branches in choices
            ]
            return {**base, "allOf": [*base.get("allOf", []), *rest]}
        key = choices[0][0]
        found: list[Schema] = [base]
        for _, branches in choices:
            if len(found) * len(branches) > _MAX_BRANCHES:
                raise MergeError("too many alternatives")
            found = [
                combined
                for one in found
                for branch in branches
                if (combined := self._combine([one, branch], under)) is not False
            ]
        return {key: found} if found else False

    def _below(self, schema: Schema) -> Schema:
        """Visit the subschemas below the alternatives and parts of this place."""
        if not isinstance(schema, dict):
            return schema
        seen = dict(schema)
        is_alone = not seen.keys() - {*_NAMES, *_CHOICES}
        for key in ("allOf", *_CHOICES):
            if key in seen:
                visit = self._visit if is_alone else self._below
                seen[key] = [visit(part) for part in seen[key]]
        for key in ("properties", "patternProperties"):
            if key in seen:
                seen[key] = {name: self._visit(part) for name, part in seen[key].items()}
        for key in ("items", "additionalProperties"):
            if key in seen:
                seen[key] = self._visit(seen[key])
        if "prefixItems" in seen:
            seen["prefixItems"] = [self._visit(part) for part in seen["prefixItems"]]
        return seen


def _merge(one: dict[str, Any], other: dict[str, Any]) -> Schema:
    """Merge two schemas without references or alternatives; False if no value fits both."""
    if not one or not other:
        return one or other
    one, other = dict(one), dict(other)
    merged: dict[str, Any] = {}
    apart: dict[str, Any] = {}
    objects = [{key: part.pop(key) for key in _OBJECT if key in part} for part in (one, other)]
    if (properties := _merge_properties(*objects)) is not None:
        merged |= properties
    else:
        merged |= objects[0]
        apart |= objects[1]
    places = range(max(len(part.get("prefixItems", [])) for part in (one, other)))
    prefix = [_conjunction(_item_schema(i, one), _item_schema(i, other)) for i in places]
    if prefix:
        merged["prefixItems"] = prefix
    rest = _conjunction(one.pop("items", True), other.pop("items", True))
    if rest is not True:
        merged["items"] = rest
    for part in (one, other):
        part.pop("prefixItems", None)
    if "enum" in one and "enum" in other:
        known = Draft202012Validator({"enum": other.pop("enum")})
        values = [value for value in one.pop("enum") if known.is_valid(value)]
        if not values:
            return False
        merged["enum"] = values
    required = [*one.pop("required", []), *other.pop("required", [])]
    if required:
        merged["required"] = list(dict.fromkeys(required))
    for name in _NAMES:
        names_of = [part.pop(name) for part in (one, other) if name in part]
        if names_of:
            merged[name] = names_of[0]
    both = one.keys() & other.keys()
    same = {key for key in both if one[key] == other[key]}
    left = {key: other.pop(key) for key in both}
    merged |= one | other
    differ = apart | {key: value for key, value in left.items() if key not in same}
    if differ:
        merged["allOf"] = [*merged.get("allOf", []), differ]
    return merged


def _merge_properties(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Merge keywords on the properties of objects; None if one schema has no equal of both.

    `additionalProperties` depends on the other two in its own schema, and which names a pattern
    matches is not known here.
    """
    if not one or not other:
        return one or other
    has_patterns = "patternProperties" in one or "patternProperties" in other
    has_rest = "additionalProperties" in one or "additionalProperties" in other
    is_for_all = any(part.keys() == {"additionalProperties"} for part in (one, other))
    if has_patterns and has_rest and not is_for_all:
        return None
    merged: dict[str, Any] = {}
    for key in ("properties", "patternProperties"):
        names = [*one.get(key, {}), *other.get(key, {})]
        if names:
            merged[key] = {
                n: _conjunction(_property_schema(key, n, one), _property_schema(key, n, other))
                for n in names
            }
    rest = _conjunction(
        one.get("additionalProperties", True), other.get("additionalProperties", True)
    )
    return merged if rest is True else {**merged, "additionalProperties": rest}


def _without_false(
    root: Schema, definitions: dict[str, Schema]
) -> tuple[Schema, dict[str, Schema]]:
    """Replace references to `false` schemas by `false`, because llguidance refuses them."""
    empty: set[str] = set()
    while True:
        found = {name for name, schema in definitions.items() if schema is False} - empty
        if not found:
            return root, {n: s for n, s in definitions.items() if s is not False}
        empty |= found
        root = _put_false(root, empty)
        definitions = {name: _put_false(schema, empty) for name, schema in definitions.items()}


def _put_false(schema: Schema, empty: set[str]) -> Schema:
    if isinstance(schema, list):
        return [_put_false(item, empty) for item in schema]
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.rpartition("/")[2] in empty:
        return False
    keywords = {
        key: part if key in ("enum", "const") else _put_false(part, empty)
        for key, part in schema.items()
    }
    for key in _CHOICES:
        if isinstance(keywords.get(key), list):
            keywords[key] = [part for part in keywords[key] if part is not False]
            if not keywords[key]:
                return False
    if isinstance(keywords.get("allOf"), list) and False in keywords["allOf"]:
        return False
    return keywords


def _property_schema(key: str, name: str, schema: dict[str, Any]) -> Schema:
    return schema.get(key, {}).get(name, schema.get("additionalProperties", True))


def _item_schema(place: int, schema: dict[str, Any]) -> Schema:
    prefix = schema.get("prefixItems", [])
    return prefix[place] if place < len(prefix) else schema.get("items", True)


def _conjunction(one: Schema, other: Schema) -> Schema:
    if one is False or other is False:
        return False
    if one is True or one == {} or one is other:
        return other
    if other is True or other == {}:
        return one
    return _Parts([one, other])


def _is_reference(schema: Schema) -> bool:
    return isinstance(schema, dict) and "$ref" in schema and len(schema) == 1


def _names_in(schema: Schema) -> set[str]:
    """Return the names of the definitions that a schema refers to."""
    names: set[str] = set()
    stack = [schema]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("$ref"), str):
                names.add(item["$ref"].rpartition("/")[2])
            stack += [v for k, v in item.items() if k not in ("enum", "const")]
        elif isinstance(item, list):
            stack += item
    return names


def _is_combined(schema: dict[str, Any]) -> bool:
    """Whether a schema combines several parts, one of which may contain a reference."""
    keywords = {key for key in schema if key not in (*_NAMES, "$defs")}
    return bool(keywords & {"allOf", "anyOf", "oneOf", "$ref"}) and (
        len(keywords) > 1 or "allOf" in keywords
    )
