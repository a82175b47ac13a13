"""The Arrow type of the column `parsed`, derived from the form before the run, and its values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from batchvlm.records import Form, FormKind

_MAX_DEPTH = 32
_MAX_FIELDS = 2000
_MAX_ALTERNATIVES = 10_000
_INT64 = range(-(1 << 63), 1 << 63)

Fit = Callable[[Any, str], Any]
"""Converts a JSON value, given its path for messages, to a value that Arrow accepts."""


class UnfitError(ValueError):
    """A value is valid but its column cannot hold it; the message names the field."""


class _NoTypeError(ValueError):
    """No single Arrow type holds the values of a schema; the message says why."""


@dataclass(frozen=True)
class Parsed:
    """Type of the column `parsed`, and the conversion of answers to it."""

    type: pa.DataType
    notes: tuple[str, ...]
    """Fields that are stored as JSON text, each with the reason."""
    _fit: Fit

    def fit(self, text: str) -> Any:
        """Convert an answer, given as canonical JSON text, to a value of the type.

        Raises:
            UnfitError: a number is too large, a date does not exist, or a value has another type.
        """
        if self._fit is _as_text_whole:
            return text
        try:
            return self._fit(json.loads(text), "$")
        except UnfitError:
            raise
        # A schema may allow values that were not foreseen; only this row fails.
        except Exception as error:
            raise UnfitError(f"$ does not fit its column: {type(error).__name__}") from error


def parsed_column(form: Form | None, *, is_by_row: bool) -> Parsed:
    """Return the column for answers of a form.

    Args:
        form: the form of the run.
        is_by_row: whether rows may have forms of their own; the column is then JSON text.
    """
    if is_by_row:
        return Parsed(pa.string(), (), _as_text_whole)
    if form is None:
        return Parsed(pa.string(), (), _as_is)
    if form.kind is FormKind.CHOICE:
        return Parsed(pa.dictionary(pa.int32(), pa.string()), (), _as_is)
    if form.kind is not FormKind.JSON_SCHEMA:
        return Parsed(pa.string(), (), _as_is)
    maker = _Maker(json.loads(form.text))
    try:
        kind, fit = maker.make_root()
    except (_NoTypeError, RecursionError) as error:
        reason = str(error) or "nested too deeply"
        return Parsed(pa.string(), (f"$ ({reason})",), _as_text_whole)
    notes = dict.fromkeys(f"{path} ({reason})" for path, reason in maker.texts)
    return Parsed(kind, tuple(notes), fit)


@dataclass(frozen=True)
class _Node:
    """A schema merged with its `$ref` and `allOf` subschemas."""

    types: frozenset[str] | None
    properties: Mapping[str, Any]
    items: Any
    values: Sequence[Any] | None
    format: str | None
    is_map: bool
    """Whether it has a schema for undeclared properties."""
    choices: Sequence[Any]
    """Alternatives (`anyOf`, `oneOf`) that each describe the value; see `_choices`."""
    alternatives: Sequence[Any] = ()
    """All subschemas that apply to some values only: every alternative, also those that only
    require properties, and conditional ones; see `_conditional`."""


class _Maker:
    def __init__(self, schema: Any) -> None:
        self._schema = schema
        resource = Resource.from_contents(schema, default_specification=DRAFT202012)
        self._resolver: Any = REGISTRY.with_resource("", resource).resolver_with_root(resource)
        self._num_fields = 0
        self._num_alternatives = 0
        self.texts: list[tuple[str, str]] = []
        """Path of each field that is stored as JSON text, and the reason."""

    def make_root(self) -> tuple[pa.DataType, Fit]:
        return self._make(self._schema, "$", ())

    def _field(self, schema: Any, path: str, under: tuple[str, ...]) -> tuple[pa.DataType, Fit]:
        """Return the type of a field; a field that has none becomes JSON text, with a note."""
        self._num_fields += 1
        if self._num_fields > _MAX_FIELDS:
            raise _NoTypeError(f"more than {_MAX_FIELDS} fields")
        num_texts = len(self.texts)
        try:
            return self._make(schema, path, under)
        except _NoTypeError as error:
            self.texts[num_texts:] = [(path, str(error))]
            return pa.string(), _as_text

    def _make(self, schema: Any, path: str, under: tuple[str, ...]) -> tuple[pa.DataType, Fit]:
        node, under = self._node(schema, under)
        if node.properties and self._names(node, under) - node.properties.keys():
            raise _NoTypeError("properties in one alternative alone")
        # If the schema has properties of its own, alternatives only constrain their combinations.
        if node.choices and not node.properties:
            return self._alternatives(node, path, under)
        if node.values is not None:
            return _of_values(node)
        types = set(node.types or ()) - {"null"}
        if node.types is None and node.properties:
            types = {"object"}
        if types == {"integer", "number"}:
            types = {"number"}
        if len(types) != 1:
            raise _NoTypeError(f"may be of {len(types) or 'any'} types")
        (kind,) = types
        match kind:
            case "object":
                return self._struct(node, path, under)
            case "array":
                if node.items is None:
                    raise _NoTypeError("items of any type")
                inner, fit = self._make(node.items, f"{path}[]", under)
                return pa.list_(inner), _each(fit)
            case "string" if node.format == "date":
                return pa.date32(), _as_date
            case "string" if node.format == "date-time":
                return pa.timestamp("us", tz="UTC"), _as_time
        return _PLAIN[kind]

    def _struct(self, node: _Node, path: str, under: tuple[str, ...]) -> tuple[pa.DataType, Fit]:
        if node.is_map or not node.properties:
            raise _NoTypeError("properties of any name")
        fields, fits = [], {}
        for name, part in node.properties.items():
            if part is False:
                continue
            kind, fit = self._field(part, f"{path}.{name}", under)
            fields.append(pa.field(name, kind))
            fits[name] = fit
        if not fields:
            raise _NoTypeError("no properties")
        return pa.struct(fields), _fields(fits)

    def _alternatives(
        self, node: _Node, path: str, under: tuple[str, ...]
    ) -> tuple[pa.DataType, Fit]:
        """Return the type that all alternatives share; null alternatives are skipped."""
        made: list[tuple[pa.DataType, Fit]] = []
        texts: list[set[str]] = []
        for choice in node.choices:
            self._count_alternative()
            below, _ = self._node(choice, under)
            if below.types == frozenset({"null"}):
                continue
            num_texts = len(self.texts)
            made.append(self._make(choice, path, under))
            # JSON text and strings have the same Arrow type but different meanings.
            texts.append({name for name, _ in self.texts[num_texts:]})
        are_alike = all(kind == made[0][0] for kind, _ in made)
        if not made or not are_alike or any(names != texts[0] for names in texts):
            raise _NoTypeError("alternatives of several types")
        return made[0]

    def _count_alternative(self) -> None:
        # References multiply alternatives: two on each of twenty levels are a million.
        self._num_alternatives += 1
        if self._num_alternatives > _MAX_ALTERNATIVES:
            raise _NoTypeError(f"more than {_MAX_ALTERNATIVES} alternatives")

    def _names(self, node: _Node, under: tuple[str, ...]) -> set[str]:
        """Return the properties that a schema's alternatives declare, at any depth."""
        names: set[str] = set()
        for choice in node.alternatives:
            self._count_alternative()
            below, deeper = self._node(choice, under)
            names |= below.properties.keys() | self._names(below, (*deeper, "alternative"))
        return names

    def _node(self, schema: Any, under: tuple[str, ...]) -> tuple[_Node, tuple[str, ...]]:
        if len(under) > _MAX_DEPTH:
            raise _NoTypeError("nested too deeply")
        if not isinstance(schema, Mapping):
            return _Node(None, {}, None, None, None, False, ()), under
        types: frozenset[str] | None = None
        if isinstance(schema.get("type"), str):
            types = frozenset({schema["type"]})
        elif isinstance(schema.get("type"), list):
            types = frozenset(schema["type"])
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        extra = schema.get("additionalProperties")
        merged = _Node(
            types=types,
            properties=schema.get("properties", {}),
            items=_items(schema),
            values=values,
            format=schema.get("format"),
            is_map=bool(schema.get("patternProperties")) or extra is True or bool(extra),
            choices=_choices(schema),
            alternatives=_conditional(schema),
        )
        parts = list(schema.get("allOf", []))
        if isinstance(schema.get("$ref"), str):
            reference = schema["$ref"]
            if reference in under:
                raise _NoTypeError("it contains itself")
            under = (*under, reference)
            try:
                parts.append(self._resolver.lookup(reference).contents)
            except (Unresolvable, ValueError) as error:
                raise _NoTypeError(f"$ref {reference} cannot be resolved") from error
        above = under
        for part in parts:
            below, seen = self._node(part, above)
            under = (*under, *seen[len(above) :])
            merged = _Node(
                types=below.types if merged.types is None else merged.types,
                properties=_merge_properties(merged.properties, below.properties),
                items=below.items if merged.items is None else merged.items,
                values=below.values if merged.values is None else merged.values,
                format=merged.format or below.format,
                is_map=merged.is_map or below.is_map,
                choices=[*merged.choices, *below.choices],
                alternatives=[*merged.alternatives, *below.alternatives],
            )
        return merged, under


def _is_typed(choice: Any) -> bool:
    """Whether an alternative describes the value, rather than only requiring properties."""
    kinds = ("type", "$ref", "enum", "const", "properties", "items", "allOf", "anyOf", "oneOf")
    return isinstance(choice, Mapping) and any(kind in choice for kind in kinds)


def _choices(schema: Mapping[str, Any]) -> Sequence[Any]:
    """Return the alternatives of those lists in which each alternative describes the value."""
    lists = [schema.get(name, []) for name in ("anyOf", "oneOf")]
    return [choice for choices in lists if all(map(_is_typed, choices)) for choice in choices]


def _conditional(schema: Mapping[str, Any]) -> Sequence[Any]:
    """Return the subschemas that apply to some values only."""
    lists = [schema.get(name, []) for name in ("anyOf", "oneOf")]
    by_name = {**schema.get("dependencies", {}), **schema.get("dependentSchemas", {})}
    return [
        *(choice for choices in lists for choice in choices),
        *(schema[name] for name in ("then", "else") if "if" in schema and name in schema),
        *(part for part in by_name.values() if not isinstance(part, list)),
    ]


def _merge_properties(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the properties of two schemas that both apply."""
    both = {name: {"allOf": [one[name], other[name]]} for name in one if name in other}
    return {**one, **other, **both}


def _items(schema: Mapping[str, Any]) -> Any:
    items = schema.get("items")
    if isinstance(items, list) or "prefixItems" in schema:
        is_old = isinstance(items, list)
        tuple_: list[Any] = [*(schema["items"] if is_old else schema["prefixItems"])]
        # By default any items may follow the tuple's.
        rest = schema.get("additionalItems" if is_old else "items", {})
        if rest is not False and schema.get("maxItems", len(tuple_) + 1) > len(tuple_):
            tuple_.append(rest)
        return {"anyOf": tuple_} if tuple_ else None
    return items if isinstance(items, Mapping) else None


def _of_values(node: _Node) -> tuple[pa.DataType, Fit]:
    values = [value for value in node.values or () if value is not None]
    kinds = {_KINDS.get(type(value), "") for value in values}
    if kinds == {"integer", "number"}:
        kinds = {"number"}
    if len(kinds) != 1 or "" in kinds:
        raise _NoTypeError("values of several types")
    return _PLAIN[kinds.pop()]


_KINDS = {str: "string", bool: "boolean", int: "integer", float: "number"}


def _as_text_whole(value: Any, path: str) -> Any:
    raise AssertionError("a whole answer stays as it is")


def _as_is(value: Any, path: str) -> Any:
    return value


def _as_text(value: Any, path: str) -> Any:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return None if value is None else text


def _as_string(value: Any, path: str) -> Any:
    if not isinstance(value, str | None):
        raise UnfitError(f"{path} is no string")
    return value


def _as_bool(value: Any, path: str) -> Any:
    if not isinstance(value, bool | None):
        raise UnfitError(f"{path} is neither true nor false")
    return value


def _as_int(value: Any, path: str) -> Any:
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 3.0 is an integer in JSON
    # Checked before the range: for a value that is not an int, `in` compares with all of it.
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnfitError(f"{path} is no integer")
    if value not in _INT64:
        raise UnfitError(f"{path} is an integer beyond 64 bits")
    return value


def _as_float(value: Any, path: str) -> Any:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UnfitError(f"{path} is no number")
    try:
        return float(value)
    except OverflowError as error:
        raise UnfitError(f"{path} is a number beyond 64 bits") from error


def _as_date(value: Any, path: str) -> Any:
    if value is None:
        return None
    if not isinstance(value, str):
        raise UnfitError(f"{path} is no date")
    try:
        return date.fromisoformat(value)
    except ValueError as error:
        raise UnfitError(f"{path} is no date of our calendar") from error


def _as_time(value: Any, path: str) -> Any:
    if value is None:
        return None
    if not isinstance(value, str):
        raise UnfitError(f"{path} is no time")
    try:
        time = datetime.fromisoformat(value.upper())
        return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UnfitError(f"{path} is no time that can be held") from error


def _each(fit: Fit) -> Fit:
    def items(value: Any, path: str) -> Any:
        if value is None:
            return None
        if not isinstance(value, list):
            raise UnfitError(f"{path} is no array")
        return [fit(item, f"{path}[{place}]") for place, item in enumerate(value)]

    return items


def _fields(fits: Mapping[str, Fit]) -> Fit:
    def struct(value: Any, path: str) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise UnfitError(f"{path} is no object")
        return {
            name: fit(value[name], f"{path}.{name}") for name, fit in fits.items() if name in value
        }

    return struct


_PLAIN: Mapping[str, tuple[pa.DataType, Fit]] = {
    "string": (pa.string(), _as_string),
    "integer": (pa.int64(), _as_int),
    "number": (pa.float64(), _as_float),
    "boolean": (pa.bool_(), _as_bool),
}
