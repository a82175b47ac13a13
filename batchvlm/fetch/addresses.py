"""Which addresses a row may name: those of the public web, and those that the configuration allows.

Rows are untrusted: they must not reach the machine that runs the job, its network, or a cloud's
metadata service. The check is on the IP address that is connected to, however it is written: a name
is resolved once, and the client connects only to the addresses that were checked.
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
# Characters that two URL parsers may treat differently, so that they see different hosts.
_ODD = re.compile(r"[\x00-\x20\x7f\\]")


def forbidden(why: str) -> RowError:
    """Return the error for a row with an address that is not allowed."""
    return RowError(ErrorType.FORBIDDEN, f"an image's address {why}")


@dataclass(frozen=True)
class Allowed:
    """The addresses that `data.allow_hosts` allows in addition to the public web.

    Args:
        entries: names or IP addresses of hosts (`images.intra`, `10.0.0.5`, `[::1]`), and prefixes
            of object-store addresses (`s3://bucket/folder`).
    """

    entries: Sequence[str] = ()

    def web(self, text: str) -> URL:
        """Parse and check a web address, as far as is possible without resolving its host.

        Raises:
            RowError: the address is not allowed (`forbidden`).
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
            # A host name: `CheckedResolver` checks it, except for names of this machine.
            name = host.lower().rstrip(".")
            is_own = name == "localhost" or name.endswith(".localhost")
            # The client may treat 127.1, or 127.0.0.1 with a trailing dot, as an IP address and
            # not resolve it.
            if ends_in_number(name) or "%" in name or (is_own and not self._has_host(host)):
                raise forbidden("names this machine, or is written oddly") from None
            return url
        self.check(host, address)
        return url

    def check(self, host: str, address: Address) -> None:
        """Check an IP address of a host.

        Raises:
            RowError: the IP address is not public and the host is not in `entries` (`forbidden`).
        """
        if not is_public(address) and not self._has_host(host):
            raise forbidden("leads to a private or reserved network address")

    def _has_host(self, host: str) -> bool:
        wanted = host.lower().rstrip(".").strip("[]")
        hosts = (entry for entry in self.entries if "://" not in entry)
        return any(entry.lower().rstrip(".").strip("[]") == wanted for entry in hosts)

    def store(self, text: str) -> tuple[str, str]:
        """Return the protocol and path of an object-store address that an entry allows.

        Raises:
            RowError: no entry allows the address (`forbidden`).
        """
        protocol, _, path = text.partition("://")
        parts = unquote(path).split("/")
        # "::" chains file systems, and dot segments could lead out of an allowed folder.
        if "::" in text or _ODD.search(text) or {"..", "."} & set(parts):
            raise forbidden("is not written plainly")
        for entry in self.entries:
            allowed, separator, start = entry.partition("://")
            start = posixpath.join(start, "")
            if separator and allowed == protocol and path.startswith(start) and path != start:
                return protocol, path
        raise forbidden("is of a place that data.allow_hosts does not name")


def is_public(address: Address) -> bool:
    """Whether an IP address is public; for IPv4-mapped and NAT64 ones, the embedded address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None or address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None or address.is_site_local:
            return False  # obsolete tunnels
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


class CheckedResolver(ThreadedResolver):
    """Resolves names and checks the IP addresses; the client connects to no others."""

    def __init__(self, allowed: Allowed) -> None:
        super().__init__()
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return every IP address of a name.

        Raises:
            OSError: the name has none.
            RowError: any of them is not allowed (`forbidden`).
        """
        found = await self._lookup(host, port, family)
        for result in found:
            # Strip the scope of a link-local address, which follows a percent sign.
            self._allowed.check(host, ipaddress.ip_address(result["host"].partition("%")[0]))
        return found

    async def _lookup(
        self, host: str, port: int, family: socket.AddressFamily
    ) -> list[ResolveResult]:
        return await super().resolve(host, port, family)
