"""Count every row of an output in one pass: totals, distributions, frequent values, a sample."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchvlm.report.outputs import Output

_MAX_VALUES = 5000
"""Most distinct values that are counted for one field, or for all answers."""
_MAX_FIELDS = 40
_MAX_DEPTH = 8
_MAX_VALUE_CHARS = 160
_NUM_EXAMPLES = 3
_MAX_TOKENS = 1 << 20

# Latencies: 40 bins for each power of ten from 0.1 ms to 11 days.
_LOG_LOW, _LOG_HIGH, _PER_DECADE = -4, 6, 40

_COLUMNS = (
    *("row_index", "id", "status", "error_type", "error_message", "attempts", "generated_text"),
    *("parsed", "finish_reason", "prompt_tokens", "image_tokens", "completion_tokens"),
    *("num_images", "latency_s", "constraint"),
)
TOKENS = ("prompt_tokens", "image_tokens", "completion_tokens")


class TokenCounts:
    """A histogram of numbers of tokens; memory depends on the largest number."""

    def __init__(self) -> None:
        self.counts = np.zeros(1, dtype=np.int64)
        self.total = 0

    def add(self, values: npt.NDArray[Any]) -> None:
        if len(values):
            found = np.bincount(np.clip(values, 0, _MAX_TOKENS))
            if len(found) > len(self.counts):
                self.counts = np.pad(self.counts, (0, len(found) - len(self.counts)))
            self.counts[: len(found)] += found
            self.total += int(values.sum())

    @property
    def num(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return self.total / max(1, self.num)

    @property
    def max(self) -> int:
        return len(self.counts) - 1

    def quantile(self, q: float) -> int:
        """Return the smallest number that a share `q` of the rows does not exceed."""
        return int(np.searchsorted(np.cumsum(self.counts), max(1, q * self.num)))


class Latencies:
    """A histogram of seconds, with bins that are 6% wide."""

    def __init__(self) -> None:
        self.edges_s = np.logspace(_LOG_LOW, _LOG_HIGH, (_LOG_HIGH - _LOG_LOW) * _PER_DECADE + 1)
        self.counts = np.zeros(len(self.edges_s) - 1, dtype=np.int64)

    def add(self, values_s: npt.NDArray[np.float64]) -> None:
        inside = np.clip(values_s, self.edges_s[0], self.edges_s[-1])
        self.counts += np.histogram(inside, self.edges_s)[0]

    @property
    def num(self) -> int:
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """Return the seconds that a share `q` of the rows does not exceed, to within 6%."""
        place = int(np.searchsorted(np.cumsum(self.counts), max(1, q * self.num)))
        return float(self.edges_s[min(place + 1, len(self.edges_s) - 1)])


@dataclass
class Values:
    """Counts of values; values that are new once `_MAX_VALUES` are known are counted together."""

    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Counts by the start of the value, which is shown, and a hash if the value is longer."""
    num: int = 0
    num_others: int = 0
    numbers: int = 0
    """How many values are numbers; the fields below are their sum, minimum and maximum."""
    total: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, value: str, count: int = 1) -> None:
        self.num += count
        is_long = len(value) > _MAX_VALUE_CHARS
        key = f"{value[:_MAX_VALUE_CHARS]}…" if is_long else value, hash(value) if is_long else 0
        if key in self.counts or len(self.counts) < _MAX_VALUES:
            self.counts[key] += count
        else:
            self.num_others += count

    def add_number(self, value: float) -> None:
        self.numbers += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)

    def most_common(self, num: int) -> list[tuple[str, int]]:
        """Return the starts of the most frequent values, with the count of each value."""
        return [(shown, count) for (shown, _), count in self.counts.most_common(num)]

    @property
    def is_full(self) -> bool:
        return self.num_others > 0


class Draw:
    """A random sample of at most `size` of the row indices added; the seed determines it."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._salt = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x1234567) & (1 << 64) - 1)
        self._keys = np.zeros(0, dtype=np.uint64)
        self._rows = np.zeros(0, dtype=np.int64)

    def add(self, rows: npt.NDArray[np.int64]) -> None:
        """Keep the rows with the smallest keys; a key depends on the row and the seed alone."""
        keys = np.concatenate([self._keys, _mix(rows.astype(np.uint64) + self._salt)])
        rows = np.concatenate([self._rows, rows])
        if len(rows) > self._size:
            order = np.argpartition(keys, max(0, self._size - 1))[: self._size]
            keys, rows = keys[order], rows[order]
        self._keys, self._rows = keys, rows

    @property
    def rows(self) -> list[int]:
        return sorted(self._rows.tolist())


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # SplitMix64's finalizer: neighbouring rows get unrelated keys.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(kw_only=True)
class Totals:
    """Counts over all rows; see `read_totals`."""

    sample: Draw
    failed: Draw
    num_rows: int = 0
    num_success: int = 0
    num_images: int = 0
    num_retried: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """For each error type some (id, message) pairs, each message once."""
    finish_reasons: Counter[str] = field(default_factory=Counter)
    constraints: Counter[str] = field(default_factory=Counter)
    """Rows by how strictly decoding enforced the form."""
    tokens: dict[str, TokenCounts] = field(
        default_factory=lambda: {name: TokenCounts() for name in TOKENS}
    )
    latencies: Latencies = field(default_factory=Latencies)
    answers: Values = field(default_factory=Values)
    fields: dict[str, Values] = field(default_factory=dict)
    """For JSON answers: dotted path -> its values."""

    @property
    def num_errors(self) -> int:
        return self.errors.total()


def read_totals(output: Output, *, num_sampled: int, num_failed: int, seed: int) -> Totals:
    """Read the whole output once, in bounded memory.

    Args:
        num_sampled: number of rows to sample from all.
        num_failed: number of rows to sample from those with an error.
        seed: seed of both samples.

    Raises:
        OutputError: a part cannot be read.
    """
    totals = Totals(sample=Draw(num_sampled, seed), failed=Draw(num_failed, seed))
    for batch in output.batches(_COLUMNS):
        _add(totals, batch)
    return totals


def _add(totals: Totals, batch: Any) -> None:
    rows = batch.column("row_index").to_numpy(zero_copy_only=False)
    is_error = pc.equal(batch.column("status"), "error").to_numpy(zero_copy_only=False)
    is_error = is_error.astype(bool)
    totals.num_rows += len(rows)
    totals.num_success += int((~is_error).sum())
    totals.sample.add(rows)
    totals.failed.add(rows[is_error])
    totals.num_images += pc.sum(batch.column("num_images")).as_py() or 0
    totals.num_retried += pc.sum(pc.greater(batch.column("attempts"), 1)).as_py() or 0
    for counts, name in (
        (totals.errors, "error_type"),
        (totals.finish_reasons, "finish_reason"),
        (totals.constraints, "constraint"),
    ):
        if name in batch.schema.names:  # only some tasks have `constraint`
            counts.update(dict(_value_counts(batch.column(name))))
    for name, tokens in totals.tokens.items():
        tokens.add(batch.column(name).drop_null().to_numpy(zero_copy_only=False))
    totals.latencies.add(batch.column("latency_s").drop_null().to_numpy(zero_copy_only=False))
    _add_examples(totals, batch, np.flatnonzero(is_error))
    texts = batch.column("generated_text")
    for text, count in _value_counts(texts):
        totals.answers.add(text, count)
    for text in batch.column("parsed").drop_null():
        _add_fields(totals, text.as_py())


def _value_counts(column: Any) -> Iterator[tuple[str, int]]:
    for item in pc.value_counts(column.drop_null()):
        yield item["values"].as_py(), item["counts"].as_py()


def _add_examples(totals: Totals, batch: Any, failed: npt.NDArray[Any]) -> None:
    kinds = batch.column("error_type").take(pa.array(failed)).to_pylist()
    for place, kind in zip(failed.tolist(), kinds, strict=True):
        examples = totals.examples.setdefault(str(kind), [])
        if len(examples) < _NUM_EXAMPLES:
            message = str(batch.column("error_message")[place].as_py())
            if message not in {known for _, known in examples}:
                examples.append((str(batch.column("id")[place].as_py()), message))


def _add_fields(totals: Totals, text: str) -> None:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return
    for path, value in leaves(parsed):
        if path not in totals.fields and len(totals.fields) >= _MAX_FIELDS:
            continue
        values = totals.fields.setdefault(path, Values())
        values.add(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # JSON integers can be larger than any float.
        if is_number and abs(value) <= sys.float_info.max:
            values.add_number(value)


def leaves(
    value: Any, path: str = "", depth: int = 0, *, numbered: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield the values of a JSON document with their dotted paths.

    List items share one path, `a[]`, unless `numbered`: `a[0]`.
    """
    if depth < _MAX_DEPTH and isinstance(value, dict) and value:
        for name, item in value.items():
            below = f"{path}.{name}" if path else name
            yield from leaves(item, below, depth + 1, numbered=numbered)
    elif depth < _MAX_DEPTH and isinstance(value, list) and value:
        for place, item in enumerate(value):
            below = f"{path}[{place if numbered else ''}]"
            yield from leaves(item, below, depth + 1, numbered=numbered)
    else:
        yield path or "(the answer)", value
