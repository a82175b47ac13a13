"""Read from `task.output` the form that every answer must have."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, is_typeddict

from batchvlm.config import TaskOutputConfig
from batchvlm.errors import ConfigError
from batchvlm.forms.schemas import InvalidSchemaError, check_references, compile_schema, read_schema
from batchvlm.records import Form, FormKind
from batchvlm.words import described

_JSON_TYPES = ("integer", "number", "boolean", "string")
"""Named types that are JSON types; other names are patterns of `outlines.types`."""


def run_form(cfg: TaskOutputConfig) -> Form | None:
    """Return the form that the run requires of each answer; None if it requires none.

    Raises:
        ConfigError: the form cannot be read.
    """
    if cfg.json_schema is not None:
        schema = {"type": "object"} if cfg.json_schema == "any" else cfg.json_schema
        return Form(FormKind.JSON_SCHEMA, read_schema(schema, "task.output.json_schema"))
    if cfg.pydantic is not None:
        return _form_of(_load(cfg.pydantic), f"task.output.pydantic={cfg.pydantic}")
    if cfg.choice is not None:
        return Form(FormKind.CHOICE, json.dumps(list(cfg.choice), ensure_ascii=False))
    if cfg.regex is not None:
        return _check_form(Form(FormKind.REGEX, cfg.regex), "task.output.regex")
    if cfg.grammar is not None:
        form = Form(FormKind.GRAMMAR, _grammar(cfg.grammar))
        return _check_form(form, "task.output.grammar")
    if cfg.type is not None:
        return _named_form(cfg.type)
    return None


def run_choices(cfg: TaskOutputConfig) -> tuple[str, ...] | None:
    """Return the choices of the run; None if only rows have choices.

    Raises:
        ConfigError: the run requires another form.
    """
    form = run_form(cfg)
    if form is None:
        return None
    if form.kind is not FormKind.CHOICE:
        raise ConfigError(
            "task.scores=true scores choices, and the run asks for another form",
            hint="set task.output.choice=[A,B] or task.output.choice_column=COLUMN",
        )
    return tuple(json.loads(form.text))


def has_form(cfg: TaskOutputConfig) -> bool:
    """Whether the run requires a form or reads forms from rows."""
    columns = (cfg.json_schema_column, cfg.choice_column)
    return any(columns) or run_form(cfg) is not None


def form_of_type(value: Any) -> Form:
    """Return the form of an output type of outlines.

    Args:
        value: `JsonSchema`, `Choice`, `Regex`, `CFG` or another term of outlines, or what outlines
            converts: a Pydantic model, dataclass, typed dict, `Literal`, `Enum`, `list[int]`.

    Raises:
        TypeError: outlines does not support the type.
    """
    from outlines.types import dsl

    term = value if isinstance(value, dsl.Term) else dsl.python_types_to_terms(value)
    if isinstance(term, dsl.JsonSchema):
        return Form(FormKind.JSON_SCHEMA, json.dumps(json.loads(term.schema)))
    if isinstance(term, dsl.CFG):
        return Form(FormKind.GRAMMAR, term.definition)
    if isinstance(term, dsl.Choice):
        term = dsl.Alternatives([dsl.String(str(item)) for item in term.items])
    if isinstance(term, dsl.Alternatives):
        words = [t.value for t in term.terms if isinstance(t, dsl.String)]
        if len(words) == len(term.terms):
            return Form(FormKind.CHOICE, json.dumps(words, ensure_ascii=False))
    return Form(FormKind.REGEX, _ascii_digits(dsl.to_regex(term)))


def _form_of(value: Any, setting: str) -> Form:
    try:
        form = form_of_type(value)
    except (TypeError, ValueError, NotImplementedError, RecursionError) as error:
        reason, hint = str(error), ""
        if sys.version_info < (3, 12) and is_typeddict(value):
            reason = "Pydantic takes the TypedDict of typing from Python 3.12 on"
            hint = "write: from typing_extensions import TypedDict"
        raise ConfigError(f"{setting} is no type of an answer: {reason}", hint=hint) from error
    return _check_form(form, setting)


@lru_cache(maxsize=32)
def _check_form(form: Form, setting: str) -> Form:
    """Check that answers can be validated against a form, and return it.

    Raises:
        ConfigError: the form is invalid.
    """
    match form.kind:
        case FormKind.REGEX:
            try:
                re.compile(form.text)
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(f"{setting} is no regular expression: {error}") from error
        case FormKind.GRAMMAR:
            # Imported here so that llguidance is only loaded for grammars.
            from batchvlm.constraints.plan import make_plan

            plan = make_plan(form)
            if plan.grammar is None:
                reason = "; ".join(plan.notes).removeprefix("grammar: ")
                raise ConfigError(
                    f"{setting} is no grammar: {reason}",
                    hint="write it as Lark does, beginning with a rule named start",
                )
        case FormKind.JSON_SCHEMA:
            try:
                compile_schema(form.text)
                check_references(form.text)
            except InvalidSchemaError as error:
                raise ConfigError(f"{setting}: {error}") from error
    return form


@lru_cache(maxsize=32)
def _load(name: str) -> Any:
    module_name, _, path = name.partition(":")
    if not path:
        raise ConfigError(f"task.output.pydantic={name} must be written module:Class")
    # Find modules in the working directory, like `python -m`.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    # The user's module can raise anything.
    except Exception as error:
        raise ConfigError(
            f"task.output.pydantic={name} cannot be imported ({described(error)})"
        ) from error
    return found


def _grammar(text: str) -> str:
    is_path = "\n" not in text and ":" not in text.replace(":\\", "").replace("://", "")
    if not is_path:
        return text
    try:
        return Path(text).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"task.output.grammar={text} cannot be read",
            hint='give the path of a file, or a grammar with rules such as \'start: "a" | "b"\'',
        ) from error


def _named_form(name: str) -> Form:
    if name in _JSON_TYPES:
        return Form(FormKind.JSON_SCHEMA, json.dumps({"type": name}))
    from outlines import types

    term = getattr(types, name, None)
    if not isinstance(term, types.Regex) and not isinstance(term, types.dsl.Term):
        terms = sorted(k for k, v in vars(types).items() if isinstance(v, types.dsl.Term))
        known = list(dict.fromkeys([*_JSON_TYPES, *terms]))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        question = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"task.output.type={name} is no named type",
            hint=f"{question}there are {', '.join(known)}",
        )
    return _form_of(term, f"task.output.type={name}")


def _ascii_digits(pattern: str) -> str:
    # `\d` also matches digits of other scripts, such as Devanagari.
    return pattern.replace(r"\d", "[0-9]")
