"""No row's text reaches an address that the configuration does not allow, however it is written."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from batchvlm.errors import ErrorType, RowError
from batchvlm.fetch import addresses
from batchvlm.fetch.addresses import Allowed, CheckedResolver, is_public
from batchvlm.fetch.client import Client, FetchLimits
from batchvlm.fetch.gate import Gate, Pass
from tests.fetch.server import image, serve

LIMITS = FetchLimits(timeout_s=5.0, attempts=1, concurrency=4, max_image_bytes=1000)


def fetch(*urls: str, allowed: Sequence[str] = ()) -> bytes:
    """What the last of some addresses gives; one client asks them all."""

    async def ask() -> bytes:
        async with Client(Allowed(allowed), LIMITS) as client:
            for url in urls:
                data = await client.fetch(url, Pass(Gate(4, 1 << 20)))
        return data

    return asyncio.run(ask())


def refuse(*urls: str, allowed: Sequence[str] = ()) -> str:
    with pytest.raises(RowError) as caught:
        fetch(*urls, allowed=allowed)
    assert caught.value.error_type is ErrorType.FORBIDDEN, caught.value
    assert "\n" not in caught.value.message
    return caught.value.message


NOT_PUBLIC = {
    "loopback": "127.0.0.1",
    "loopback elsewhere": "127.8.9.10",
    "unspecified": "0.0.0.0",
    "private 10": "10.1.2.3",
    "private 172": "172.16.0.1",
    "private 192": "192.168.1.1",
    "carrier": "100.64.0.1",
    "link-local, a cloud's metadata": "169.254.169.254",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "multicast": "224.0.0.1",
    "documentation": "192.0.2.1",
    "v6 loopback": "::1",
    "v6 unspecified": "::",
    "v6 link-local": "fe80::1",
    "v6 private": "fd00::1",
    "v6 site-local": "fec0::1",
    "v6 multicast": "ff02::1",
    "v6 a cloud's metadata": "fd00:ec2::254",
    "mapped": "::ffff:127.0.0.1",
    "mapped private": "::ffff:10.0.0.1",
    "compatible": "::127.0.0.1",
    "6to4": "2002:7f00:1::",
    "nat64": "64:ff9b::7f00:1",
    "teredo": "2001:0:7f00:1::",
}


@pytest.mark.parametrize("address", list(NOT_PUBLIC.values()), ids=list(NOT_PUBLIC))
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    refuse(f"http://[{address}]/a.png" if ":" in address else f"http://{address}/a.png")


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


SPELLINGS = [
    "http://2130706433/",  # decimal
    "http://0x7f000001/",  # hexadecimal
    "http://017700000001/",  # octal
    "http://0177.0.0.1/",
    "http://0x7f.1/",
    "http://127.1/",
    "http://0/",
    "http://127.0.0.1./",
    "http://127。0。0。1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://%31%32%37.0.0.1/",
    "http://localhost/",
    "http://LOCALHOST./",
    "http://[::1]:80/",
    "http://[0:0:0:0:0:ffff:7f00:0001]/",
    "http://[fe80::1%25lo]/",
    "https://127.0.0.1:443/",
    "HTTP://127.0.0.1/",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1:80@example.com/",
    "http://user:password@example.com/",
    "http://example.com\\@127.0.0.1/",
    "http://127.0.0.1\t/",
    "http://127.0.0.1 .example.com/",
    "http:///etc/passwd",
    "http://:80/",
    "http://[::1/",
    "http://127.0.0.1:99999/",
    "ftp://example.com/a.png",
    "gopher://example.com/",
    "ws://example.com/",
    "unix://var/run/docker.sock",
    "s3://bucket/a.png",
    "gs://bucket/a.png",
    "hf://datasets/a/b/c.png",
    "local://etc/passwd",
    "memory://a.png",
    "zip://a.png::file:///etc/a.zip",
]


@pytest.mark.parametrize("url", SPELLINGS)
def test_spellings_that_lead_there(url: str) -> None:
    refuse(url)


NUMBERS = [
    "2130706433",
    "0x7f000001",
    "017700000001",
    "0177.0.0.1",
    "127.1",
    "127.0.0.1.",
    "127.0.0.0x1",
    "0X7F.1",
    "0",
    "0.",
    "0x",
    "1.2.3.4.5",
    "images.256",
    "\uff18.\uff18.\uff18.\uff18.",
]


@pytest.mark.parametrize("host", NUMBERS)
def test_numbers_are_no_names(host: str) -> None:
    """Before anything is resolved or connected to, and whatever the client thinks of it."""
    with pytest.raises(RowError) as caught:
        Allowed(["127.0.0.1", host]).web(f"http://{host}/a.png")
    assert caught.value.error_type is ErrorType.FORBIDDEN


@pytest.mark.parametrize("host", ["1and1.com", "127.0.0.1.example", "0x.org", "8.8.8.8", "x0x1"])
def test_names_with_numbers_in_them(host: str) -> None:
    assert Allowed().web(f"http://{host}/a.png").host == host


def answers_of(monkeypatch: pytest.MonkeyPatch, *answers: Sequence[str]) -> list[str]:
    """Make names resolve to these addresses, lookup after lookup; the names that are asked."""
    asked: list[str] = []

    async def lookup(self: CheckedResolver, host: str, port: int, family: Any) -> list[Any]:
        found = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in found
        ]

    monkeypatch.setattr(CheckedResolver, "_lookup", lookup)
    return asked


@pytest.mark.parametrize(
    "found", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], ["fe80::1%lo"], ["::ffff:10.0.0.1"]]
)
def test_names_that_resolve_there(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> None:
    asked = answers_of(monkeypatch, found)
    refuse("http://harmless.example/a.png")
    assert asked == ["harmless.example"]


def test_the_connection_goes_to_the_address_that_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that changes its address between the look and the connection gains nothing."""
    monkeypatch.setattr(addresses, "is_public", lambda address: str(address) == "127.0.0.2")
    asked = answers_of(monkeypatch, ["127.0.0.2"], ["127.0.0.1"])
    with serve({"/a.png": image(b"public")}, host="127.0.0.2") as server:
        url = server.url("/a.png", "rebinding.example")
        assert fetch(url) == b"public"
        assert asked == ["rebinding.example"]
        refuse(url)


@pytest.mark.parametrize(
    "target",
    [
        "http://localhost:{port}/secret",
        "//localhost:{port}/secret",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]:{port}/secret",
        "http://user@127.0.0.1:{port}/secret",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "ftp://127.0.0.1/secret",
        "http://2130706433:{port}/secret",
    ],
)
def test_redirects_that_lead_there(target: str) -> None:
    answers: dict[str, Any] = {"/secret": image(b"secret")}
    with serve(answers) as server:
        answers["/a.png"] = [(302, {"Location": target.format(port=server.port)}, b"")]
        refuse(server.url("/a.png"), allowed=["127.0.0.1"])
        assert server.seen == {"/a.png": 1}


def test_redirects_to_what_is_allowed() -> None:
    answers: dict[str, Any] = {"/b.png": image(b"image")}
    with serve(answers) as server:
        answers["/a.png"] = [(307, {"Location": "/b.png"}, b"")]
        assert fetch(server.url("/a.png"), allowed=["127.0.0.1"]) == b"image"


@pytest.mark.parametrize("entry", ["127.0.0.1", "localhost", "LocalHost."])
def test_a_host_is_allowed_by_its_own_name_alone(entry: str) -> None:
    name = "127.0.0.1" if entry[0] == "1" else "localhost"
    other = "localhost" if entry[0] == "1" else "127.0.0.1"
    with serve({"/a.png": image(b"image")}) as server:
        assert fetch(server.url("/a.png", name), allowed=[entry]) == b"image"
        refuse(server.url("/a.png", other), allowed=[entry])
        refuse(server.url("/a.png", "0x7f000001"), allowed=[entry])


def test_places_of_object_stores_are_allowed_by_their_beginning() -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe({"/open/a.png": b"image", "/closed/a.png": b"secret", "/opened/a.png": b"secret"})
    allowed = ["memory://open"]
    assert fetch("memory://open/a.png", allowed=allowed) == b"image"
    for path in ("closed/a.png", "opened/a.png", "open", "open/", "open/../closed/a.png"):
        refuse(f"memory://{path}", allowed=allowed)
    for odd in ("open/%2e%2e/closed/a.png", "open/a.png::memory://closed/a.png", "open/a .png"):
        refuse(f"memory://{odd}", allowed=allowed)
    with pytest.raises(RowError) as caught:
        fetch("memory://open/no.png", allowed=allowed)
    assert caught.value.error_type is ErrorType.MISSING_IMAGE
