"""What counts as a file of the input, and under which name."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from batchvlm.errors import InputError
from batchvlm.sources.files import image_root_of, list_files, listing_of

SUFFIXES = (".parquet",)


def test_a_root_for_images_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    for name in ("none", "a.parquet"):
        with pytest.raises(InputError, match=r"data\.image_root: no such folder: .*" + name):
            image_root_of(str(tmp_path / name), "/own")
    # The own folder of a stream of the hub is no place of this machine.
    assert image_root_of(None, "/own") == "/own"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = "b.parquet", "a.PARQUET", "sub/c.parquet", "sub/deep/d.parquet", "e.txt"
    hidden = ".h.parquet", "_metadata.parquet", ".git/x.parquet", "_tmp/y.parquet"
    for name in (*names, *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(path: object) -> list[str]:
    return list(list_files(str(path), suffixes=SUFFIXES).paths)


def test_a_folder_is_searched_with_its_subfolders(tree: Path) -> None:
    assert names(tree) == ["a.PARQUET", "b.parquet", "sub/c.parquet", "sub/deep/d.parquet"]
    assert names(f"{tree}/") == names(tree)


def test_a_partition_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "_day=3").mkdir()
    (tmp_path / "_day=3" / "a.parquet").touch()

    assert names(tmp_path) == ["_day=3/a.parquet"]


@pytest.mark.parametrize("log", ["_delta_log/0.json", ".hoodie/x", "t/metadata/v1.metadata.json"])
def test_a_table_with_a_log_is_refused_unless_its_files_are_named(tree: Path, log: str) -> None:
    """Some of its files hold rows that are not in it any more."""
    (tree / log).parent.mkdir(parents=True)
    (tree / log).touch()

    with pytest.raises(InputError, match=r"is a table of (Delta|Hudi|Iceberg)"):
        names(tree)
    assert names(tree / "*.parquet") == ["b.parquet"]


def test_one_file_needs_no_suffix_and_may_be_hidden(tree: Path) -> None:
    assert names(tree / "e.txt") == ["e.txt"]
    assert list_files(str(tree / "e.txt"), suffixes=SUFFIXES).local_root == str(tree)
    assert names(tree / "_metadata.parquet") == ["_metadata.parquet"]


def test_a_glob_names_files_below_its_fixed_part(tree: Path) -> None:
    assert names(tree / "*.parquet") == ["b.parquet"]
    assert names(tree / "sub" / "**" / "*.parquet") == ["c.parquet", "deep/d.parquet"]
    assert names(tree / "s?b" / "*.parquet") == ["sub/c.parquet"]
    assert names(tree / "*") == ["a.PARQUET", "b.parquet", "e.txt"]


def test_a_name_that_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].parquet").touch()

    assert names(tmp_path / "a[1].parquet") == ["a[1].parquet"]


def test_linked_files_count(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The hub's cache is made of links."""
    folder = tmp_path_factory.mktemp("links")
    os.symlink(tree / "b.parquet", folder / "link.parquet")

    assert names(folder) == ["link.parquet"]
    assert names(folder / "*.parquet") == ["link.parquet"]


def test_relative_paths_and_the_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))

    assert names("sub") == names("~/sub") == ["c.parquet", "deep/d.parquet"]
    assert names("*.parquet") == ["b.parquet"]


def test_urls(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/urls/x/a.parquet": b"", "/urls/x/y/b.parquet": b"", "/urls/x/_c.parquet": b""})

    assert names("memory://urls/x") == ["a.parquet", "y/b.parquet"]
    assert names("memory://urls/x/a.parquet") == ["a.parquet"]
    assert names("memory://urls/*/y/*.parquet") == ["x/y/b.parquet"]
    assert list_files("memory://urls/x", suffixes=SUFFIXES).local_root is None
    fs.rm("/urls", recursive=True)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/none", "no such file or folder"),
        ("{}/none*", "no \\*.parquet file"),
        ("memory://none", "no such file or folder"),
        ("{}/{{0..9}}.tar", "no such file or folder.*braces are not expanded"),
        ("nosuchscheme://x", "cannot list nosuchscheme://x"),
    ],
)
def test_what_cannot_be_listed_is_named(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        names(path.format(tmp_path))

    assert path.format(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.parquet", "wb"):
        pass

    with pytest.raises(InputError, match="is not UTF-8"):
        names(tmp_path)


def test_known_paths_keep_their_order() -> None:
    listing = listing_of(None, ["/r/b/2", "/r/a/1"])

    assert list(listing.paths) == ["b/2", "a/1"]
    assert listing.root == "/r"


def test_the_image_root_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    assert image_root_of(None, "x") == str(tmp_path / "x")
    (tmp_path / "y").mkdir()
    assert image_root_of("y", "x") == str(tmp_path / "y")
    assert image_root_of(None, None) is None
