"""Rows that name files and addresses: what the configuration does not allow is `forbidden`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import picture
from tests.fetch.server import image, serve
from tests.pipeline.test_pipeline import FakeEngine, rows_of, run

# {port}: a server on loopback that has the image; {root}: the folder with one outside of it.
FORBIDDEN = {
    "file": "file://{root}/secret.png",
    "file, short": "file:{root}/secret.png",
    "absolute path": "{root}/secret.png",
    "way up": "../secret.png",
    "way up and down": "in/../../secret.png",
    "link out": "link.png",
    "link out by a folder": "up/secret.png",
    "loopback": "http://127.0.0.1:{port}/a.png",
    "loopback by name": "http://localhost:{port}/a.png",
    "IPv6 loopback": "http://[::1]:{port}/a.png",
    "IPv6-mapped": "http://[::ffff:127.0.0.1]:{port}/a.png",
    "private": "http://192.168.0.1/a.png",
    "link-local": "http://169.254.169.254/latest/meta-data/",
    "reserved": "http://240.0.0.1/a.png",
    "decimal": "http://2130706433:{port}/a.png",
    "octal": "http://0177.0.0.1:{port}/a.png",
    "hexadecimal": "http://0x7f000001:{port}/a.png",
    "user name": "http://example.com@127.0.0.1:{port}/a.png",
    "redirect": "http://images.test:{port}/redirect",
    "ftp": "ftp://127.0.0.1:{port}/a.png",
    "object store": "s3://bucket/a.png",
    "no host": "http:/127.0.0.1:{port}/a.png",
}


def make_input(folder: Path, port: int) -> Path:
    root = folder / "in"
    root.mkdir()
    (folder / "secret.png").write_bytes(picture())
    os.symlink(folder / "secret.png", root / "link.png")
    os.symlink(folder, root / "up")
    urls = [text.format(port=port, root=folder) for text in FORBIDDEN.values()]
    pq.write_table(pa.table({"image": [f"http://images.test:{port}/a.png", *urls]}), root / "a.pq")
    return root / "a.pq"


@pytest.mark.parametrize("allowed", [False, True])
def test_what_is_not_allowed_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    import aiohttp

    resolve = aiohttp.ThreadedResolver.resolve

    async def on_loopback(self: Any, host: str, *rest: Any, **named: Any) -> Any:
        return await resolve(self, "127.0.0.1" if host == "images.test" else host, *rest, **named)

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", on_loopback)
    settings = ["data.allow_remote=true", "data.allow_hosts=[images.test]"] if allowed else []
    answers: dict[str, Any] = {"/a.png": image(picture())}
    with serve(answers) as server:
        answers["/redirect"] = [(302, {"Location": server.url("/secret")}, b"")]
        source = make_input(tmp_path, server.port)
        run(tmp_path / "out", source, *settings, engine=FakeEngine())
        expected = {"/a.png": 1, "/redirect": 1} if allowed else {}
        assert server.seen == expected
    first, *rest = rows_of(tmp_path / "out")
    assert first["status"] == ("success" if allowed else "error")
    types = {name: row["error_type"] for name, row in zip(FORBIDDEN, rest, strict=True)}
    assert types == dict.fromkeys(FORBIDDEN, "forbidden")
    # A message may name what the row itself says, never where that leads.
    for text, row in zip(FORBIDDEN.values(), rest, strict=True):
        assert "secret" in text or "secret" not in row["error_message"]


def test_rows_that_a_server_failed_are_fetched_again_where_asked(tmp_path: Path) -> None:
    answers: dict[str, Any] = {"/a.png": image(picture()), "/b.png": [(503, {}, b"")]}
    with serve(answers) as server:
        urls = [server.url("/a.png"), server.url("/b.png")]
        pq.write_table(pa.table({"image": urls}), tmp_path / "a.parquet")
        settings = ["data.allow_remote=true", "data.allow_hosts=[127.0.0.1]"]
        settings += ["data.fetch_attempts=1"]
        run(tmp_path / "out", tmp_path / "a.parquet", *settings)
        assert [row["error_type"] for row in rows_of(tmp_path / "out")] == [None, "fetch"]
        answers["/b.png"] = image(picture())
        run(tmp_path / "out", tmp_path / "a.parquet", *settings, "retry.errors=[fetch]")
        assert server.seen == {"/a.png": 1, "/b.png": 2}
    rows = rows_of(tmp_path / "out")
    assert [(row["status"], row["attempts"]) for row in rows] == [("success", 1), ("success", 2)]


def test_images_by_address_in_messages_and_columns(tmp_path: Path) -> None:
    answers: dict[str, Any] = {
        "/a.png": image(picture(size=(20, 10))),
        "/text": [(200, {}, b"no image")],
        "/empty": [(200, {}, b"")],
        "/big": [(200, {}, bytes(5000))],
        "/busy": [(503, {}, b"")],
    }
    with serve(answers) as server:
        names = ["/a.png", "/text", "/empty", "/big", "/busy", "/none", "/a.png"]
        urls = [server.url(name) for name in names]
        # Text that looks like an image is text.
        parts = [[{"type": "text", "text": f"![x]({server.url('/never')}) {url}"}] for url in urls]
        shown = [[{"type": "image_url", "image_url": {"url": url}}] for url in urls]
        messages = [
            [{"role": "user", "content": [*b, *a]}] for a, b in zip(parts, shown, strict=True)
        ]
        table = pa.table({"chat": [json.dumps(m) for m in messages]})
        pq.write_table(table, tmp_path / "a.parquet")
        run(
            tmp_path / "out",
            tmp_path / "a.parquet",
            "data.columns.image=null",
            "data.columns.messages=chat",
            "data.allow_remote=true",
            "data.allow_hosts=[127.0.0.1]",
            "data.max_image_bytes=4000",
            "data.fetch_attempts=1",
        )
        assert "/never" not in server.seen
    rows = rows_of(tmp_path / "out")
    assert [row["error_type"] for row in rows] == [
        *(None, "decode", "missing_image", "too_large", "fetch", "missing_image", None)
    ]
    assert (rows[0]["num_images"], rows[0]["generated_text"]) == (1, "row 0")
