"""Compare two outputs of one input row by row: agreement, changes, errors, lengths."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchvlm.errors import InputError
from batchvlm.report.outputs import Output
from batchvlm.report.totals import TOKENS, Draw, TokenCounts
from batchvlm.words import number_of

_COLUMNS = (
    *("row_index", "id", "status", "error_type", "generated_text", "generated_texts"),
    "parsed",
    *("prompt_tokens", "image_tokens", "completion_tokens"),
)
_CHUNK_ROWS = 8192
_MAX_FIELDS = 60
_MAX_DEPTH = 8
SAME, CHANGED = "same answer", "changed answer"
ONLY_A, ONLY_B, BOTH = "error only in A", "error only in B", "error in both"
OUTCOMES = (CHANGED, ONLY_A, ONLY_B, BOTH, SAME)


@dataclass(kw_only=True)
class Side:
    """Counts of one of the two outputs, over the rows that both have."""

    num_rows: int = 0
    """Rows in finished shards, including those that the other output lacks."""
    errors: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, TokenCounts] = field(
        default_factory=lambda: {name: TokenCounts() for name in TOKENS}
    )
    num_chars: int = 0
    num_answers: int = 0


@dataclass(kw_only=True)
class Comparison:
    """The result of comparing two outputs."""

    is_by_id: bool
    """Whether rows are matched by `id`, because the inputs differ, rather than by `row_index`."""
    a: Side = field(default_factory=Side)
    b: Side = field(default_factory=Side)
    outcomes: Counter[str] = field(default_factory=Counter)
    drawn: dict[str, Draw] = field(default_factory=dict)
    """Outcome -> rows of A that were sampled from it."""
    fields: dict[str, list[int]] = field(default_factory=dict)
    """For JSON answers: dotted path -> [rows in which both agree, rows]."""
    num_json_same: int = 0
    num_json: int = 0
    """Rows with a JSON answer in both outputs."""
    rows_b: dict[int, int] = field(default_factory=dict)
    """If matched by id: sampled row of A -> row of B."""

    @property
    def num_both(self) -> int:
        """Number of rows that both outputs have."""
        return self.outcomes.total()

    @property
    def num_answered(self) -> int:
        """Number of rows that both outputs answered."""
        return self.outcomes[SAME] + self.outcomes[CHANGED]


def compare(a: Output, b: Output, *, num_sampled: int, seed: int = 0) -> Comparison:
    """Compare two outputs, in memory bounded by a chunk of rows.

    If the inputs differ, rows are matched by id, and the rows of B are all held in memory.

    Raises:
        InputError: no row is in both, or several rows have the same id.
        OutputError: a part cannot be read.
    """
    found = Comparison(is_by_id=a.run.identity.get("input") != b.run.identity.get("input"))
    found.drawn = {outcome: Draw(num_sampled, seed) for outcome in OUTCOMES}
    pairs = _pairs_by_id(a, b, found) if found.is_by_id else _pairs_by_row(a, b, found)
    for table_a, table_b in pairs:
        _add(found, table_a, table_b)
    if not found.num_both:
        raise InputError(
            f"{a.folder} and {b.folder} have no row in common",
            hint="compare two outputs of one input, both with finished shards",
        )
    return found


class _Reader:
    """Reads the rows of an output in the order of `row_index`, one range at a time."""

    def __init__(self, output: Output) -> None:
        self._batches = output.batches(_COLUMNS)
        self._rest = _empty(output)
        self._is_over = False
        self.num_rows = 0

    def take(self, stop: int) -> pa.Table:
        """Return the rows before `stop` that were not returned yet."""
        tables = [self._rest]
        while not self._is_over and (tables[-1].num_rows == 0 or _last(tables[-1]) < stop):
            batch = next(self._batches, None)
            if batch is None:
                self._is_over = True
            else:
                tables.append(pa.Table.from_batches([batch]))
        table = pa.concat_tables(tables)
        num = int(np.searchsorted(table["row_index"].to_numpy(), stop))
        self._rest = table.slice(num)
        self.num_rows += num
        return table.slice(0, num)


def _empty(output: Output) -> pa.Table:
    names = [name for name in _COLUMNS if name in output.schema.names]
    if not names:
        raise InputError(
            f"{output.folder} has no finished shard yet",
            hint="wait for the job, or run it again",
        )
    return pa.schema([output.schema.field(name) for name in names]).empty_table()


def _last(table: pa.Table) -> int:
    return int(table["row_index"][-1].as_py())


def _pairs_by_row(a: Output, b: Output, found: Comparison) -> Iterator[tuple[pa.Table, pa.Table]]:
    one, two = _Reader(a), _Reader(b)
    for start in range(0, max(a.num_planned, b.num_planned), _CHUNK_ROWS):
        table_a, table_b = one.take(start + _CHUNK_ROWS), two.take(start + _CHUNK_ROWS)
        found.a.num_rows, found.b.num_rows = one.num_rows, two.num_rows
        rows_a, rows_b = table_a["row_index"].to_numpy(), table_b["row_index"].to_numpy()
        _, places_a, places_b = np.intersect1d(
            rows_a, rows_b, assume_unique=True, return_indices=True
        )
        yield table_a.take(places_a), table_b.take(places_b)


def _pairs_by_id(a: Output, b: Output, found: Comparison) -> Iterator[tuple[pa.Table, pa.Table]]:
    tables = [pa.Table.from_batches([batch]) for batch in b.batches(_COLUMNS)]
    table_b = pa.concat_tables([_empty(b), *tables])
    found.b.num_rows = table_b.num_rows
    ids = table_b["id"].combine_chunks()
    _check_unique(b, table_b.num_rows - pc.count_distinct(ids).as_py())
    reader = _Reader(a)
    num_matched = np.zeros(table_b.num_rows, np.int64)
    for start in range(0, a.num_planned, 8 * _CHUNK_ROWS):
        table_a = reader.take(start + 8 * _CHUNK_ROWS)
        found.a.num_rows = reader.num_rows
        places = pc.index_in(table_a["id"].combine_chunks(), value_set=ids)
        known = pc.is_valid(places)
        places = places.drop_null()
        num_matched += np.bincount(places.to_numpy(), minlength=len(num_matched))
        yield table_a.filter(known), table_b.take(places)
    _check_unique(a, int(num_matched.sum() - np.count_nonzero(num_matched)))


def _check_unique(output: Output, num_repeated: int) -> None:
    if num_repeated:
        raise InputError(
            f"{output.folder}: {number_of(num_repeated, 'repeated id')}, and the inputs differ",
            hint="rows can only be matched by unique ids: set data.columns.id",
        )


def _add(found: Comparison, a: pa.Table, b: pa.Table) -> None:
    rows = a["row_index"].to_numpy()
    failed_a, failed_b = _is_error(a), _is_error(b)
    is_same = _has_same_answer(a, b)
    masks = {
        SAME: ~failed_a & ~failed_b & is_same,
        CHANGED: ~failed_a & ~failed_b & ~is_same,
        ONLY_A: failed_a & ~failed_b,
        ONLY_B: ~failed_a & failed_b,
        BOTH: failed_a & failed_b,
    }
    rows_b = b["row_index"].to_numpy()
    for outcome, mask in masks.items():
        found.outcomes[outcome] += int(mask.sum())
        found.drawn[outcome].add(rows[mask])
    if found.is_by_id:
        pairs = found.rows_b | dict(zip(rows.tolist(), rows_b.tolist(), strict=True))
        found.rows_b = {row: pairs[row] for row in drawn_rows(found)}
    for side, table in ((found.a, a), (found.b, b)):
        for item in pc.value_counts(table["error_type"].combine_chunks().drop_null()):
            side.errors[item["values"].as_py()] += item["counts"].as_py()
        for name, counts in side.tokens.items():
            if name in table.column_names:
                counts.add(table[name].drop_null().to_numpy())
        texts = _texts(table)
        side.num_chars += pc.sum(pc.utf8_length(texts)).as_py() or 0
        side.num_answers += len(texts)
    both = np.flatnonzero(masks[SAME] | masks[CHANGED])
    for one, two in zip(a["parsed"].take(both), b["parsed"].take(both), strict=True):
        if one.is_valid and two.is_valid:
            _add_json(found, one.as_py(), two.as_py())


def _has_same_answer(a: pa.Table, b: pa.Table) -> npt.NDArray[np.bool_]:
    same = pc.fill_null(pc.equal(a["generated_text"], b["generated_text"]), False)
    is_same = np.asarray(same.to_numpy(zero_copy_only=False), dtype=bool)
    if "generated_texts" in a.column_names and "generated_texts" in b.column_names:
        pairs = zip(a["generated_texts"].to_pylist(), b["generated_texts"].to_pylist(), strict=True)
        is_same &= np.fromiter((are_same(one, two) for one, two in pairs), bool, len(is_same))
    return is_same


def are_same(one: Sequence[str] | None, two: Sequence[str] | None) -> bool:
    """Whether two lists of answers are equal; True if one is None, so that it has one answer."""
    return one is None or two is None or one == two


def _texts(table: pa.Table) -> Any:
    """Return every answer, including dialog turns and further answers to a row."""
    first = table["generated_text"]
    if "generated_texts" not in table.column_names:
        return first.drop_null()
    several = table["generated_texts"]
    single = first.filter(pc.is_null(several)).drop_null()
    return pa.chunked_array([*pc.list_flatten(several).chunks, *single.chunks], pa.string())


def _is_error(table: pa.Table) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.equal(table["status"], "error").to_numpy(zero_copy_only=False), dtype=bool)


def _add_json(found: Comparison, a: str, b: str) -> None:
    pairs = paired_fields(a, b)
    found.num_json += 1
    found.num_json_same += all(one == two for _, one, two in pairs)
    for name, one, two in pairs:
        if name in found.fields or len(found.fields) < _MAX_FIELDS:
            counts = found.fields.setdefault(name, [0, 0])
            counts[0] += one == two
            counts[1] += 1


def paired_fields(a: str | None, b: str | None) -> list[tuple[str, str, str]]:
    """Return the dotted path of each field, with its values in A and in B as JSON text.

    A missing field counts as null, because typed answers have null for absent properties.
    """
    one, two = _json_fields(a), _json_fields(b)
    return [(name, one.get(name, "null"), two.get(name, "null")) for name in one | two]


def _json_fields(text: str | None) -> dict[str, str]:
    """Return dotted path -> value as JSON text; a list is one value, whose order counts."""
    try:
        value = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {} if value is None else dict(_split(value, "", 0))


def _split(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth < _MAX_DEPTH:
        for name, item in value.items():
            yield from _split(item, f"{path}.{name}" if path else name, depth + 1)
    else:
        yield path or "(the answer)", json.dumps(value, ensure_ascii=False, sort_keys=True)


def drawn_rows(found: Comparison, outcomes: Sequence[str] = OUTCOMES) -> list[int]:
    """Return the sampled rows of A with these outcomes, ascending."""
    return sorted(row for outcome in outcomes for row in found.drawn[outcome].rows)
