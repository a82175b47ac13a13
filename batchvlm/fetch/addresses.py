"""Which addresses a row may name: public ones on the web, and what the configuration names.

A row's text is untrusted: it must not reach the machine that runs the job, its network, or a
cloud's metadata service. What counts is the address that is connected to, whatever it is written
like: names are resolved once, and the connection goes to the addresses that were looked at.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from aiohttp import ThreadedResolver
from aiohttp.abc import ResolveResult
from yarl import URL

from batchvlm.errors import ErrorType, RowError
from batchvlm.words import ends_in_number

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_WEB = ("http", "https")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Whatever stands there, one of the two programs that read an address may see another one.
_ODD = re.compile(r"[\x00-\x20\x7f\\]")


def forbidden(why: str) -> RowError:
    """The error of a row that names an address which is not allowed."""
    return RowError(ErrorType.FORBIDDEN, f"an image's address {why}")


@dataclass(frozen=True)
class Allowed:
    """What `data.allow_hosts` allows besides the public web.

    Args:
        entries: names or addresses of hosts (`images.intra`, `10.0.0.5`, `[::1]`), and beginnings
            of object-store addresses (`s3://bucket/folder`).
    """

    entries: Sequence[str] = ()

    def web(self, text: str) -> URL:
        """An address on the web that may be asked, as far as its text tells.

        Raises:
            RowError: it is not allowed (`forbidden`).
        """
        if _ODD.search(text):
            raise forbidden("holds white space or a backslash")
        try:
            url = URL(text)
            host, _ = url.host, url.port
        except ValueError as error:
            raise forbidden("cannot be read") from error
        if url.scheme not in _WEB:
            raise forbidden("is no http or https address")
        if url.user is not None or url.password is not None:
            raise forbidden("holds a user name")
        if not host:
            raise forbidden("names no host")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            # A name, looked at once it is resolved; this machine's own needs no resolving.
            name = host.lower().rstrip(".")
            is_own = name == "localhost" or name.endswith(".localhost")
            # What connects may read 127.1, or 127.0.0.1 with a full stop behind it, as an address
            # and ask no resolver for it.
            if ends_in_number(name) or "%" in name or (is_own and not self._has_host(host)):
                raise forbidden("names this machine, or is written oddly") from None
            return url
        self.check(host, address)
        return url

    def check(self, host: str, address: Address) -> None:
        """See that a host may have an address.

        Raises:
            RowError: it is not a public one, and the host is not allowed by name (`forbidden`).
        """
        if not is_public(address) and not self._has_host(host):
            raise forbidden("leads to a private or reserved network address")

    def _has_host(self, host: str) -> bool:
        wanted = host.lower().rstrip(".").strip("[]")
        hosts = (entry for entry in self.entries if "://" not in entry)
        return any(entry.lower().rstrip(".").strip("[]") == wanted for entry in hosts)

    def store(self, text: str) -> tuple[str, str]:
        """The protocol and path of an object-store address that an entry allows.

        Raises:
            RowError: none does (`forbidden`).
        """
        protocol, _, path = text.partition("://")
        parts = unquote(path).split("/")
        # "::" chains file systems; a glob or a dot segment could lead elsewhere.
        if "::" in text or _ODD.search(text) or {"..", "."} & set(parts):
            raise forbidden("is not written plainly")
        for entry in self.entries:
            allowed, separator, start = entry.partition("://")
            start = posixpath.join(start, "")
            if separator and allowed == protocol and path.startswith(start) and path != start:
                return protocol, path
        raise forbidden("is of a place that data.allow_hosts does not name")


def is_public(address: Address) -> bool:
    """Whether an address is on the public network, also by way of an embedded IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None or address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None or address.is_site_local:
            return False  # tunnels that nobody uses any more
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


class CheckedResolver(ThreadedResolver):
    """Resolves names to addresses that were looked at; the client connects to no other."""

    def __init__(self, allowed: Allowed) -> None:
        super().__init__()
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Every address of a name.

        Raises:
            OSError: there is none.
            RowError: one of them is not allowed; a name may not mix them (`forbidden`).
        """
        found = await self._lookup(host, port, family)
        for result in found:
            # A scope behind a percent sign marks an address of the local link.
            self._allowed.check(host, ipaddress.ip_address(result["host"].partition("%")[0]))
        return found

    async def _lookup(
        self, host: str, port: int, family: socket.AddressFamily
    ) -> list[ResolveResult]:
        return await super().resolve(host, port, family)
