"""The columns of the output, fixed before the first row is read, and results as Arrow tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.errors import ConfigError
from batchvlm.records import Result

log = logging.getLogger(__name__)

_HF = b"huggingface"
"""Metadata key under which `datasets` stores the features of a Parquet file's columns."""

_UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError)
"""The exceptions that pyarrow raises for a value of another type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Values that are the same in every row of a run."""

    model: str
    """Name and revision."""
    fingerprint: str
    run_id: str


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    type: pa.DataType
    read: Callable[[Result, Provenance], Any]


_SIZES = pa.list_(pa.struct([("width", pa.int32()), ("height", pa.int32())]))

_KEY_COLUMNS = (
    _Column("id", pa.string(), lambda r, p: r.id),
    _Column("row_index", pa.int64(), lambda r, p: r.row_index),
    _Column("source_file", pa.string(), lambda r, p: r.source_file),
)
_TEXT_COLUMNS = (
    _Column("status", pa.string(), lambda r, p: r.status.value),
    _Column("error_type", pa.string(), lambda r, p: r.failure and r.failure.error_type.value),
    _Column("error_message", pa.string(), lambda r, p: r.failure and r.failure.message),
    _Column("attempts", pa.int32(), lambda r, p: r.attempts),
    _Column("generated_text", pa.string(), lambda r, p: r.generated_text),
)
_TEXTS = _Column("generated_texts", pa.list_(pa.string()), lambda r, p: r.generated_texts)
_REASONS = _Column(
    "finish_reasons",
    pa.list_(pa.string()),
    lambda r, p: r.finish_reasons and [reason.value for reason in r.finish_reasons],
)
_TOKEN_IDS = _Column("token_ids", pa.list_(pa.int32()), lambda r, p: r.token_ids)
_LOGPROBS = _Column("logprobs", pa.list_(pa.float32()), lambda r, p: r.logprobs)
_PARSED = (
    _Column("parsed", pa.string(), lambda r, p: r.parsed),
    _Column("json_valid", pa.bool_(), lambda r, p: r.json_valid),
)
_CONSTRAINT = _Column("constraint", pa.string(), lambda r, p: r.constraint and r.constraint.value)
_SCORES = _Column(
    "scores",
    pa.list_(
        pa.struct(
            [("choice", pa.string()), ("logprob", pa.float32()), ("probability", pa.float32())]
        )
    ),
    lambda r, p: r.scores and [asdict(score) for score in r.scores],
)
_OTHER_COLUMNS = (
    _Column("finish_reason", pa.string(), lambda r, p: r.finish_reason and r.finish_reason.value),
    _Column("prompt_tokens", pa.int32(), lambda r, p: r.prompt_tokens),
    _Column("image_tokens", pa.int32(), lambda r, p: r.image_tokens),
    _Column("completion_tokens", pa.int32(), lambda r, p: r.completion_tokens),
    _Column("num_images", pa.int32(), lambda r, p: r.num_images),
    _Column("image_sizes", _SIZES, lambda r, p: _sizes(r.image_sizes)),
    _Column("model", pa.string(), lambda r, p: p.model),
    _Column("fingerprint", pa.string(), lambda r, p: p.fingerprint),
    _Column("run_id", pa.string(), lambda r, p: p.run_id),
    _Column("latency_s", pa.float64(), lambda r, p: r.latency_s),
)
_ALL = (
    *(*_KEY_COLUMNS, *_TEXT_COLUMNS, _TEXTS, _REASONS, _TOKEN_IDS, _LOGPROBS),
    *(*_PARSED, _CONSTRAINT, _SCORES, *_OTHER_COLUMNS),
)
_FIXED = {column.name: column for column in _ALL}


def kept_fields(input_schema: pa.Schema, names: Sequence[str]) -> list[pa.Field]:
    """Return the input's fields for `output.keep_columns`, each with its Hugging Face feature.

    `datasets` stores the features of all columns (which one is an image) in the metadata of the
    schema. Each returned field has its own feature in its metadata.

    Raises:
        ConfigError: the input has no such column.
    """
    if missing := [name for name in names if name not in input_schema.names]:
        raise ConfigError(
            f"output.keep_columns: the input has no column {missing[0]!r}",
            hint=f"it has: {', '.join(input_schema.names[:50])}",
        )
    features = _features(input_schema.metadata)
    kept = []
    for name in names:
        field = input_schema.field(name)
        if name in features:
            own = {_HF: json.dumps(features[name]).encode()}
            field = field.with_metadata((field.metadata or {}) | own)
        kept.append(field)
    return kept


def output_schema(
    kept: Sequence[pa.Field],
    *,
    generated_texts: bool = False,
    token_ids: bool = False,
    logprobs: bool = False,
    constraint: bool = False,
    scores: bool = False,
    parsed: pa.DataType | None = None,
) -> pa.Schema:
    """Return the schema of every part: its columns in order, all nullable.

    Args:
        kept: the input's fields to copy, from `kept_fields`.
        generated_texts: whether to have columns for several answers to a row.
        token_ids: whether to have a column for the token ids of the answers.
        logprobs: whether to have a column for the log-probabilities of these tokens.
        constraint: whether to have a column for how strictly decoding enforced the form.
        scores: whether to have a column for the model's score of each choice.
        parsed: type of the column `parsed`; None for text.

    Raises:
        ConfigError: a kept column has the name of another column, or a type that Parquet cannot
            store.
    """
    asked = [_TEXTS, _REASONS] * generated_texts + [_TOKEN_IDS] * token_ids + [_LOGPROBS] * logprobs
    held = [*_PARSED, *([_CONSTRAINT] * constraint), *([_SCORES] * scores)]
    fixed = [*_KEY_COLUMNS, *_TEXT_COLUMNS, *asked, *held, *_OTHER_COLUMNS]
    fields = [pa.field(column.name, column.type) for column in fixed]
    if parsed is not None:
        # The type as it is read back: Parquet has its own name for the items of a list.
        place = [field.name for field in fields].index("parsed")
        fields[place] = pa.field("parsed", _stored_type(pa.field("parsed", parsed)))
    features: dict[str, Any] = {}
    plain: list[pa.Field] = []
    for field in kept:
        _check_name(field.name, already=[other.name for other in plain])
        metadata = dict(field.metadata or {})
        if _HF in metadata:
            features[field.name] = json.loads(metadata.pop(_HF))
        # The input's field ids would number only some of the output's columns.
        metadata.pop(b"PARQUET:field_id", None)
        # Nullable also if the input's field is not: a row that could not be read has no value.
        plain.append(pa.field(field.name, _stored_type(field), metadata=metadata))
    fields[len(_KEY_COLUMNS) : len(_KEY_COLUMNS)] = plain
    schema = pa.schema(fields)
    if features:
        # `datasets` infers the features of columns that are not named here from their types.
        info = {"info": {"features": features}}
        schema = schema.with_metadata({_HF: json.dumps(info).encode()})
    return schema


def to_table(results: Sequence[Result], schema: pa.Schema, provenance: Provenance) -> pa.Table:
    """Return results as a table with one row each, in the given order.

    Never fails on a row: a lone surrogate in text becomes U+FFFD (Arrow text is UTF-8, which has no
    surrogates), and a kept value of another type than its column becomes null, with a warning.
    """
    arrays = []
    for field in schema:
        if column := _FIXED.get(field.name):
            values = [column.read(result, provenance) for result in results]
        else:
            values = [result.kept.get(field.name) for result in results]
        arrays.append(_encode(values, field))
    return pa.Table.from_arrays(arrays, schema=schema)


def _check_name(name: str, *, already: Sequence[str]) -> None:
    if name in _FIXED:
        hint = "leave it out (row_index leads back to it), or rename it in the input"
        if name == "id":
            hint = "data.columns.id=id makes it the output's; leave it out here"
        raise ConfigError(
            f"output.keep_columns: the output has a column {name!r} of its own", hint=hint
        )
    if name in already:
        raise ConfigError(
            f"output.keep_columns: {name!r} is there twice", hint="name each column once"
        )


def _stored_type(field: pa.Field) -> pa.DataType:
    """Return the type that Parquet reads back: milliseconds for timestamp[s], no number dictionary.

    With these types, tables have the same schema before writing and after reading.

    Raises:
        ConfigError: Parquet cannot store the type.
    """
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(pa.table({field.name: pa.nulls(1, _without_views(field.type))}), sink)
        return pq.read_schema(pa.BufferReader(sink.getvalue())).field(0).type
    except pa.ArrowException as error:
        # Refused now, not after the first shard.
        raise ConfigError(
            f"output.keep_columns: Parquet cannot hold {field.name!r}, which is {field.type}",
            hint="leave it out",
        ) from error


def _without_views(kind: pa.DataType) -> pa.DataType:
    """Return the type without string, binary and list views, which pyarrow cannot write in structs.

    Nested types are converted, too.
    """
    match kind:
        case pa.StructType():
            return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
        case pa.MapType():
            return pa.map_(_without_views(kind.key_type), _without_views(kind.item_type))
        case pa.FixedSizeListType():
            return pa.list_(_without_views(kind.value_type), kind.list_size)
        case pa.ListType() | pa.ListViewType():
            return pa.list_(kind.value_field.with_type(_without_views(kind.value_type)))
        case pa.LargeListType() | pa.LargeListViewType():
            return pa.large_list(kind.value_field.with_type(_without_views(kind.value_type)))
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    try:
        features = json.loads((metadata or {})[_HF])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}  # Not written by `datasets`; the Arrow types suffice.
    return features if isinstance(features, dict) else {}


def _sizes(sizes: Sequence[tuple[int, int]] | None) -> list[dict[str, int]] | None:
    return None if sizes is None else [{"width": w, "height": h} for w, h in sizes]


def _encode(values: list[Any], field: pa.Field) -> pa.Array | pa.ChunkedArray:
    if any(isinstance(value, pa.Array) for value in values):
        return _join(values, field)
    # pyarrow silently truncates 1.5 to 1 in an integer column.
    may_be_cut = pa.types.is_integer(field.type) and any(isinstance(v, float) for v in values)
    if not may_be_cut:
        try:
            return pa.array(values, type=field.type)
        except _UNFIT:
            pass  # At least one value does not fit; the loop below finds it.
    chunks = []
    for value in values:
        try:
            if pa.types.is_string(field.type) and not isinstance(value, str | None):
                # JSON lines: a key with values of several types is a text column.
                value = json.dumps(value, ensure_ascii=False)
            if isinstance(value, float) and may_be_cut:
                chunks.append(pa.array([value]).cast(field.type))
            else:
                chunks.append(pa.array([_without_surrogates(value)], type=field.type))
        except _UNFIT:
            _warn_unfit(field.name, str(field.type))
            chunks.append(pa.nulls(1, field.type))
    return pa.chunked_array(chunks, type=field.type)


def _join(values: list[Any], field: pa.Field) -> pa.Array | pa.ChunkedArray:
    """Concatenate Arrow arrays of one row each; None stands for a null."""
    kind = next(value.type for value in values if value is not None)
    rows = [pa.nulls(1, kind) if value is None else value for value in values]
    joined = pa.chunked_array(rows, kind)
    if kind != field.type:
        try:
            joined = joined.cast(field.type)
        except _UNFIT:
            return pa.chunked_array([_cast(row, field) for row in rows], field.type)
    # Thousands of chunks are slow to write.
    return joined.combine_chunks()


def _cast(row: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return row.cast(field.type)
    except _UNFIT:
        _warn_unfit(field.name, str(field.type))
        return pa.nulls(1, field.type)


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            # Decoding UTF-16 joins surrogate pairs and replaces lone surrogates.
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        case list() | tuple():
            return [_without_surrogates(item) for item in value]
        case dict():
            return {name: _without_surrogates(item) for name, item in value.items()}
    return value


@cache
def _warn_unfit(name: str, type_name: str) -> None:
    """Warn once for each column, because millions of rows may have the same fault."""
    log.warning("kept column %r: values that are no %s are left null", name, type_name)
