from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from batchvlm.errors import ConfigError, OutputError
from batchvlm.output.disk import new_attempt
from batchvlm.output.folder import OutputFolder


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("root", ["s3://bucket/out", Path("s3://bucket/out"), "S3://bucket/out"])
def test_a_url_names_an_object_store(root: str | Path) -> None:
    folder = OutputFolder(root)
    assert not folder.is_local
    assert folder.address(folder.part(1, 2)) == "s3://bucket/out/data/part-00001-of-00002.parquet"
    assert OutputFolder(folder.root).address(folder.data) == "s3://bucket/out/data"


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    folder = OutputFolder(f"file://{tmp_path}/out")
    assert folder.is_local and folder.root == tmp_path / "out"


def test_names_sort_like_the_input() -> None:
    folder = OutputFolder("out")
    assert folder.part(12, 480) == Path("out/data/part-00012-of-00480.parquet")
    assert folder.part(12, 1_000_000).name == "part-0000012-of-1000000.parquet"
    for num_shards in (99_999, 100_000, 100_001):
        names = [folder.part(i, num_shards).name for i in range(num_shards)]
        assert names == sorted(names)
    path = Path("out/_batchvlm/segments/shard-00012/a-00003.parquet")
    assert folder.segment(12, "a", 3) == path


def test_finished_shards_are_the_parts_that_are_there(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    assert folder.finished_shards(3) == frozenset()
    for index in (0, 2):
        folder.commit_file(lambda file: file.write(b"x"), folder.part(index, 3))
    (folder.data / "notes.txt").touch()
    assert folder.finished_shards(3) == {0, 2}


@pytest.mark.parametrize("name", ["part-00000-of-00004.parquet", "part-00003-of-00003.parquet"])
def test_parts_of_another_plan_are_refused(tmp_path: Path, name: str) -> None:
    folder = OutputFolder(tmp_path)
    folder.data.mkdir()
    (folder.data / name).touch()
    with pytest.raises(OutputError, match=rf"{name} is not of this run, which has 3 shards"):
        folder.finished_shards(3)


def test_a_file_is_not_there_until_it_is_complete(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    final = folder.data / "x.parquet"

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        assert not final.exists()
        assert len(list(folder.tmp.iterdir())) == 1
        file.write(b" and half")

    assert folder.commit_file(write, final)
    assert final.read_bytes() == b"half and half"
    assert files_below(tmp_path) == ["data/x.parquet"]


@pytest.mark.parametrize("replace", [True, False])
def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name open files")
    folder = OutputFolder(tmp_path)
    folder.commit_file(lambda file: file.write(b"x"), folder.data / "first")  # Makes the folders.
    calls: list[str] = []

    def watch(name: str, describe: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*args: Any) -> None:
            calls.append(describe(*args))
            real(*args)

        monkeypatch.setattr(os, name, call)

    def synced(fd: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        size_bytes = path.stat().st_size if path.is_file() else -1
        return f"fsync {path.parent.name} {size_bytes}"

    watch("fsync", synced)
    watch("replace", lambda src, dst: f"rename to {dst.name}")
    watch("link", lambda src, dst: f"rename to {dst.name}")
    folder.commit_file(lambda file: file.write(b"12345"), folder.data / "x", replace=replace)
    assert calls == ["fsync tmp 5", "rename to x", f"fsync {tmp_path.name} -1"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    final = folder.data / "x.parquet"
    folder.commit_file(lambda file: file.write(b"old"), final)

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.commit_file(write, final)
    assert final.read_bytes() == b"old"
    assert files_below(tmp_path) == ["data/x.parquet"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_without_replace_the_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    def no_link(src: Path, dst: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", no_link)
    folder = OutputFolder(tmp_path)
    final = tmp_path / "x"
    assert folder.commit_file(lambda file: file.write(b"first"), final, replace=False)
    assert not folder.commit_file(lambda file: file.write(b"second"), final, replace=False)
    assert final.read_bytes() == b"first"
    assert files_below(tmp_path) == ["x"]


def test_of_racing_writers_one_wins_and_knows(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    barrier = threading.Barrier(8)
    won: list[bytes] = []

    def race(name: bytes) -> None:
        barrier.wait()
        if folder.commit_file(lambda file: file.write(name), tmp_path / "x", replace=False):
            won.append(name)

    threads = [threading.Thread(target=race, args=(bytes([i]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(tmp_path / "x").read_bytes()] == won


def test_the_folder_may_vanish_between_its_making_and_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer that finishes the shard removes the folder of its segments."""
    folder = OutputFolder(tmp_path)
    final = folder.segment(0, "a", 0)
    replace = os.replace
    removed: list[Path] = []

    def remove_then_replace(src: Path, dst: Path) -> None:
        if not removed:
            os.rmdir(final.parent)
            removed.append(final.parent)
        replace(src, dst)

    monkeypatch.setattr(os, "replace", remove_then_replace)
    folder.commit_file(lambda file: file.write(b"x"), final)
    assert removed
    assert final.read_bytes() == b"x"


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process may not write to, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(root)
        finally:
            os.seteuid(user)


def test_a_read_only_folder_is_one_clear_line(read_only: Path) -> None:
    folder = OutputFolder(read_only / "out")
    with pytest.raises(OutputError) as caught:
        folder.commit_file(lambda file: file.write(b"x"), folder.run_json)
    assert str(folder.run_json) in caught.value.message
    assert "Permission denied" in caught.value.message
    assert "output.dir" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = OutputFolder(tmp_path)
    with pytest.raises(OutputError, match=r"No space left.*make room"):
        folder.commit_file(write, folder.part(0, 1))


def test_a_file_where_the_folder_should_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    folder = OutputFolder(tmp_path / "out")
    with pytest.raises(OutputError, match="Not a directory"):
        folder.finished_shards(1)
    with pytest.raises(OutputError, match="cannot write"):
        folder.commit_file(lambda file: file.write(b"x"), folder.run_json)


def test_leftovers_go_but_nothing_that_may_be_alive(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    for index in (0, 1):
        folder.commit_file(lambda file: file.write(b"x"), folder.segment(index, "a", 0))
    folder.commit_file(lambda file: file.write(b"x"), folder.part(0, 2))
    for name, age_s in (("dead", 25 * 3600), ("alive", 3600)):
        (folder.tmp / name).touch()
        then = (folder.tmp / name).stat().st_mtime - age_s
        os.utime(folder.tmp / name, (then, then))
    folder.remove_leftovers(2)
    assert files_below(tmp_path) == [
        "_batchvlm/segments/shard-00001/a-00000.parquet",
        "_batchvlm/tmp/alive",
        "data/part-00000-of-00002.parquet",
    ]
    assert not folder.segment(0, "a", 0).parent.exists()


def test_a_folder_that_goes_while_it_is_looked_through_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path)
    for index in range(3):
        path = folder.segment(index, new_attempt(), 0)
        folder.commit_file(lambda file: file.write(b"rows"), path)
    scandir = os.scandir

    def scan(path: str | Path | int) -> object:
        # Listed by now in the folder above it.
        if not isinstance(path, int) and Path(path).name == "shard-00001":
            monkeypatch.setattr(os, "scandir", scandir)
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    found = [path.parent.name for path, _ in folder.written(folder.segments)]
    assert found == ["shard-00000", "shard-00002"]


def test_attempts_have_names_of_their_own() -> None:
    assert len({new_attempt() for _ in range(1000)}) == 1000


def test_a_folder_that_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    OutputFolder(tmp_path).check_writable()
    OutputFolder(tmp_path / "new" / "deeper").check_writable()
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match="Not a directory"):
            OutputFolder(root).check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_known_beforehand(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        OutputFolder(tmp_path / "out").check_writable()
