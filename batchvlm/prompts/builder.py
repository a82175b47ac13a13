"""Record -> prompt: chat messages with image slots, and the row's generation settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from batchvlm.config import (
    GENERATION_LIMITS,
    ColumnsConfig,
    GenerationColumnsConfig,
    GenerationConfig,
    Instructions,
    TaskConfig,
)
from batchvlm.errors import ErrorType, InputError, RowError
from batchvlm.forms.forms import run_form
from batchvlm.forms.schemas import InvalidSchemaError, compile_schema
from batchvlm.prompts.messages import (
    Message,
    check_continued,
    fill_slots,
    has_no_image,
    image_refs,
    read_json,
    read_messages,
    read_turns,
    with_markdown_images,
)
from batchvlm.prompts.templates import Template
from batchvlm.records import (
    Completion,
    FormKind,
    Generation,
    ImageRef,
    Prompt,
    Record,
    derived_seed,
)


class PromptBuilder:
    """Builds the prompts of rows from templates that are compiled once.

    Args:
        task: the templates.
        columns: names of the columns with images, messages and turns.
        generation: the default settings, and the columns that override them.

    Raises:
        ConfigError: a template has a syntax error.
    """

    def __init__(
        self, *, task: TaskConfig, columns: ColumnsConfig, generation: GenerationConfig
    ) -> None:
        image = columns.image
        self._image_columns = (
            () if image is None else (image,) if isinstance(image, str) else tuple(image)
        )
        self._is_image_optional = columns.image_optional
        self._messages_column = columns.messages
        self._turns_column = columns.turns
        self._variables_column = columns.chat_template_kwargs
        self._schema_column = task.output.json_schema_column
        self._choice_column = task.output.choice_column
        self._has_instructions = task.instructions is Instructions.auto
        form = run_form(task.output) if self._has_instructions else None
        is_schema = form is not None and form.kind is FormKind.JSON_SCHEMA
        self._run_schema = form.text if form is not None and is_schema else None
        self._generation = generation
        has_messages = columns.messages or columns.turns
        self._prompt = None if has_messages else Template(task.prompt, "task.prompt")
        self._has_markdown = task.markdown_images
        self._system = Template(task.system, "task.system") if task.system else None
        prefix = task.answer_prefix
        self._answer_prefix = Template(prefix, "task.answer_prefix") if prefix else None
        self._continues = task.continue_final_message

    def needed_columns(self) -> dict[str, str]:
        """Return every column that prompts need -> the setting that names it."""
        needed = {name: "data.columns.image" for name in self._image_columns}
        if self._messages_column:
            needed[self._messages_column] = "data.columns.messages"
        if self._turns_column:
            needed[self._turns_column] = "data.columns.turns"
        if self._variables_column:
            needed[self._variables_column] = "data.columns.chat_template_kwargs"
        if self._schema_column:
            needed[self._schema_column] = "task.output.json_schema_column"
        if self._choice_column:
            needed[self._choice_column] = "task.output.choice_column"
        for key, column in _generation_columns(self._generation.columns).items():
            needed[column] = f"generation.columns.{key}"
        for template in (self._prompt, self._system, self._answer_prefix):
            if template is not None:
                needed |= {name: template.setting for name in template.columns}
        return needed

    def check_types(self, schema: Any) -> None:
        """Refuse a column whose Arrow type cannot hold what its setting takes.

        Args:
            schema: the input's `pyarrow.Schema`, with every needed column.

        Raises:
            InputError: names the setting, the column and the expected type.
        """
        for key, column in _generation_columns(self._generation.columns).items():
            kind = schema.field(column).type
            wanted = _TAKES[type(getattr(self._generation, key))]
            if not _may_hold(wanted, kind):
                raise InputError(
                    f"generation.columns.{key} names column {column!r}, which is {kind}",
                    hint=f"generation.{key} takes {wanted}",
                )
        for column, setting in self.needed_columns().items():
            kind = schema.field(column).type
            if setting in _TAKEN and _is_plain(kind):
                raise InputError(
                    f"{setting} names column {column!r}, which is {kind}",
                    hint=f"it takes {_TAKEN[setting]}",
                )

    def build(self, record: Record) -> Prompt:
        """Build one row's prompt.

        Raises:
            RowError: the row's values do not form a prompt.
        """
        messages, images = self.whole(record)
        generation = resolve_generation(self._generation, record.values, record.row_index)
        prefix = self._answer_prefix.render(record.values) if self._answer_prefix else ""
        turns_left = 0
        if self._turns_column:
            messages, images, turns_left = _cut_at_turn(messages, images, record.answers, prefix)
            if turn := len(record.answers):
                seed = derived_seed("turn", generation.seed, turn)
                generation = replace(generation, seed=seed)
        if prefix and messages[-1]["role"] != "assistant":
            messages = [*messages, _assistant_message(prefix)]
        if messages[-1]["role"] == "assistant":
            check_continued(messages[-1], self._messages_column or "task.answer_prefix")
        return Prompt(
            row_index=record.row_index,
            messages=messages,
            images=images,
            generation=generation,
            json_schema=self._schema(record.values),
            choices=self._choices(record.values),
            template_variables=self._template_variables(record.values),
            turns_left=turns_left,
        )

    def addresses(self, record: Record) -> list[str]:
        """Return the URLs among a row's images, over all turns; empty if the row is invalid."""
        try:
            return [ref.url for ref in self.whole(record)[1] if ref.url is not None]
        # The worker raises the same error and reports it. Here it would end the run.
        except Exception:
            return []

    def whole(self, record: Record) -> tuple[list[Message], tuple[ImageRef, ...]]:
        """Return a row's messages and images, including every turn of a dialog.

        Raises:
            RowError: the row's values do not form a prompt.
        """
        values = record.values
        images: list[ImageRef] = []
        for column in self._image_columns:
            # Messages and turns may have no image; a templated prompt needs one.
            if values[column] is None and self._prompt is None:
                continue
            if self._is_image_optional and has_no_image(values[column]):
                continue
            refs = image_refs(values[column], column)
            if not refs and self._prompt is not None:
                raise RowError(ErrorType.MISSING_IMAGE, f"{column} holds no image")
            images += refs
        return self._messages(values, images, self._instructed_schema(values))

    def _messages(
        self, values: Mapping[str, Any], images: list[ImageRef], schema: str | None
    ) -> tuple[list[Message], tuple[ImageRef, ...]]:
        if self._messages_column:
            where = self._messages_column
            messages = read_messages(values[where], where)
            last = messages[-1]
            if last["role"] == "assistant" and not (self._continues or "prefix" in last):
                # Training data: the model would see the answer and add a second one.
                raise RowError(
                    ErrorType.PROMPT,
                    f"{where} ends with the assistant's message, so there is nothing to answer "
                    f"(task=dialog data.columns.turns={where} answers the user's turns anew; "
                    "task.continue_final_message=true continues it)",
                )
        elif self._turns_column:
            where = self._turns_column
            messages = read_turns(values[where], where)
        else:
            assert self._prompt is not None
            where = "the prompt"
            text = self._prompt.render(values)
            if schema is not None:
                text += instructions(schema)
            messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        if self._system is not None and messages[0]["role"] != "system":
            text = self._system.render(values)
            messages = [{"role": "system", "content": [{"type": "text", "text": text}]}, *messages]
        if self._has_markdown:
            messages = with_markdown_images(messages)
        return fill_slots(messages, images, where)

    def _schema(self, values: Mapping[str, Any]) -> str | None:
        if self._schema_column is None or (schema := values[self._schema_column]) is None:
            return None
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            compile_schema(text)
        except (InvalidSchemaError, TypeError) as error:
            raise RowError(ErrorType.PROMPT, f"{self._schema_column}: {error}") from error
        return text

    def _instructed_schema(self, values: Mapping[str, Any]) -> str | None:
        """Return the schema to append to the prompt; None for no instructions."""
        if not self._has_instructions or self._choices(values) is not None:
            return None
        return self._schema(values) or self._run_schema

    def _template_variables(self, values: Mapping[str, Any]) -> dict[str, Any]:
        where = self._variables_column
        if where is None or (given := values[where]) is None:
            return {}
        if isinstance(given, str):
            given = read_json(given, where)
        if not isinstance(given, dict):
            raise RowError(
                ErrorType.PROMPT, f"{where} is {type(given).__name__}; it takes {_VARIABLES}"
            )
        try:
            json.dumps(given, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RowError(
                ErrorType.PROMPT, f"{where} holds a value that is no JSON; it takes {_VARIABLES}"
            ) from error
        # A Parquet struct has the keys of all rows; null ones are treated as absent.
        return {name: value for name, value in given.items() if value is not None}

    def _choices(self, values: Mapping[str, Any]) -> tuple[str, ...] | None:
        if self._choice_column is None or (listed := values[self._choice_column]) is None:
            return None
        if isinstance(listed, str):
            listed = read_json(listed, self._choice_column)
        if problem := _why_no_choices(listed):
            raise RowError(
                ErrorType.PROMPT,
                f"{self._choice_column} {problem}; choices are a list of strings, "
                "none of them empty",
            )
        return tuple(dict.fromkeys(listed))


def _why_no_choices(listed: Any) -> str | None:
    """Return what is wrong with a value of the column of choices; None if nothing is."""
    if not isinstance(listed, list):
        return f"is {type(listed).__name__}"
    if not listed:
        return "is an empty list"
    for choice in listed:
        if choice is None:
            return "holds a null"
        if not isinstance(choice, str):
            return f"holds {type(choice).__name__}"
        if not choice:
            return "holds an empty text"
    return None


@lru_cache(maxsize=256)
def instructions(schema: str) -> str:
    """Return the text that asks for JSON of a schema; empty above 16,384 characters of schema.

    The schema is written without white space and without keys that do not constrain the answer.
    """
    text = json.dumps(
        _without_annotations(json.loads(schema)), ensure_ascii=False, separators=(",", ":")
    )
    if len(text) > _MAX_SCHEMA_CHARS:
        return ""
    return f"\n\nAnswer with JSON that fits this JSON schema, and with nothing else:\n{text}"


def _without_annotations(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_annotations(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = {
        k for k in _ANNOTATIONS if isinstance(schema.get(k), str | list | bool | int | float)
    }
    return {key: _without_annotations(value) for key, value in schema.items() if key not in dropped}


_MAX_SCHEMA_CHARS = 16_384
_ANNOTATIONS = ("$schema", "$id", "id", "$comment", "examples")


def _cut_at_turn(
    messages: Sequence[Message],
    images: tuple[ImageRef, ...],
    answered: Sequence[Completion],
    prefix: str,
) -> tuple[list[Message], tuple[ImageRef, ...], int]:
    """Cut a dialog after the next user turn to answer, and insert the earlier answers.

    Args:
        answered: the answers to the first turns.
        prefix: the text that each of these continued.

    Returns:
        The messages, their images, and the number of turns after this one.
    """
    cut: list[Message] = []
    answers = iter(answered)
    num_turns = sum(message["role"] == "user" for message in messages)
    for message in messages:
        cut.append(message)
        if message["role"] != "user":
            continue
        answer = next(answers, None)
        if answer is None:
            break
        cut.append(_assistant_message(prefix + answer.text))
    num_images = sum(part["type"] == "image" for m in cut for part in m["content"])
    return cut, images[:num_images], num_turns - len(answered) - 1


def _assistant_message(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _generation_columns(columns: GenerationColumnsConfig) -> dict[str, str]:
    named = {f.name: getattr(columns, f.name) for f in fields(columns)}
    return {key: column for key, column in named.items() if column}


_TAKES = {int: "a number", float: "a number", bool: "true or false", list: "strings"}
_VARIABLES = "variables of the chat template, as an object or JSON text"
_TAKEN = {
    "data.columns.image": "bytes, a path, a data: URI, base64, a struct of these, or a list",
    "data.columns.messages": "chat messages, as a list or JSON text",
    "data.columns.turns": "a list of user turns, or JSON text of it",
    "data.columns.chat_template_kwargs": _VARIABLES,
    "task.output.json_schema_column": "a JSON schema",
    "task.output.choice_column": "a list of strings, or JSON text of it",
}
"""What the columns of these settings hold; numbers and times never do."""


def _is_plain(kind: Any) -> bool:
    """Whether an Arrow type is of numbers, times, or true and false."""
    from pyarrow import types

    return bool(types.is_primitive(kind) or types.is_decimal(kind))


def _may_hold(wanted: str, kind: Any) -> bool:
    """Whether a column of this Arrow type can hold values that `_read_setting` accepts."""
    from pyarrow import types

    if types.is_dictionary(kind) or (wanted == "strings" and types.is_nested(kind)):
        kind = getattr(kind, "value_type", kind)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    fits = {
        "a number": types.is_integer(kind) or types.is_floating(kind),
        "true or false": types.is_boolean(kind),
        "strings": is_text,
    }
    return bool(types.is_null(kind) or fits[wanted])


def resolve_generation(
    cfg: GenerationConfig, values: Mapping[str, Any], row_index: int
) -> Generation:
    """Return the generation settings of a row: its columns override the configured ones.

    A seed from a column is used unchanged. The configured seed is hashed with the row index, so
    that rows draw different samples, and a row draws the same in any batch and run.

    Raises:
        RowError: a column's value has the wrong type or is out of range (`prompt`).
    """
    settings: dict[str, Any] = {
        f.name: getattr(cfg, f.name) for f in fields(Generation) if f.name != "stop"
    }
    settings["stop"] = tuple(cfg.stop)
    settings["seed"] = derived_seed(cfg.seed, row_index)
    names: dict[str, str] = {}
    for key, column in _generation_columns(cfg.columns).items():
        if values[column] is not None:
            settings[key] = _read_setting(key, values[column], column, type(settings[key]))
            names[key] = column
    low, high = "min_new_tokens", "max_new_tokens"
    if settings[low] > settings[high]:
        bounds = (f"{names.get(key, f'generation.{key}')}={settings[key]}" for key in (low, high))
        raise RowError(ErrorType.PROMPT, " must be at most ".join(bounds))
    return Generation(**settings)


def _read_setting(key: str, value: Any, column: str, kind: type) -> Any:
    if kind is tuple:
        strings = [value] if isinstance(value, str) else value
        if isinstance(strings, list) and all(isinstance(s, str) and s for s in strings):
            return tuple(strings)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        low, high = GENERATION_LIMITS[key]
        if not low <= value <= high:
            raise RowError(ErrorType.PROMPT, f"{column}={value} must lie between {low} and {high}")
        if kind is float or int(value) == value:
            return kind(value)
    raise RowError(
        ErrorType.PROMPT,
        f"{column} is {type(value).__name__}, which is no value for generation.{key}",
    )
