"""A folder of images: which files count, and that none is opened."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from batchvlm.errors import ErrorType, InputError
from batchvlm.preprocess.images import load_image
from batchvlm.prompts.messages import image_refs
from tests.conftest import picture
from tests.sources.make import check_all_ways, check_positions, open_path, plan, read_all


def touch(folder: Path, *names: str, data: bytes = b"no image") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_images_of_all_subfolders_in_the_order_of_their_names(tmp_path: Path) -> None:
    images = ["B.JPG", "a.png", "a/z.webp", "a/b/c.tiff", "x.avif", "x.bmp", "x.gif", "x.jpeg"]
    touch(tmp_path, *images, "x.tif", "notes.txt", "png", ".hidden.png", ".git/x.png", "a/._m.png")

    source = open_path("folder", tmp_path)
    records = read_all(source, ["image", "file_name"], rows_per_shard=4)

    expected = sorted([*images, "x.tif"])
    assert [r.values["file_name"] for r in records] == expected
    assert [r.id for r in records] == [r.source_file for r in records] == expected
    assert [r.values["image"] for r in records] == [{"bytes": None, "path": n} for n in expected]
    assert [r.row_index for r in records] == list(range(len(expected)))
    assert source.image_root == str(tmp_path)
    for record in records:
        assert (tmp_path / record.values["image"]["path"]).is_file()


def test_every_format_that_is_decoded_counts_by_its_usual_names(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 3))
    names = {
        "JPEG": ("jpg", "jpeg", "jpe", "jfif", "JPG"),
        "MPO": ("mpo",),
        "PNG": ("png", "apng"),
        "JPEG2000": ("jp2", "j2k"),
        "PPM": ("ppm", "pgm", "pbm", "pnm"),
    }
    for kind, suffixes in names.items():
        for suffix in suffixes:
            image.save(tmp_path / f"{kind}.{suffix}", kind)
    records = read_all(open_path("folder", tmp_path), ["image"])
    assert len(records) == sum(map(len, names.values()))
    limits = {"max_source_pixels": 99, "max_pixels": 99, "max_image_bytes": 9999}
    for record in records:
        (ref,) = image_refs(record.values["image"], "image")
        assert load_image(ref, image_root=str(tmp_path), **limits).size == (4, 3)


def test_pictures_in_formats_that_are_not_decoded_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a.png", "a.txt", "b.json", ".x.heic", "c.HEIC", "d/e.heic", "f.svg", "heic")
    assert len(read_all(open_path("folder", tmp_path), ["image"])) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"data.path: 3 pictures of {tmp_path} are no rows, since their formats are not decoded: "
        "2 .heic, 1 .svg"
    ]
    caplog.clear()
    touch(tmp_path / "g", "a.png", "a.txt")
    open_path("folder", tmp_path / "g")
    assert not caplog.records


def test_only_the_columns_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")

    (record,) = read_all(open_path("folder", tmp_path), ["file_name"])

    assert record.values == {"file_name": "a.png"}


@pytest.mark.parametrize("rows_per_shard", [1, 3, 100])
def test_every_row_comes_once_however_shards_are_read(tmp_path: Path, rows_per_shard: int) -> None:
    touch(tmp_path, *(f"{i:02}.png" for i in range(20)))

    check_all_ways(open_path("folder", tmp_path), ["image"], rows_per_shard, seed=0)


def test_paths_are_whole_where_another_root_is_set(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png")

    source = open_path("folder", tmp_path / "in", image_root=str(tmp_path))
    (record,) = read_all(source, ["image"])

    assert record.values["image"]["path"] == str(tmp_path / "in" / "a.png")
    assert record.id == "a.png"


@pytest.mark.parametrize(
    "name", ["photo:1.png", "data:x.png", "data:,x.png", "http:.png", "file:/a.png", "C:/a.png"]
)
@pytest.mark.parametrize("root", [None, "."])
def test_a_name_that_looks_like_an_address_is_a_file(
    tmp_path: Path, name: str, root: str | None
) -> None:
    touch(tmp_path, f"in/{name}", data=picture(size=(7, 5)))

    settings = {} if root is None else {"image_root": str(tmp_path)}
    source = open_path("folder", tmp_path / "in", **settings)
    (record,) = read_all(source, ["image"])
    (ref,) = image_refs(record.values["image"], "image")

    limits = {"max_source_pixels": 99, "max_pixels": 99, "max_image_bytes": 9999}
    image = load_image(ref, image_root=source.image_root, **limits)
    assert image.size == (7, 5)
    assert record.id == name


def test_identity_is_that_of_names_and_sizes(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.png", "one/b.png", "two/a.png", "two/b.png")
    touch(tmp_path, "renamed/a.png", "renamed/c.png", "moved/a.png", "moved/x/b.png")
    touch(tmp_path, "longer/a.png")
    touch(tmp_path, "longer/b.png", data=b"another image")
    os.utime(tmp_path / "two" / "a.png", (1, 1))

    one, two, *others = (
        open_path("folder", tmp_path / name).files()[0].identity
        for name in ("one", "two", "renamed", "moved", "longer")
    )

    assert one == two
    assert len({one, *others}) == 4


def test_a_dangling_link_is_a_row(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "b.png")

    assert [r.id for r in read_all(open_path("folder", tmp_path), [])] == ["a.png", "b.png"]


def test_a_name_that_is_no_text_is_a_failed_row(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    with open(os.fsencode(tmp_path) + b"/b\xff.png", "wb"):
        pass

    records = read_all(open_path("folder", tmp_path), ["image"])

    assert [r.failure is None for r in records] == [True, False]
    assert records[1].failure is not None
    assert records[1].failure.error_type is ErrorType.INPUT
    assert records[1].id == records[1].source_file == r"b\udcff.png"
    records[1].id.encode()


def test_a_folder_with_fewer_images_than_planned(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    (shard,) = plan(open_path("folder", tmp_path))
    (tmp_path / "c.png").unlink()

    records = list(open_path("folder", tmp_path).read_shard(shard, ["file_name"]))

    check_positions(records, shard)
    assert [r.failure is None for r in records] == [True, True, False]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")

    with pytest.raises(InputError, match="no such folder"):
        open_path("folder", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("folder", "a.png", ""),
        ("folder", "metadata.csv", "file_name\na.png\n"),
        ("jsonl", "a.jsonl", '{"image": "a.png"}\n'),
    ],
)
def test_a_folder_that_cannot_be_listed_is_no_silent_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, content: str
) -> None:
    for folder in (tmp_path, tmp_path / "shut", tmp_path / ".hidden"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    real, closed = os.scandir, ".hidden"

    def scandir(path: str) -> Any:
        if os.path.basename(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    # As for anybody but root.
    monkeypatch.setattr(os, "scandir", scandir)
    assert open_path(kind, tmp_path).files()[0].num_rows
    closed = "shut"
    with pytest.raises(InputError, match=r"cannot list .*shut: Permission denied"):
        open_path(kind, tmp_path)
