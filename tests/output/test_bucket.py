"""Outputs in an object store: a real HTTP server that speaks S3, and a network that fails."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow.dataset as ds
import pytest
from moto.server import ThreadedMotoServer

from batchvlm.cli import main
from batchvlm.errors import BatchvlmError, ConfigError, OutputError
from batchvlm.output import bucket as bucket_module
from batchvlm.output.folder import OutputFolder
from batchvlm.output.status import status
from batchvlm.output.verify import verify
from batchvlm.records import Completion, Failure, Sample
from tests.conftest import picture
from tests.output.flaky import FAULTS, FlakyProxy, in_turn
from tests.pipeline.test_pipeline import FakeEngine, run

SECRET = "not-to-be-found-anywhere"


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """Port of a server that speaks S3."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield int(server.get_host_and_port()[1])
    server.stop()


@pytest.fixture
def store(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket `store`, and a client that looks at it past every fault."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(bucket_module._S3_OPTIONS["config_kwargs"], "read_timeout", 0.4)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server}")
    client.create_bucket(Bucket="store")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")
    yield client
    for entry in client.list_objects_v2(Bucket="store").get("Contents", []):
        client.delete_object(Bucket="store", Key=entry["Key"])


@pytest.fixture(autouse=True)
def fresh_connections() -> Iterator[None]:
    """fsspec keeps file systems by their options, and the address is none of them."""
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def through(monkeypatch: pytest.MonkeyPatch, proxy: FlakyProxy) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def objects(client: Any) -> dict[str, bytes]:
    found = client.list_objects_v2(Bucket="store").get("Contents", [])
    return {e["Key"]: client.get_object(Bucket="store", Key=e["Key"])["Body"].read() for e in found}


def rows_of(out: str | Path) -> list[dict[str, Any]]:
    place = f"{out}/data" if isinstance(out, str) else out / "data"
    fs, path = fsspec.core.url_to_fs(str(place), use_listings_cache=False)
    rows = ds.dataset(path, filesystem=fs, format="parquet").to_table().to_pylist()
    return [{k: v for k, v in row.items() if k not in ("run_id", "latency_s")} for row in rows]


class Stopping(FakeEngine):
    """Breaks off after a number of rows."""

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        for count, answer in enumerate(super().run(samples)):
            if count == 17:
                raise BatchvlmError("broken off")
            yield answer


@pytest.mark.soak
@pytest.mark.parametrize("every", [5, 13])
def test_a_job_on_a_network_that_fails(
    store: Any,
    server: int,
    every: int,
    tmp_path: Path,
    write_parquet: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Input and output in the store, broken off once: the rows are those of a job on a disk."""
    source = write_parquet([picture(), b"no image", *[picture()] * 38], row_group_size=10)
    run(tmp_path / "plain", source, engine=FakeEngine(failing=[7]))
    expected = [row | {"source_file": "in.parquet"} for row in rows_of(tmp_path / "plain")]
    store.put_object(Bucket="store", Key="in.parquet", Body=source.read_bytes())
    out = "s3://store/some/where"
    with FlakyProxy(server, in_turn(every)) as proxy:
        through(monkeypatch, proxy)
        job: list[Any] = [out, "s3://store/in.parquet", "output.flush_every_rows=9"]
        with pytest.raises(BatchvlmError, match="broken off"):
            run(*job, engine=Stopping(failing=[7]))
        found = status(OutputFolder(out))
        assert 17 <= found.num_done < 40 and found.num_rows == 40
        rest = FakeEngine(failing=[7])
        run(*job, engine=rest)
        assert len(rest.seen) <= 40 - 17
        assert verify(OutputFolder(out)).faults == []
        assert rows_of(out) == expected
        # The engine's failure is mended, in place.
        run(*job, "retry.errors=[engine]", engine=FakeEngine())
        assert verify(OutputFolder(out)).faults == []
        retried = rows_of(out)
    assert all(proxy.faults[fault] for fault in FAULTS)
    assert [row["attempts"] for row in retried] == [2 if i == 7 else 1 for i in range(40)]
    assert [row for row in retried if row["row_index"] != 7] == [*expected[:7], *expected[8:]]
    assert "Uploads" not in store.list_multipart_uploads(Bucket="store")
    there = objects(store)
    assert not [key for key in there if "segments" in key or "retries" in key or "tmp" in key]
    assert "some/where/README.md" in there
    for key, content in there.items():
        assert SECRET.encode() not in content and b"somebody" not in content, key
    assert SECRET not in caplog.text


def test_of_two_runs_the_first_gets_the_prefix(store: Any) -> None:
    first, second = OutputFolder("s3://store/out"), OutputFolder("s3://store/out")
    assert first.commit_file(lambda f: f.write(b"first"), first.run_json, replace=False)
    assert not second.commit_file(lambda f: f.write(b"second"), second.run_json, replace=False)
    assert second.read_bytes(second.run_json) == b"first"
    first.claim(b"first")
    second.commit_file(lambda f: f.write(b"given away"), second.run_json)
    with pytest.raises(OutputError, match="was given to another run meanwhile"):
        first.commit_file(lambda f: f.write(b"part"), first.part(0, 1))
    assert list(objects(store)) == ["out/_batchvlm/run.json"]


def test_a_part_in_pieces_that_fails_leaves_no_upload(
    store: Any, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_MAX_PUT_BYTES", 10 << 20)
    content = bytes(11 << 20)
    is_broken = True

    def choose(method: str, path: str) -> str | None:
        return "500" if is_broken and "partNumber=2" in path else None

    with FlakyProxy(server, choose) as proxy:
        through(monkeypatch, proxy)
        folder = OutputFolder("s3://store/out")
        monkeypatch.setitem(
            bucket_module._S3_OPTIONS["config_kwargs"], "retries", {"max_attempts": 1}
        )
        with pytest.raises(OutputError, match="cannot write"):
            folder.commit_file(lambda f: f.write(content), folder.part(0, 1))
        assert proxy.faults["500"] and objects(store) == {}
        assert "Uploads" not in store.list_multipart_uploads(Bucket="store")
        is_broken = False
        folder.commit_file(lambda f: f.write(content), folder.part(0, 1))
    assert list(objects(store).values()) == [content]


def test_how_often_the_store_is_asked_does_not_grow_with_the_parts(
    store: Any, server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FlakyProxy(server, lambda method, path: None) as proxy:
        through(monkeypatch, proxy)
        folder = OutputFolder("s3://store/out")
        num_shards = 50_000
        for index in (3, 4):
            folder.commit_file(lambda f: f.write(b""), folder.part(index, num_shards))
        # Different requests: on a busy machine the client repeats some.
        before = {*proxy.requests}
        # One slice of a thousand: as many requests as it has shards, not as there are parts.
        mine = range(3, num_shards, 5000)
        assert folder.finished_shards(num_shards, mine) == {3}
        assert len(mine) <= len(proxy.requests - before) <= 2 * (len(mine) + 1)
        before = {*proxy.requests}
        assert folder.find_part(7, num_shards) is None
        assert 1 <= len(proxy.requests - before) <= 4
        assert folder.finished_shards(num_shards) == {3, 4}


def test_what_a_store_cannot_do_is_refused(
    store: Any, write_parquet: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_parquet([picture()] * 12)
    out = "s3://store/out"
    run(out, source)  # type: ignore[arg-type]
    assert main(["compact", out]) == 1
    assert "is in an object store, where exchanging two folders" in capsys.readouterr().err
    with pytest.raises(OutputError, match="overwriting is not possible"):
        run(out, source, "output.on_mismatch=overwrite", "task.prompt=other")  # type: ignore[arg-type]
    assert main(["verify", out]) == 0
    assert main(["status", out]) == 0
    assert "12 of 12" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="there is no bucket 'nowhere'"):
        OutputFolder("s3://nowhere/out").check_writable()
    with pytest.raises(ConfigError, match="leave credentials to the environment"):
        OutputFolder("s3://key:secret@store/out")
