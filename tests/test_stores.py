"""Jobs whose input, images or output are s3://, gs:// or hf://, against real HTTP servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchvlm.cli import main
from batchvlm.errors import BatchvlmError, ConfigError, InputError, OutputError
from batchvlm.output.folder import OutputFolder
from batchvlm.output.status import status
from batchvlm.output.verify import verify
from tests.conftest import picture
from tests.export.hub_server import HubServer, on_the_hub
from tests.output.flaky import FAULTS, FlakyProxy, in_turn
from tests.output.test_bucket import Stopping
from tests.pipeline.test_pipeline import FakeEngine, rows_of, run
from tests.stores import SECRET, STORES, Store


@pytest.fixture
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with STORES[request.param](monkeypatch) as store:
        yield store


every_store = pytest.mark.parametrize("store", STORES, indirect=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with on_the_hub(monkeypatch) as hub:
        yield hub


def settled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("run_id", "latency_s")} for row in rows]


def rows_in(store: Store, out: str) -> list[dict[str, Any]]:
    place = f"{out}/data".removeprefix(f"{store.protocol}://")
    table = ds.dataset(place, filesystem=store.fs, format="parquet").to_table()
    return settled(table.to_pylist())


@every_store
def test_a_job_from_a_store_into_it(store: Store, tmp_path: Path, write_parquet: Any) -> None:
    """Broken off once; the rows are those of a job on a disk."""
    source = write_parquet([picture(), b"no image", *[picture()] * 38], row_group_size=10)
    run(tmp_path / "plain", source, engine=FakeEngine(failing=[7]))
    expected = settled(rows_of(tmp_path / "plain"))
    address = store.put("in/in.parquet", source.read_bytes())
    out = f"{store.root}/some/where"
    job: list[Any] = [out, address, "output.flush_every_rows=9"]
    with pytest.raises(BatchvlmError, match="broken off"):
        run(*job, engine=Stopping(failing=[7]))
    found = status(OutputFolder(out))
    assert 17 <= found.num_done < 40 and found.num_rows == 40
    rest = FakeEngine(failing=[7])
    run(*job, engine=rest)
    assert len(rest.seen) <= 40 - 17
    assert verify(OutputFolder(out)).faults == []
    with pytest.raises(InputError, match=f"^{out}/data is no output"):
        verify(OutputFolder(f"{out}/data"))
    assert rows_in(store, out) == expected
    # The engine's failure is mended, in place; the same from a folder and from a glob.
    run(*job, "retry.errors=[engine]", engine=FakeEngine())
    again = rows_in(store, out)
    assert [row["attempts"] for row in again] == [2 if i == 7 else 1 for i in range(40)]
    there = store.objects()
    assert not [key for key in there if "segments" in key or "retries" in key or "tmp" in key]
    for key, content in there.items():
        assert SECRET.encode() not in content, key
    for number, place in enumerate((f"{store.root}/in", f"{store.root}/in/*.parquet")):
        run(tmp_path / f"of-{number}", place, engine=FakeEngine(failing=[7]))  # type: ignore[arg-type]
        assert settled(rows_of(tmp_path / f"of-{number}")) == expected


@every_store
def test_of_two_runs_the_first_gets_the_prefix(store: Store) -> None:
    out = f"{store.root}/out"
    first, second = OutputFolder(out), OutputFolder(out)
    assert first.commit_file(lambda f: f.write(b"first"), first.run_json, replace=False)
    assert not second.commit_file(lambda f: f.write(b"second"), second.run_json, replace=False)
    first.claim(b"first")
    second.commit_file(lambda f: f.write(b"given away"), second.run_json)
    with pytest.raises(OutputError, match="was given to another run meanwhile"):
        first.commit_file(lambda f: f.write(b"part"), first.part(0, 1))
    assert list(store.objects()) == ["out/_batchvlm/run.json"]
    with pytest.raises(ConfigError, match="there is no bucket 'nowhere'"):
        OutputFolder(f"{store.protocol}://nowhere/out").check_writable()


@pytest.mark.soak
@pytest.mark.parametrize("every", [5, 13])
@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_a_job_on_a_network_that_fails(
    store: Store, every: int, tmp_path: Path, write_parquet: Any
) -> None:
    """As tests/output/test_bucket.py has it of S3."""
    source = write_parquet([picture(), b"no image", *[picture()] * 38], row_group_size=10)
    run(tmp_path / "plain", source, engine=FakeEngine(failing=[7]))
    address = store.put("in.parquet", source.read_bytes())
    out = f"{store.root}/out"
    job: list[Any] = [out, address, "output.flush_every_rows=9"]
    with FlakyProxy(store.port, in_turn(every)) as proxy:
        store.at(int(proxy.url.rpartition(":")[2]))
        with pytest.raises(BatchvlmError, match="broken off"):
            run(*job, engine=Stopping(failing=[7]))
        run(*job, engine=FakeEngine(failing=[7]))
        assert verify(OutputFolder(out)).faults == []
        assert rows_in(store, out) == settled(rows_of(tmp_path / "plain"))
    assert all(proxy.faults[fault] for fault in FAULTS)


def images_job(tmp_path: Path, addresses: list[str], allowed: str) -> list[dict[str, Any]]:
    pq.write_table(pa.table({"image": addresses}), tmp_path / "rows.parquet")
    settings = ["data.allow_remote=true", f"data.allow_hosts=[{allowed}]"]
    settings += ["data.fetch_attempts=1", "data.max_image_bytes=3000"]
    run(tmp_path / "out", tmp_path / "rows.parquet", *settings)
    return rows_of(tmp_path / "out")


EXPECTED = [
    *(None, "missing_image", "decode", "missing_image", "too_large"),
    *("forbidden", "forbidden", None),
]


def names(root: str, other: str) -> list[str]:
    places = ("a.png", "gone.png", "text", "empty", "big", "../secret.png")
    return [*(f"{root}/images/{place}" for place in places), other, f"{root}/images/b+ü.png"]


CONTENTS = {
    "images/a.png": picture(size=(20, 10)),
    "images/text": b"no image",
    "images/empty": b"",
    "images/big": bytes(5000),
    "images/b+ü.png": picture(size=(10, 20)),
    "secret.png": picture(),
}


@every_store
def test_images_of_rows_in_a_store(store: Store, tmp_path: Path) -> None:
    for key, content in CONTENTS.items():
        store.put(key, content)
    addresses = names(store.root, f"{store.root}/secret.png")
    rows = images_job(tmp_path, addresses, f"{store.root}/images")
    assert [row["error_type"] for row in rows] == EXPECTED, [r["error_message"] for r in rows]
    assert [row["image_sizes"] for row in rows if row["num_images"]] == [
        rows[0]["image_sizes"],
        rows[-1]["image_sizes"],
    ]
    assert rows[0]["generated_text"] == "row 0"


def test_images_of_rows_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    hub.created = {"name": "x"}
    hub.files |= CONTENTS
    root = "hf://datasets/me/x"
    rows = images_job(tmp_path, names(root, f"{root}/secret.png"), f"{root}/images")
    assert [row["error_type"] for row in rows] == EXPECTED, [r["error_message"] for r in rows]
    # A folder may hold a million images: nobody lists it.
    assert hub.requests["tree"] == 0 and hub.requests["resolve"] == 6


def test_an_input_on_the_hub(hub: HubServer, tmp_path: Path, write_parquet: Any) -> None:
    source = write_parquet([picture()] * 12)
    run(tmp_path / "plain", source)
    hub.created = {"name": "x"}
    hub.files["data/in.parquet"] = source.read_bytes()
    root = "hf://datasets/me/x"
    for number, place in enumerate(("data/in.parquet", "data", "data/*.parquet")):
        run(tmp_path / f"of-{number}", f"{root}/{place}")  # type: ignore[arg-type]
        assert settled(rows_of(tmp_path / f"of-{number}")) == settled(rows_of(tmp_path / "plain"))


def test_an_output_on_the_hub_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("hf://datasets/me/x/out", "hf://buckets/me/x"):
        assert main(["run", f"output.dir={out}"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "the Hub makes a commit of every file" in said and "export OUT --to hub" in said
