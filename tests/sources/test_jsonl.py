"""JSON lines: what is a row, what is a failure, and reading from the middle."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.errors import ErrorType, InputError
from batchvlm.sources import jsonl
from tests.sources.make import check_all_ways, check_positions, open_path, plan, read_all


def write_lines(path: Path, *lines: str | bytes, end: bytes = b"\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(end.join([*text, b""]))
    return path


def numbered(num_rows: int, first: int = 0) -> list[str]:
    return [json.dumps({"n": n, "key": f"k{n}"}) for n in range(first, first + num_rows)]


def test_rows_come_with_their_place(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.ndjson", *numbered(3, first=4))
    write_lines(tmp_path / "a.jsonl", *numbered(4))
    write_lines(tmp_path / "c.txt", *numbered(4))

    records = read_all(open_path("jsonl", tmp_path), ["n"], rows_per_shard=2)

    assert [r.values for r in records] == [{"n": n} for n in range(7)]
    assert [r.row_index for r in records] == list(range(7))
    assert [r.id for r in records] == [
        *(f"a.jsonl:{i}" for i in range(4)),
        *(f"b.ndjson:{i}" for i in range(3)),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"n": 0}\n{"n": 1}\n', [0, 1]),
        (b'{"n": 0}\n{"n": 1}', [0, 1]),
        (b'{"n": 0}\r\n{"n": 1}\r\n', [0, 1]),
        (b'\n\n{"n": 0}\n  \t\r\n\n{"n": 1}\n\n', [0, 1]),
        (b'\xef\xbb\xbf{"n": 0}\n{"n": 1}', [0, 1]),
        (b'\xef\xbb\xbf\n{"n": 0}\n', [0]),
        (b' {"n": 0} \n\t{"n": 1}\t', [0, 1]),
        (b'{"n": "a\xe2\x80\xa8b"}\n', ["a\u2028b"]),
        (b'{"n": "a\x0cb"}\n{"n": 1}', [None, 1]),
        (b"", []),
        (b"\n \n", []),
    ],
)
def test_lines(tmp_path: Path, text: bytes, expected: list[Any]) -> None:
    (tmp_path / "a.jsonl").write_bytes(text)

    records = read_all(open_path("jsonl", tmp_path / "a.jsonl"), ["n"], rows_per_shard=1)

    assert [r.values.get("n") for r in records] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": 1', "delimiter"),
        (b"not json, secret", "Expecting value at character 0"),
        (b"[1, 2]", "it holds a list"),
        (b'"secret"', "it holds a str"),
        (b"null", "it holds a NoneType"),
        (b'{"n": 1} {"n": 2}', "Extra data"),
        (b'{"n": "\xff\xfe"}', "not UTF-8 at byte 7"),
        (b'{"n": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"n": "\\ud800 secret"}', "half a surrogate pair"),
        (b'{"n": [{"\\udfff": 1}]}', "half a surrogate pair"),
        (b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"n": ' + b"[" * 129 + b"]" * 129 + b"}", "more than 128 levels"),
        (b'{"n": ' + b'[{"a":' * 300 + b"0" + b"}]" * 300 + b"}", "nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "too long"),
        (b"\x00\x01\x02", "Expecting value"),
    ],
)
def test_a_broken_line_is_one_failed_row(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"n": 0}', line, '{"n": 2}')

    records = read_all(open_path("jsonl", path), ["n"])

    assert [r.values for r in records] == [{"n": 0}, {}, {"n": 2}]
    failure = records[1].failure
    assert failure is not None
    assert failure.error_type is ErrorType.INPUT
    assert message in failure.message
    assert "secret" not in failure.message
    assert records[1].id == "a.jsonl:1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"n": 1, "n": 2}', 2),
        ('{"n": 123456789012345678901234567890}', 123456789012345678901234567890),
        ('{"n": {"a": [1, null]}}', {"a": [1, None]}),
        ('{"n": -Infinity}', -math.inf),
        ('{"n": "\\ud83d\\ude00"}', "😀"),
        ('{"n": null}', None),
        ("{}", None),
        ('{"n": "ok", "other": "\\ud800"}', "ok"),
    ],
)
def test_values_stay_as_the_line_has_them(tmp_path: Path, text: str, expected: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", text)

    (record,) = read_all(open_path("jsonl", path), ["n"])

    assert record.failure is None
    assert record.values == {"n": expected}
    assert type(record.values["n"]) is type(expected)


def test_not_a_number_is_a_value(tmp_path: Path) -> None:
    (record,) = read_all(open_path("jsonl", write_lines(tmp_path / "a.jsonl", '{"n": NaN}')), ["n"])

    assert math.isnan(record.values["n"])


def test_the_schema_is_found_in_the_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"flag": True, "int": 1, "float": 1.5, "mixed": 1, "text": "x", "none": None},
        {"flag": None, "int": -5, "float": 2, "mixed": "1", "text": "y", "none": None},
        {"huge": 1 << 70, "list": [1], "object": {}, "bool or int": True, "nan": math.nan},
        {"huge": 1, "bool or int": 1, "late": 1},
    ]
    lines = [json.dumps(row) for row in rows]
    path = write_lines(tmp_path / "a.jsonl", *lines, "broken", '{"\\ud800": 1}')

    schema = open_path("jsonl", path).schema

    assert {field.name: str(field.type) for field in schema} == {
        "flag": "bool",
        "int": "int64",
        "float": "double",
        "mixed": "string",
        "text": "string",
        "none": "string",
        "huge": "string",
        "list": "string",
        "object": "string",
        "bool or int": "string",
        "nan": "double",
        "late": "int64",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2}]', "a.jsonl is no JSON lines: it holds a JSON array; write one obj"),
        ('[\n {"a": 1},\n {"a": 2}\n]', "it holds a JSON array"),
        ('[\n  {\n    "a": 1\n  }\n]', "it holds a JSON array"),
        ('{\n"a": 1\n}', "none of its first 3 lines is a JSON object; write one object a line"),
        ("a,b\n1,2", "none of its first 2 lines is a JSON object"),
        ("", "data.path holds no rows"),
        ("\n \n", "data.path holds no rows"),
    ],
)
def test_json_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", text)
    with pytest.raises(InputError) as caught:
        assert open_path("jsonl", path).schema
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_first_line_that_holds_a_list_is_a_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "[1]", '{"a": 1}')
    assert open_path("jsonl", path).schema.names == ["a"]
    assert [r.failure is None for r in read_all(open_path("jsonl", path), ["a"])] == [False, True]


def test_the_schema_is_taken_from_the_first_rows_over_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "SCHEMA_ROWS", 3)
    write_lines(tmp_path / "a.jsonl", '{"a": 1}', '{"a": 1}')
    write_lines(tmp_path / "b.jsonl", '{"a": 1.5, "b": 1}', '{"a": "x", "c": 1}')

    schema = open_path("jsonl", tmp_path).schema

    assert schema == pa.schema([("a", pa.float64()), ("b", pa.int64())])


@pytest.mark.parametrize(
    ("key", "expected"),
    [('"x"', "x"), ("7", "7"), ("1.5", "1.5"), ("null", "a.jsonl:0"), ("true", "True")],
)
def test_ids(tmp_path: Path, key: str, expected: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", f'{{"key": {key}, "n": 1}}')

    (record,) = read_all(open_path("jsonl", path, id_column="key"), ["n"])

    assert (record.id, record.values) == (expected, {"n": 1})


lines_of_bytes = st.lists(
    st.one_of(
        st.integers(0, 99).map(lambda n: b'{"n": %d}' % n),
        st.sampled_from([b"", b" \t", b"{", b"\xff", b"\r", b'{"n": "' + b"x" * 50 + b'"}']),
        st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(
    files=st.lists(lines_of_bytes, min_size=1, max_size=3),
    rows_per_shard=st.integers(1, 9),
    mark=st.integers(1, 5),
    chunk=st.integers(1, 30),
    is_compressed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_row_comes_once_however_shards_are_read(
    tmp_path: Path,
    files: list[list[bytes]],
    rows_per_shard: int,
    mark: int,
    chunk: int,
    is_compressed: bool,
    seed: int,
) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    for i, lines in enumerate(files):
        text = b"\n".join(lines)
        name = f"{i}.jsonl.gz" if is_compressed else f"{i}.jsonl"
        (tmp_path / name).write_bytes(gzip.compress(text) if is_compressed else text)
    lines = [line for file in files for line in file if line.strip(b" \t\r\xef\xbb\xbf")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "ROWS_PER_MARK", mark)
        patch.setattr(jsonl, "CHUNK_BYTES", chunk)
        patch.setattr(jsonl, "CHUNK_ROWS", mark)
        source = open_path("jsonl", tmp_path)
        check_all_ways(source, ["n"], rows_per_shard, seed)
        records = read_all(source, ["n"], rows_per_shard)

    def parse(line: bytes) -> Any:
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except ValueError:
            return None
        return value.get("n") if isinstance(value, dict) else None

    assert [r.values.get("n") for r in records] == [parse(line) for line in lines]


def test_a_shard_starts_with_one_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", *numbered(20_000))
    source = open_path("jsonl", path)
    shards = plan(source, 10)
    taken: list[bytes] = []
    rows = jsonl._rows

    def spy(file: Any) -> Iterator[bytes]:
        for line in rows(file):
            taken.append(line)
            yield line

    monkeypatch.setattr(jsonl, "_rows", spy)

    records = list(source.read_shard(shards[1990], ["n"]))

    assert [r.values["n"] for r in records] == list(range(19_900, 19_910))
    assert len(taken) <= jsonl.ROWS_PER_MARK + 10


def test_compressed_shards_in_turn_read_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(numbered(1000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    source = open_path("jsonl", tmp_path)
    shards = plan(source, 30)
    opened: list[Any] = []
    rows = jsonl._rows

    def spy(file: Any) -> Iterator[bytes]:
        opened.append(file)
        return rows(file)

    monkeypatch.setattr(jsonl, "_rows", spy)

    records = [r for s in shards for r in source.read_shard(s, ["n"])]

    assert [r.values["n"] for r in records] == list(range(1000))
    assert len(opened) == 1


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one" / "a.jsonl", *numbered(10))
    two = write_lines(tmp_path / "two" / "a.jsonl", *numbered(10))
    os.utime(two, (1, 1))
    three = write_lines(tmp_path / "three" / "a.jsonl", *numbered(10)[::-1])
    assert one.stat().st_size == three.stat().st_size

    identities = [open_path("jsonl", path).files()[0].identity for path in (one, two, three)]

    assert identities[0] == identities[1] != identities[2]


def test_urls(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    text = "\n".join(numbered(50)).encode()
    fs.pipe({"/jl/a.jsonl": text, "/jl/b.jsonl.gz": gzip.compress(text)})
    try:
        source = open_path("jsonl", "memory://jl")
        assert source.image_root is None
        assert [r.values["n"] for r in read_all(source, ["n"])] == [*range(50), *range(50)]
    finally:
        fs.rm("/jl", recursive=True)


# --- files that change or are damaged ---


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("change", [shorten, Path.unlink])
@pytest.mark.parametrize("rows_per_shard", [3, 100])
def test_a_file_that_changed_since_the_plan_fails_its_rows(
    tmp_path: Path, change: Callable[[Path], None], rows_per_shard: int
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *numbered(12))
    source = open_path("jsonl", path)
    shards = plan(source, rows_per_shard)
    change(path)

    for shard in shards:
        records = list(source.read_shard(shard, ["n"]))
        check_positions(records, shard)
        assert all(r.failure and "a.jsonl" in r.failure.message for r in records)
        skipped = list(source.read_shard(shard, ["n"], skip={0, 1}))
        check_positions(skipped, shard, skip={0, 1})


def test_a_grown_file_gives_the_planned_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *numbered(5))
    source = open_path("jsonl", path)
    (shard,) = plan(source, 10)
    write_lines(path, *numbered(9))

    assert [r.values["n"] for r in source.read_shard(shard, ["n"])] == [0, 1, 2, 3, 4]


def test_a_damaged_archive_is_an_early_error(tmp_path: Path) -> None:
    data = gzip.compress(os.urandom(5000).hex().encode())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    source = open_path("jsonl", tmp_path)

    for read in (source.files, lambda: source.schema):
        with pytest.raises(InputError, match="cannot read"):
            read()


def test_an_archive_damaged_since_the_plan_fails_the_rest() -> None:
    """Elsewhere than on a disk, where a change is not seen before the damage is."""
    fs = fsspec.filesystem("memory")
    lines = [json.dumps({"n": n, "noise": os.urandom(99).hex()}) for n in range(3000)]
    data = gzip.compress("\n".join(lines).encode())
    fs.pipe("/damage/a.jsonl.gz", data)
    source = open_path("jsonl", "memory://damage")
    shards = plan(source, 500)
    fs.pipe("/damage/a.jsonl.gz", data[: len(data) // 2])
    try:
        records = [r for s in shards for r in source.read_shard(s, ["n"])]
    finally:
        fs.rm("/damage", recursive=True)

    num_good = sum(r.failure is None for r in records)
    assert 1000 < num_good < 2000
    expected = [*range(num_good), *[None] * (3000 - num_good)]
    assert [r.values.get("n") for r in records] == expected
