"""Read, check and compile JSON schemas to validators, which never access the network."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from batchvlm.errors import ConfigError

T = TypeVar("T")

MAX_CHECK_S = 2.0
"""Limit for checking one answer, in seconds; most checks take a millisecond."""


class InvalidSchemaError(ValueError):
    """A text is not a JSON schema; the message says why in one line."""


def read_schema(schema: str | dict[str, Any], setting: str) -> str:
    """Read the run's schema from its setting: the path of a file or the schema itself.

    Files that a `$ref` names, relative to the schema's folder, become part of the schema.

    Returns:
        The schema as JSON text. Its keys keep their order, which answers follow.

    Raises:
        ConfigError: the file does not exist or does not hold a JSON schema.
    """
    folder = Path()
    value: Any = schema
    if isinstance(schema, str):
        try:
            # Some editors write a byte order mark.
            text = Path(schema).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{setting}={schema} cannot be read",
                hint="give the path of a JSON schema file",
            ) from error
        folder = Path(schema).parent
        setting = f"{setting}={schema}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{setting}: the schema is no JSON: {error}") from error
    try:
        text = json.dumps(_Bundle(folder).whole(value))
        compile_schema(text)
        check_references(text)
    except InvalidSchemaError as error:
        raise ConfigError(f"{setting}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{setting}: nested too deeply") from error
    return text


class _Bundle:
    """Merges a schema and the files that it refers to into one document."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[str, Any] = {}
        self._keys: dict[Path, str] = {}

    def whole(self, schema: Any) -> Any:
        whole = self._visit(schema, self._folder, "#")
        if not self._parts:
            return whole
        return {**whole, "$defs": {**whole.get("$defs", {}), **self._parts}}

    def _visit(self, value: Any, folder: Path, root: str) -> Any:
        if isinstance(value, list):
            return [self._visit(item, folder, root) for item in value]
        if not isinstance(value, dict):
            return value
        visited = {key: self._visit(item, folder, root) for key, item in value.items()}
        if isinstance(value.get("$ref"), str):
            visited["$ref"] = self._reference(value["$ref"], folder, root)
        return visited

    def _reference(self, reference: str, folder: Path, root: str) -> str:
        name, _, pointer = reference.partition("#")
        if not name:
            return f"{root}{pointer}" if not pointer or pointer.startswith("/") else reference
        try:
            path = (folder / name.removeprefix("file:")).resolve()
            is_file = path.is_file()
        except (OSError, ValueError):
            is_file = False  # a name too long, or with characters that no name has
        if not is_file:
            return reference  # `check_references` reports it
        if path not in self._keys:
            key = self._keys[path] = f"file-{len(self._keys)}-{path.name.replace('/', '-')}"
            try:
                part = json.loads(path.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError) as error:
                raise InvalidSchemaError(f"$ref leads to {path}, which is no JSON") from error
            if isinstance(part, dict):
                # With these keys, its references would be resolved against itself.
                part = {k: v for k, v in part.items() if k not in ("$id", "id", "$schema")}
            self._parts[key] = self._visit(part, path.parent, f"#/$defs/{key}")
        return f"#/$defs/{self._keys[path]}{pointer}"


@lru_cache(maxsize=1024)
def compile_schema(text: str) -> Validator:
    """Compile a schema to a validator of its draft that checks formats.

    A `$ref` is resolved only within the schema and the drafts' own schemas.

    Raises:
        InvalidSchemaError: the text is not JSON, or not a schema.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidSchemaError(f"the schema is no JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise InvalidSchemaError(f"the schema is a JSON {type(schema).__name__}, not an object")
    cls = validator_for(schema, default=Draft202012Validator)
    try:
        if isinstance(schema, dict):  # true and false are always valid schemas
            cls.check_schema(schema)
    except (SchemaError, RecursionError) as error:
        place, reason = "", "nested too deeply"
        if isinstance(error, SchemaError):
            keys = (str(key).replace("~", "~0").replace("/", "~1") for key in error.absolute_path)
            place, reason = "".join(f"/{key}" for key in keys), error.message
        at = f" at {place[:200]}" if place else ""
        raise InvalidSchemaError(f"not a valid JSON schema{at}: {reason[:200]}") from error
    if isinstance(schema, dict):
        # With "$schema", a $ref to the whole would use the draft's validator, not `_exact`.
        schema = {key: part for key, part in schema.items() if key != "$schema"}
    # With the registry of the drafts, jsonschema does not fetch URLs in a $ref.
    return _exact(cls)(schema, registry=REGISTRY, format_checker=cls.FORMAT_CHECKER)


def check_references(text: str) -> None:
    """Check that each `$ref` of a valid schema can be resolved.

    Raises:
        InvalidSchemaError: one cannot, so that answers that reach it could not be validated.
    """
    resource = Resource.from_contents(json.loads(text), default_specification=DRAFT202012)
    root: Any = REGISTRY.with_resource("", resource).resolver_with_root(resource)
    left, seen = [(resource, root)], set()
    while left:
        part, resolver = left.pop()
        if id(part.contents) in seen:
            continue
        seen.add(id(part.contents))
        left += [(below, resolver.in_subresource(below)) for below in part.subresources()]
        reference = part.contents.get("$ref") if isinstance(part.contents, dict) else None
        if isinstance(reference, str):
            try:
                found = resolver.lookup(reference)
            # Unresolvable, or another error for a pointer into a number or a malformed URL.
            except Exception as error:
                raise InvalidSchemaError(f"$ref {reference[:200]!r} cannot be resolved") from error
            target = Resource.from_contents(found.contents, default_specification=DRAFT202012)
            left.append((target, found.resolver))


@lru_cache(maxsize=16)
def _exact(cls: type[Validator]) -> type[Validator]:
    """Return a draft's validator with exact `multipleOf`: for jsonschema's own, which divides
    floats, 0.07 is not a multiple of 0.01."""
    made: type[Validator] = extend(cls, {"multipleOf": _multiple_of})  # type: ignore[no-untyped-call]
    return made


def _multiple_of(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(value, "number"):
        return
    try:
        # The shortest text of a float is the decimal number as written.
        is_multiple = Fraction(repr(value)) % Fraction(repr(step)) == 0
    except (ValueError, ZeroDivisionError):  # infinite
        is_multiple = False
    if not is_multiple:
        yield ValidationError(f"{value!r} is not a multiple of {step}")


def why_no_match(text: str, pattern: str) -> str | None:
    """Return one line on why a whole text does not match a pattern; None if it does."""
    try:
        found = _within(MAX_CHECK_S, lambda: re.fullmatch(pattern, text))
    except _TooLongError:
        return f"the pattern cannot be applied: it takes longer than {MAX_CHECK_S:g} s"
    except re.error as error:
        return f"the pattern cannot be applied: {error}"
    return None if found else "it does not match the pattern"


def why_invalid(value: Any, schema: str) -> str | None:
    """Return one line on why a value is invalid under a schema; None if it is valid.

    A check that takes longer than `MAX_CHECK_S` counts as a failure: a pattern like `^(a+)+$` on a
    long text, or definitions that refer to each other, can take exponential time.
    """
    try:
        error = _within(MAX_CHECK_S, lambda: best_match(compile_schema(schema).iter_errors(value)))
    except _TooLongError:
        return f"the schema cannot be applied: it takes longer than {MAX_CHECK_S:g} s"
    except Unresolvable as unresolvable:
        return f"the schema refers to {unresolvable.ref!r}, which is not in it"
    # A schema may have a pattern that Python's re refuses, or recurse infinitely.
    except Exception as broken:
        return f"the schema cannot be applied: {type(broken).__name__}"
    if error is None:
        return None
    reason = f"{error.json_path}: {' '.join(error.message.split())[:200]}"
    # JSON keys can contain lone surrogates, which a text column cannot store.
    return reason.encode("utf-8", "backslashreplace").decode()


class _TooLongError(BaseException):
    """A check took too long. A BaseException, because libraries may catch `Exception`."""


def _within(seconds: float, check: Callable[[], T]) -> T:
    """Run a check; in the main thread, raise `_TooLongError` if it takes longer than `seconds`.

    It uses SIGALRM, which also interrupts Python's `re` during a match. A timer that was set before
    is restored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        return check()
    start = time.monotonic()
    is_over = False

    def ring(*_: object) -> None:
        if not is_over:
            raise _TooLongError

    before = signal.signal(signal.SIGALRM, ring)
    # Repeated, because an exception that is raised while an object is being freed is lost.
    others, others_interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        try:
            return check()
        finally:
            is_over = True
    finally:
        is_over = True  # again, because the alarm may interrupt the first assignment
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if others:
            left = max(1e-3, others - (time.monotonic() - start))
            signal.setitimer(signal.ITIMER_REAL, left, others_interval)
