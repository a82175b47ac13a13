"""Render prompt templates with a row's values, refusing values that are not text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined, UndefinedError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment

from batchvlm.errors import ConfigError, ErrorType, RowError

_BE_ABSENT = "write {{ column.field | default('') }} to allow it"


class Template:
    """A Jinja2 template over a row's columns that refuses unknown names, nulls and bytes.

    A column is written `{{ name }}`, or `{{ row["any name"] }}` if its name is not an identifier;
    `{{ (name | from_json).field }}` is a field of JSON text.

    Args:
        source: text of the template.
        setting: name of its setting, for error messages.

    Raises:
        ConfigError: the template has a syntax error.
    """

    def __init__(self, source: str, setting: str) -> None:
        environment = _Environment(
            undefined=StrictUndefined, finalize=_refuse_python, keep_trailing_newline=True
        )
        # Columns may have the names of Jinja2's global functions.
        environment.globals.clear()
        environment.tests["none"] = lambda value: value is None or isinstance(value, _Null)
        environment.policies["json.dumps_function"] = _dumps
        environment.filters["from_json"] = _from_json
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"{setting} is no valid Jinja2 template: {error}") from error
        self.setting = setting
        names = meta.find_undeclared_variables(tree)
        self.columns = frozenset(names - {"row"})
        if "row" in names:
            self.columns |= frozenset(_columns_of_row(tree))
        self._fields = frozenset(_fields_of(tree))

    def render(self, values: Mapping[str, Any]) -> str:
        """Render the template with one row's values.

        Raises:
            RowError: a value in the text is null or binary, or an expression fails (`prompt`).
        """
        try:
            # Only columns of the template are searched for nulls: others may hold images.
            known = {
                name: _marked(value, f"column {name!r}")
                if value is None or name in self.columns
                else value
                for name, value in values.items()
            }
            return self._template.render({**known, "row": _Row(known)})
        except RowError as error:
            raise RowError(error.error_type, f"{self.setting}: {error.message}") from error
        # An expression over a row's values can raise any exception.
        except Exception as error:
            names = ", ".join(sorted(self.columns)) or "no column"
            reason = type(error).__name__
            if isinstance(error, UndefinedError):
                reason = self._why_absent(str(error.message))
            raise RowError(ErrorType.PROMPT, f"{self.setting} over {names}: {reason}") from error

    def _why_absent(self, message: str) -> str:
        """Explain Jinja2's message, which may quote the row: a key can be computed from values."""
        found = re.fullmatch(r"'([\w.]+) object' has no attribute '(.*)'", message, re.DOTALL)
        if found is None or found[2] not in self._fields:
            return f"the row has no such field or item; {_BE_ABSENT}"
        kind, field = found.groups()
        if kind == "str":
            read = f"{{{{ (column | from_json).{field} }}}}"
            return f"a text has no field {field!r}; write {read} where it is JSON"
        whose = "a null" if kind.endswith("._Null") else "the row"
        return f"{whose} has no field {field!r}; {_BE_ABSENT}"


class _Environment(SandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up a mapping's keys before its attributes: `order.items` is a key, not a method."""
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)


class _Null:
    """A null in a template: it is false and `is none`, and raises when it becomes text.

    Args:
        place: what is null, for the error.
    """

    def __init__(self, place: str) -> None:
        self._place = place

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise RowError(
            ErrorType.PROMPT, f"{self._place} is null; write {{{{ column or '' }}}} to allow it"
        )

    __html__ = __repr__ = __str__


class _Binary(bytes):
    """Bytes in a template, which raise when they become text."""

    place = "a value"

    def __str__(self) -> str:
        raise RowError(
            ErrorType.PROMPT,
            f"{self.place} is binary; write {{{{ column.decode() }}}} where it is text",
        )

    __repr__ = __str__


class _Row(dict[str, Any]):
    """All columns of a row; raises when the whole becomes text."""

    def __str__(self) -> str:
        raise RowError(ErrorType.PROMPT, "the whole row is no text; write {{ row.column }}")

    __repr__ = __str__


def _marked(value: Any, place: str = "a value") -> Any:
    """Return a value with nulls and bytes replaced by `_Null` and `_Binary`, at every level."""
    inner = f"a value of {place}" if place.startswith("column") else place
    match value:
        case None:
            return _Null(place)
        case bytes() | bytearray() | memoryview():
            binary = _Binary(value)
            binary.place = place
            return binary
        case dict():
            return {_marked(key, inner): _marked(item, inner) for key, item in value.items()}
        case list():
            return [_marked(item, inner) for item in value]
        case tuple():
            return tuple(_marked(item, inner) for item in value)
    return value


def _refuse_python(value: Any) -> Any:
    """Check the value of an expression before it becomes text.

    Raises:
        RowError: the value is null, bytes or a function.
    """
    if value is None or isinstance(value, bytes):
        return str(value if isinstance(value, _Binary) else _marked(value))
    if callable(value) and not isinstance(value, Undefined):
        raise RowError(ErrorType.PROMPT, "a value is a function of Python's, and no text")
    return value


def _dumps(value: Any, **options: Any) -> str:
    """Return a value as JSON, with nested nulls as `null`."""

    def plain(item: Any) -> None:
        if not isinstance(item, _Null):
            raise TypeError

    return json.dumps(str(value) if isinstance(value, _Null) else value, default=plain, **options)


def _from_json(text: Any) -> Any:
    """Return the value of JSON text.

    Raises:
        RowError: it is no JSON.
    """
    try:
        return _marked(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        message = "a value is no JSON, so from_json cannot read it"
        raise RowError(ErrorType.PROMPT, message) from error


def _fields_of(tree: nodes.Template) -> Iterator[str]:
    """Yield the names of fields that the template itself spells, as `a.b` and `a["b"]` do."""
    yield from (node.attr for node in tree.find_all(nodes.Getattr))
    for node in tree.find_all(nodes.Getitem):
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            yield node.arg.value


def _columns_of_row(node: nodes.Node) -> Iterator[str]:
    """Yield the columns in `row.name` and `row["name"]`, unless the template redefines `row`."""
    match node:
        case nodes.Getitem(node=nodes.Name(name="row"), arg=nodes.Const(value=name)):
            yield str(name)
        case nodes.Getattr(node=nodes.Name(name="row"), attr=name):
            yield name
        case nodes.For():
            yield from _columns_of_row(node.iter)
            for below in node.else_:
                yield from _columns_of_row(below)
            if _is_row_named(node.target):
                return
        case nodes.With() if any(map(_is_row_named, node.targets)):
            for below in node.values:
                yield from _columns_of_row(below)
            return
        case nodes.Macro() | nodes.CallBlock() if any(map(_is_row_named, node.args)):
            return
    for below in node.iter_child_nodes():
        yield from _columns_of_row(below)


def _is_row_named(target: nodes.Node) -> bool:
    names = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
    return any(name.name == "row" for name in names)
