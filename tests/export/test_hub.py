"""A dataset repository, sent to a stand-in for the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from batchvlm.cli import main
from batchvlm.export import hub
from tests.conftest import IMAGE, picture
from tests.export.hub_server import TOKEN, HubServer, on_the_hub
from tests.pipeline.test_pipeline import FakeEngine, run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with on_the_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def out(tmp_path: Path, write_parquet: Any) -> Path:
    source = write_parquet(
        [picture(), b"no image", *[picture()] * 21],
        row_group_size=10,
        label=pa.array(range(23), pa.int16()),
        pages=pa.array([[{"bytes": picture(), "path": None}]] * 23, pa.list_(IMAGE)),
    )
    out = tmp_path / "out"
    run(out, source, "output.keep_columns=[image,label,pages]", "output.token_ids=true")
    return out


def load(server: HubServer, folder: Path) -> datasets.Dataset:
    """What is in the repository, as `datasets` reads it."""
    for name, content in server.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))


def test_a_repository_with_typed_features_and_a_card(
    server: HubServer, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(out), "--to", "hub", "me/captions"]) == 0
    said = capsys.readouterr()
    assert "datasets/me/captions" in said.out and TOKEN not in said.out + said.err
    assert server.created is not None
    assert server.created["visibility"] == "private" and server.created["type"] == "dataset"
    assert sorted(server.files) == [
        "README.md",
        *(f"data/part-0000{i}-of-00003.parquet" for i in range(3)),
    ]
    rows = load(server, tmp_path / "repo")
    assert rows["row_index"][:] == list(range(23))
    assert rows["label"][:] == list(range(23))
    assert rows.features["label"] == datasets.Value("int16")
    assert rows.features["token_ids"] == datasets.List(datasets.Value("int32"))
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows[0]["image"].size == rows[0]["pages"][0].size == (32, 24)
    assert "num_examples: 23" in server.files["README.md"].decode()
    # Once more: nothing is sent that is there.
    uploads = list(server.uploads)
    assert main(["export", str(out), "--to", "hub", "me/captions"]) == 0
    assert server.uploads == uploads and len(uploads) == 3


def test_other_parts_take_the_place_of_those_before(server: HubServer, out: Path) -> None:
    assert main(["export", str(out), "--to", "hub", "me/captions", "--public"]) == 0
    assert server.created is not None and server.created["visibility"] == "public"
    server.files["data/notes.txt"] = b"somebody's own"
    assert main(["compact", str(out)]) == 0
    assert main(["export", str(out), "--to", "hub", "me/captions"]) == 0
    parts = [name for name in server.files if name.endswith(".parquet")]
    assert parts == ["data/part-00000-to-00002-of-00003.parquet"]
    assert "data/notes.txt" in server.files


def test_an_export_that_breaks_off_goes_on(
    server: HubServer, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(hub, "_FILES_PER_COMMIT", 1)
    server.refused_upload = 1
    assert main(["export", str(out), "--to", "hub", "me/captions"]) == 1
    said = capsys.readouterr().err
    assert "cannot export to me/captions" in said and "Traceback" not in said
    assert "README.md" not in server.files and len(server.uploads) == 1
    assert main(["export", str(out), "--to", "hub", "me/captions"]) == 0
    assert len(server.uploads) == 3 and "README.md" in server.files
    assert len(server.commits) >= 4


def test_what_cannot_be_sent_is_one_line(
    server: HubServer,
    tmp_path: Path,
    write_parquet: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "part"
    run(out, write_parquet([picture()] * 24), engine=FakeEngine())
    next((out / "data").glob("*.parquet")).unlink()
    assert main(["export", str(out), "--to", "hub", "me/x"]) == 1
    assert "is not finished: 1 of 3 shards are left" in capsys.readouterr().err
    assert server.created is None
    kept = tmp_path / "kept"
    tags = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32()))
    source = write_parquet([picture()], tags=tags)
    run(kept, source, "output.keep_columns=[tags]", engine=FakeEngine())
    assert main(["export", str(kept), "--to", "hub", "me/x"]) == 1
    assert "datasets cannot read column 'tags', which is map<string, int32" in (
        capsys.readouterr().err
    )
    assert server.created is None
    run(out, write_parquet([picture()] * 24), engine=FakeEngine())
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert main(["export", str(out), "--to", "hub", "me/x"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("batchvlm: error: cannot export to me/x: ") and "hf_of" not in said
    assert main(["export", str(out), "--to", "nowhere", "me/x"]) == 2
