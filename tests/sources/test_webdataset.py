"""WebDataset tar shards: rows by key, read where they lie, and archives that mean harm."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from batchvlm.errors import ErrorType, InputError
from batchvlm.records import Record
from tests.sources.make import check_all_ways, check_positions, open_path, plan, read_all


def write(path: Path, *members: Any, **options: Any) -> Path:
    """Members as (name, content) or as a `TarInfo`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(num: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(first, first + num)
        for member in (
            (f"{i:05}.jpg", b"picture %d" % i),
            (f"{i:05}.json", json.dumps({"n": i}).encode()),
            (f"{i:05}.txt", f"text {i}".encode()),
        )
    ]


def read(path: Path, *columns: str, **settings: Any) -> list[Record]:
    source = open_path("webdataset", path, id_column="__key__", **settings)
    return read_all(source, columns or source.schema.names)


def message(record: Record) -> str:
    assert record.failure is not None
    assert record.failure.error_type is ErrorType.INPUT
    return record.failure.message


def test_neighbouring_members_of_one_key_are_a_row(tmp_path: Path) -> None:
    members = [
        ("./a/1.JPG", b"one"),
        ("./a/1.seg.png", b"mask"),
        ("./a/1.json", b'{"q": ["what?"]}'),
        ("./a/2.txt", "zwölf".encode()),
        ("./a/2.bin", b"\xff"),
        ("README", b"no row"),
        (".hidden.jpg", b"no row"),
        ("b.png", b"two"),
    ]
    first, second, third = read(write(tmp_path / "x.tar", *members))
    assert [r.id for r in (first, second, third)] == ["./a/1", "./a/2", "b"]
    picture = {"bytes": b"one", "path": "./a/1.JPG"}
    assert first.values == {
        "__key__": "./a/1",
        "image": picture,
        "jpg": picture,
        "seg.png": {"bytes": b"mask", "path": "./a/1.seg.png"},
        "json": {"q": ["what?"]},
        "txt": None,
        "bin": None,
        "png": None,
    }
    assert second.values["txt"] == "zwölf"
    assert (second.values["bin"], second.values["image"]) == (b"\xff", None)
    assert third.values["image"] == {"bytes": b"two", "path": "b.png"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_row_comes_once_however_shards_are_read(tmp_path: Path, format: int) -> None:
    long = "x" * 60 + "/" + "y" * 90
    write(tmp_path / "a.tar", *samples(20), (f"{long}.jpg", b"long"), format=format)
    write(tmp_path / "sub" / "b.tar", *samples(5, 20), format=format)
    write(tmp_path / "empty.tar")
    source = open_path("webdataset", tmp_path, id_column="__key__")
    check_all_ways(source, ["image", "json"], 4, seed=0)
    records = read_all(source, ["image", "json"], 4)
    numbers = [r.values["json"]["n"] for r in records if r.values["json"]]
    assert numbers == list(range(25))
    assert records[20].id == long


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ("a.jpg", b"x"), ("a.json", b"broken"))
    (record,) = read(path, "image")
    assert record.failure is None
    assert record.values == {"image": {"bytes": b"x", "path": "a.jpg"}}


def test_kept_json_is_text(tmp_path: Path) -> None:
    source = open_path("webdataset", write(tmp_path / "a.tar", *samples(1)))
    (shard,) = plan(source)
    (record,) = source.read_shard(shard, [], kept=["json", "jpg", "__key__"])
    assert record.kept == {
        "json": '{"n": 0}',
        "jpg": {"bytes": b"picture 0", "path": "00000.jpg"},
        "__key__": "00000",
    }


def test_json_that_is_nested_too_deeply_is_its_rows_failure(tmp_path: Path) -> None:
    deep = b"[" * 300 + b"]" * 300
    members = [("a.json", b"5"), ("b.json", deep), ("c.json", deep[:64] + deep[-64:])]
    records = read(write(tmp_path / "a.tar", *members), "json")
    assert [bool(r.failure) for r in records] == [False, True, False]
    assert "nested too deeply" in message(records[1])


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_are_no_plain_files_are_their_rows_failures(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    path = write(
        tmp_path / "a.tar",
        ("0.jpg", b"good"),
        link("1.jpg", str(secret)),
        link("2.jpg", "0.jpg", tarfile.LNKTYPE),
        link("3.jpg", "", tarfile.CHRTYPE),
        link("4.jpg", "", tarfile.FIFOTYPE),
        ("../../5.jpg", b"way up"),
        ("/etc/6.jpg", b"absolute"),
        ("7.json", b"{"),
        ("8.json", b'"\\ud800"'),
        ("9.txt", b"\xff"),
        ("10.jpg", b"one"),
        ("10.jpg", b"two"),
        ("11.jpg", b"good"),
    )
    records = read(path)
    assert [r.row_index for r in records] == list(range(12))
    for row in (1, 2, 3, 4):
        assert "no plain file" in message(records[row])
    # Names are names: nothing outside of the archive is ever opened.
    assert records[5].values["image"] == {"bytes": b"way up", "path": "../../5.jpg"}
    assert records[6].values["image"]["bytes"] == b"absolute"
    assert "no JSON" in message(records[7]) and "no JSON" in message(records[8])
    assert "no UTF-8" in message(records[9])
    assert "same name" in message(records[10])
    assert records[11].failure is None


def test_a_key_that_is_no_text_is_a_failed_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ("a.jpg", b"x"), ("b\udcff.jpg", b"x"), ("c.jpg", b"x"))
    records = read(path, "image")
    assert [r.failure is None for r in records] == [True, False, True]
    assert records[1].id == "a.tar:1"


def test_a_picture_is_read_no_further_than_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ("a.jpg", bytes(1000)))
    (record,) = read(path, "image", max_image_bytes=10)
    assert len(record.values["image"]["bytes"]) == 11


def negative_size(data: bytes) -> bytes:
    """The first header claims a size below zero, in the binary form that GNU tar has for sizes."""
    header = bytearray(data[:512])
    header[124:136] = b"\xff" * 11 + b"\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


DAMAGES = {
    "cut in a member": lambda data: data[: 512 + 3],
    "cut in a header": lambda data: data[: 1024 + 100],
    "no archive": lambda data: b"this is no archive" * 100,
    "a header overwritten": lambda data: data[:1024] + b"\xff" * 512 + data[1536:],
    "a size below zero": negative_size,
    "two archives in one": lambda data: data + data,
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_archive_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.tar", *samples(3))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(InputError, match=r"a\.tar is no whole tar archive") as caught:
        open_path("webdataset", path).files()
    assert "\n" not in str(caught.value)


def test_a_header_of_any_size_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"comment": "x" * (2 << 20)}
    path = write(tmp_path / "a.tar", info)
    with pytest.raises(InputError, match="no whole tar archive"):
        open_path("webdataset", path).files()


def test_an_archive_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no WebDataset rows"):
        _ = open_path("webdataset", write(tmp_path / "a.tar", ("README", b""))).schema


def test_an_archive_that_changes_gives_no_new_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *samples(6))
    source = open_path("webdataset", path)
    (shard,) = plan(source)
    reader = source.read_shard(shard, ["json"])
    records = [next(reader), next(reader)]
    write(path, *samples(6, first=10))
    records += reader
    check_positions(records, shard)
    assert [r.failure is None for r in records] == [True] * 2 + [False] * 4
    assert "has changed" in message(records[-1])


def test_an_archive_that_was_only_touched_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", *samples(4))
    source = open_path("webdataset", path)
    (shard,) = plan(source)
    reader = source.read_shard(shard, ["json"])
    records = [next(reader)]
    path.touch()
    records += reader
    assert [r.values["json"]["n"] for r in records] == [0, 1, 2, 3]


def test_identity_is_that_of_the_headers(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.tar", *samples(3)), write(tmp_path / "b.tar", *samples(4))
    same = write(tmp_path / "c.tar", *samples(3))
    one, two, three = (open_path("webdataset", p).files()[0].identity for p in (a, b, same))
    assert one == three != two
