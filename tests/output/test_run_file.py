from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchvlm.errors import ConfigError, FingerprintError, OutputError
from batchvlm.output.fingerprint import fingerprint
from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import RunFile, find_run, read_run, save_run
from batchvlm.records import Shard

from .make import make_plan


def open_here(path: Path, **changes: Any) -> RunFile:
    arguments: dict[str, Any] = {
        "identity": {"task": {"prompt": "What is it?"}, "sizes": (1, 2)},
        "layout": {"output.rows_per_shard": 100, "output.keep_columns": ()},
        "settings": {"batching": {"max_batch_size": 8}},
        "packages": {"pyarrow": "26"},
        "plan": make_plan(5, 100),
    }
    folder = OutputFolder(path)
    return save_run(folder, find_run(folder, **arguments | changes))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = open_here(tmp_path)
    assert run == open_here(tmp_path) == read_run(OutputFolder(tmp_path))
    assert run.plan == tuple(make_plan(5, 100))
    assert run.fingerprint == fingerprint(run.identity)
    assert run.settings == {"batching": {"max_batch_size": 8}}
    assert read_run(OutputFolder(tmp_path / "elsewhere")) is None


def test_a_new_run_is_described_before_it_is_put_there(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    what: dict[str, Any] = {"layout": {}, "settings": {}, "packages": {}, "plan": make_plan(2, 10)}
    mine = find_run(folder, identity={"q": (1, 2)}, **what)
    theirs = find_run(folder, identity={"q": (1, 3)}, **what)
    longer = find_run(folder, identity={"q": [1, 2]}, **what | {"plan": make_plan(3, 10)})
    assert not folder.root.exists()
    assert save_run(folder, mine) == mine == read_run(folder)
    with pytest.raises(FingerprintError, match=r"q\[1\]: 2 -> 3"):
        save_run(folder, theirs)
    with pytest.raises(OutputError, match="with another plan"):
        save_run(folder, longer)


def test_the_first_settings_stay_and_others_never_matter(tmp_path: Path) -> None:
    first = open_here(tmp_path)
    changes = {"settings": {"batching": 1}, "packages": {}, "plan": make_plan(9, 7)}
    assert open_here(tmp_path, **changes) == first


def test_another_layout_is_no_other_question(tmp_path: Path) -> None:
    open_here(tmp_path)
    with pytest.raises(FingerprintError) as caught:
        open_here(tmp_path, layout={"output.rows_per_shard": 50, "output.keep_columns": ()})
    assert str(caught.value) == (
        f"{tmp_path} was started with other settings: output.rows_per_shard: 100 -> 50; put the "
        "settings back, name another output.dir, or set output.on_mismatch"
    )


def test_every_difference_is_named(tmp_path: Path) -> None:
    open_here(tmp_path)
    content = (tmp_path / "_batchvlm/run.json").read_bytes()
    with pytest.raises(FingerprintError) as caught:
        open_here(
            tmp_path,
            identity={"task": {"prompt": "What is that?"}, "sizes": [1, 3]},
            layout={"output.rows_per_shard": 50, "output.keep_columns": ["a"]},
        )
    message = caught.value.message
    assert str(tmp_path) in message
    assert "task.prompt: 'What is it?' -> 'What is that?'" in message
    assert "sizes[1]: 2 -> 3" in message
    assert "output.rows_per_shard: 100 -> 50" in message
    assert "output.keep_columns: 0 items -> 1 item" in message
    for way_out in ("output.dir", "settings back", "output.on_mismatch"):
        assert way_out in caught.value.hint
    assert (tmp_path / "_batchvlm/run.json").read_bytes() == content


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named_and_kept(tmp_path: Path, keep: float) -> None:
    open_here(tmp_path)
    path = tmp_path / "_batchvlm/run.json"
    content = path.read_bytes()[: int(path.stat().st_size * keep)]
    path.write_bytes(content)
    with pytest.raises(OutputError, match=rf"{path} is damaged"):
        open_here(tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "1"}, "is damaged"),
        ({"format": None}, "is damaged"),
        ({"identity": {"task": {"prompt": "edited"}}}, "is damaged"),
        ({"layout": None}, "is damaged"),
        ({"plan": {}}, "is damaged"),
        ({"plan": None}, "is damaged"),
        ({"unknown": 1}, "is damaged"),
    ],
)
def test_a_file_that_was_damaged_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    open_here(tmp_path)
    path = tmp_path / "_batchvlm/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(OutputError, match=message):
        open_here(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"program": "other"}, "is no run of batchvlm"),
        ({"format": 2, "novelty": 1}, r"newer batchvlm \(format 2, here 1\)"),
    ],
)
def test_a_file_that_is_not_ours_is_the_users_mistake(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    open_here(tmp_path)
    path = tmp_path / "_batchvlm/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        open_here(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"\xff\xfe", b'{"a": 1}'])
def test_json_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "_batchvlm").mkdir()
    (tmp_path / "_batchvlm/run.json").write_bytes(content)
    kind = OutputError if content == b"\xff\xfe" else ConfigError  # half of ours looks so, too
    with pytest.raises(kind, match="no run of batchvlm"):
        open_here(tmp_path)


def test_somebody_elses_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"data holds Parquet files.*no output of batchvlm"):
        open_here(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "train-00000-of-00001.parquet"]


def test_a_hundred_thousand_shards_are_stored_as_columns(tmp_path: Path) -> None:
    plan = [
        Shard(
            index=i,
            source_file=f"a/rather/long/folder/name/file-{i // 40:05d}.parquet",
            first_row=i % 40 * 4096,
            num_rows=4096,
            first_row_index=i * 4096,
        )
        for i in range(100_000)
    ]
    assert open_here(tmp_path, plan=plan).plan == tuple(plan)
    assert (tmp_path / "_batchvlm/run.json").stat().st_size < 5_000_000


def test_racing_processes_agree_on_one_run(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from batchvlm.output.folder import OutputFolder\n"
        "from batchvlm.output.run_file import find_run, save_run\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "folder = OutputFolder(sys.argv[1])\n"
        "run = save_run(folder, find_run(folder, identity={'q': 1}, layout={},\n"
        "    settings={'racer': sys.argv[2]}, packages={}, plan=[]))\n"
        "print(run.settings['racer'], flush=True)\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(i)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [".", *sys.path]))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(6)
    ]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    seen = {racer.communicate()[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0] * 6
    stored = read_run(OutputFolder(tmp_path))
    assert stored and seen == {stored.settings["racer"]}
    assert not list((tmp_path / "_batchvlm/tmp").iterdir())


def test_a_run_that_another_process_starts_just_now_is_no_foreign_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other writes its run and its first part between our two looks at the folder."""
    with monkeypatch.context() as context:

        def start_other_after(name: str) -> None:
            look = getattr(OutputFolder, name)

            def look_then_other_starts(folder: OutputFolder, *args: Any) -> Any:
                seen = look(folder, *args)
                context.undo()
                open_here(tmp_path)
                folder.commit_file(lambda file: file.write(b"x"), folder.part(0, 5))
                return seen

            context.setattr(OutputFolder, name, look_then_other_starts)

        start_other_after("has_foreign_data")
        start_other_after("read_bytes")
        run = open_here(tmp_path)
    assert run == read_run(OutputFolder(tmp_path))
