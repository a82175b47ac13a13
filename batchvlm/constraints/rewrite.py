"""Rewrite a JSON schema to an equivalent one with the keywords that grammars support.

A grammar enforces types, properties, patterns, bounds and alternatives. Other keywords are
rewritten to these where that is exact: conditions and dependencies become alternatives, `not`
becomes the complement, references become definitions of the schema itself, keywords of old drafts
become those of 2020-12. Keywords that cannot be rewritten are refused (`strict`) or recorded and
left to validation (`lenient`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, specification_with

from batchvlm.constraints import arrays, objects, strings
from batchvlm.constraints.limits import settle_bounds
from batchvlm.constraints.negate import Complement, NoComplementError, Schema, all_of, any_of
from batchvlm.constraints.overlap import are_disjoint, view

_MAX_NODES = 100_000
"""Subschemas of a schema, including those that rewriting adds."""
_ROOT = "urn:batchvlm:schema"
_OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


class UnsupportedSchemaError(ValueError):
    """No grammar enforces a schema exactly; the message names the keyword."""


class Rewriter:
    """Rewrites one schema.

    Args:
        schema: any JSON schema.
        is_lenient: leave out keywords that cannot be rewritten, rather than raise.
        splits_one_of: make the alternatives of `oneOf` mutually exclusive; otherwise `oneOf` stays
            for llguidance to check, or if lenient becomes `anyOf`.
    """

    def __init__(self, schema: Schema, *, is_lenient: bool, splits_one_of: bool) -> None:
        self._is_lenient = is_lenient
        self._splits_one_of = splits_one_of
        cls = validator_for(schema, default=Draft202012Validator)
        meta = str(cls.META_SCHEMA.get("$schema") or cls.META_SCHEMA.get("id", ""))
        self.is_old = any(draft in meta for draft in _OLD_DRAFTS)
        """Whether `$ref` hides its siblings and `items` may be a list."""
        self.checked_formats = frozenset(cls.FORMAT_CHECKER.checkers)
        self._specification = specification_with(meta, default=DRAFT202012)
        root = Resource(schema, self._specification)  # type: ignore[call-arg]
        self._resolver = REGISTRY.with_resource(_ROOT, root).resolver_with_root(root)
        self._schema = schema
        self._num_nodes = 0
        self._names: dict[int, str] = {}
        self._definitions: dict[str, Schema] = {}
        self._kept: list[Any] = []  # keeps objects alive, so that their ids are not reused
        self.left_out: set[str] = set()
        """Keywords that the result does not enforce."""

    def rewrite(self) -> Schema:
        """Return the rewritten schema.

        Raises:
            UnsupportedSchemaError: the schema cannot be rewritten, is invalid, has a `$ref` that
                cannot be resolved, or fits no value.
        """
        try:
            result = self.visit(self._schema, self._resolver)
        except RecursionError as error:
            raise UnsupportedSchemaError("nested too deeply") from error
        if result is False:
            raise UnsupportedSchemaError("no value fits it")
        for schema in (result, *self._definitions.values()):
            self._relax(schema)
            settle_bounds(schema)
        if result is True:
            return {}
        return {**result, "$defs": self._definitions} if self._definitions else result

    def visit(self, schema: Schema, resolver: Any) -> Schema:
        """Rewrite one subschema."""
        self.count()
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise UnsupportedSchemaError(f"a {type(schema).__name__} is no schema")
        if schema is not self._schema:
            resolver = resolver.in_subresource(
                Resource(schema, self._specification)  # type: ignore[call-arg]
            )
        parts: list[Schema] = []
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if isinstance(schema.get(key), str):
                parts.append(self._reference(schema[key], resolver))
                if self.is_old:
                    return parts[0]
        own: dict[str, Any] = {}
        self._plain(schema, own)
        strings.rewrite(self, schema, own, parts)
        arrays.rewrite(self, schema, own, parts, resolver)
        objects.rewrite(self, schema, own, parts, resolver)
        self._combine(schema, own, parts, resolver)
        if own == {} and len(parts) == 1:
            return parts[0]
        return all_of([own, *parts])

    def count(self, num: int = 1) -> None:
        """Count schemas that are added to the result.

        Raises:
            UnsupportedSchemaError: there are too many.
        """
        self._num_nodes += num
        if self._num_nodes > _MAX_NODES:
            raise UnsupportedSchemaError(f"more than {_MAX_NODES} schemas within it")

    def leave_out(self, keyword: str) -> None:
        """Record that the result does not enforce a keyword.

        Raises:
            UnsupportedSchemaError: not `is_lenient`.
        """
        if not self._is_lenient:
            raise UnsupportedSchemaError(f"{keyword!r} cannot be enforced")
        self.left_out.add(keyword)

    @property
    def is_lenient(self) -> bool:
        return self._is_lenient

    def resolve(self, reference: str) -> Schema | None:
        """Return the target of a rewritten `$ref`; None while it is not known."""
        return self._definitions.get(reference.rpartition("/")[2])

    def target(self, schema: Schema) -> Schema:
        """Follow a schema that is only a `$ref` as far as its targets are known."""
        for _ in self._definitions:  # bounded, because references may form a cycle
            if not isinstance(schema, dict) or schema.keys() != {"$ref"}:
                break
            found = self.resolve(schema["$ref"])
            schema = schema if found is None else found
        return schema

    def complement(self, schema: Schema, keyword: str) -> Schema | None:
        """Return the complement of a rewritten schema, or if lenient a subset of it.

        Returns:
            None if lenient and no part of the complement can be expressed.

        Raises:
            UnsupportedSchemaError: not `is_lenient`, and the complement cannot be expressed.
        """
        finder = Complement(self.resolve, is_inner=self._is_lenient)
        try:
            complement = finder.of(schema)
        except NoComplementError:
            self.leave_out(keyword)
            return None
        if not finder.is_exact:
            self.leave_out(keyword)
            if complement is False:
                return None
        self.count(_size(complement))
        return complement

    def _reference(self, reference: str, resolver: Any) -> Schema:
        try:
            found = resolver.lookup(reference)
        except (Unresolvable, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedSchemaError(f"$ref {reference!r} cannot be resolved") from error
        contents = found.contents
        if isinstance(contents, bool):
            return contents
        name = self._names.get(id(contents))
        if name is None:
            name = self._names[id(contents)] = f"d{len(self._names)}"
            self._kept.append(contents)
            self._definitions[name] = self.visit(contents, found.resolver)
        target = self._definitions.get(name)
        if isinstance(target, bool):
            return target
        return {"$ref": f"#/$defs/{name}"}

    def _plain(self, schema: Mapping[str, Any], own: dict[str, Any]) -> None:
        for key in ("type", "enum", "const", "title", "description"):
            if key in schema:
                own[key] = schema[key]
        if "const" in own and "enum" in own:
            # Not by Python, for which 1 is True.
            same = Draft202012Validator({"const": own.pop("const")})
            own["enum"] = [value for value in own["enum"] if same.is_valid(value)]
        for key in _NUMBERS:
            if key in schema:
                own[key] = schema[key]
        # Draft 4: true and false, beside the bound itself.
        for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            is_exclusive = own.get(exclusive)
            if isinstance(is_exclusive, bool):
                del own[exclusive]
                if is_exclusive and bound in own:
                    own[exclusive] = own.pop(bound)

    def _combine(
        self, schema: Mapping[str, Any], own: dict[str, Any], parts: list[Schema], resolver: Any
    ) -> None:
        parts += [self.visit(part, resolver) for part in schema.get("allOf", [])]
        if "anyOf" in schema:
            parts.append(any_of([self.visit(part, resolver) for part in schema["anyOf"]]))
        if "oneOf" in schema:
            parts.append(self._one_of([self.visit(p, resolver) for p in schema["oneOf"]], own))
        if "not" in schema:
            complement = self.complement(self.visit(schema["not"], resolver), "not")
            parts.append(True if complement is None else complement)
        if "if" in schema and ("then" in schema or "else" in schema):
            parts.append(self._condition(schema, resolver))

    def _condition(self, schema: Mapping[str, Any], resolver: Any) -> Schema:
        condition = self.visit(schema["if"], resolver)
        then = self.visit(schema.get("then", True), resolver)
        otherwise = self.visit(schema.get("else", True), resolver)
        complement = self.complement(condition, "if")
        if complement is None:
            return True
        if_true = all_of([condition, then])
        return any_of([b for b in (if_true, all_of([complement, otherwise])) if b is not False])

    def _one_of(self, branches: Sequence[Schema], own: Mapping[str, Any]) -> Schema:
        branches = [branch for branch in branches if branch is not False]
        if len(branches) <= 1:
            return any_of(branches)
        pairs = combinations(branches, 2)
        if all(are_disjoint(one, other, own, self.resolve) for one, other in pairs):
            return any_of(branches)
        if not self._splits_one_of:
            if self._is_lenient:
                self.left_out.add("oneOf")
                return any_of(branches)
            return {"oneOf": list(branches)}
        split: list[Schema] = []
        complements: dict[int, Schema | None] = {}
        for i, branch in enumerate(branches):
            parts = [branch]
            for j, other in enumerate(branches):
                if j == i or are_disjoint(branch, other, own, self.resolve):
                    continue
                separation = self._separation(branch, other, own)
                if separation is None:
                    if j not in complements:
                        complements[j] = self.complement(other, "oneOf")
                    separation = complements[j]
                if separation is not None:
                    parts.append(separation)
                    self.count(_size(separation))
            split.append(all_of(parts))
        return any_of([branch for branch in split if branch is not False])

    def _relax(self, schema: Schema) -> None:
        """Turn each `oneOf` with disjoint alternatives into `anyOf`, once all targets are known."""
        stack = [schema]
        while stack:
            item = stack.pop()
            if isinstance(item, list):
                stack += item
            elif isinstance(item, dict):
                branches = item.get("oneOf")
                if isinstance(branches, list) and all(
                    are_disjoint(one, other, {}, self.resolve)
                    for one, other in combinations(branches, 2)
                ):
                    # Overwrites no `anyOf`: `visit` puts `oneOf` into a schema of its own.
                    item["anyOf"] = item.pop("oneOf")
                stack += [v for k, v in item.items() if k not in ("enum", "const")]

    def _separation(self, branch: Schema, other: Schema, own: Mapping[str, Any]) -> Schema | None:
        """Return a schema that separates a closed object from another one.

        Returns:
            What a value of `branch` must satisfy so that it does not fit `other`; None if only
            the complement of `other` can be used.
        """
        one, two = view(branch, self.resolve), view(other, self.resolve)
        if one is None or two is None or not one.is_closed or not two.is_closed:
            return None
        if not (one.is_plain and two.is_plain):
            return None
        ways: list[Schema] = [
            {"required": [name]} for name in one.properties if name not in two.properties
        ]
        ways += [{"properties": {name: False}} for name in two.required]
        finder = Complement(self.resolve, is_inner=self._is_lenient)
        for name, part in two.properties.items():
            if name not in one.properties:
                continue
            try:
                complement = finder.of(part)
            except NoComplementError:
                if not self._is_lenient and part != one.properties[name]:
                    return None
                continue
            if complement is not False:
                ways.append({"properties": {name: complement}, "required": [name]})
        if not finder.is_exact:
            self.leave_out("oneOf")
        return any_of(ways) if ways else None


def _size(schema: Schema) -> int:
    """Estimate the number of subschemas, without following references."""
    return 1 + len(json.dumps(schema)) // 32
