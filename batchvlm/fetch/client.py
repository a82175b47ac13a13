"""One address -> its bytes: within time and size, redirects looked at, faults tried again."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import fsspec
from yarl import URL

from batchvlm import __version__
from batchvlm.errors import ErrorType, RowError
from batchvlm.fetch.addresses import Allowed, CheckedResolver, forbidden
from batchvlm.fetch.gate import Pass

_CHUNK_BYTES = 1 << 16
_MAX_REDIRECTS = 5
_MAX_RETRY_AFTER_S = 60.0
"""A server that asks for more patience than this gets none."""
_FIRST_BACKOFF_S = 0.5
_REDIRECTS = {301, 302, 303, 307, 308}
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_GONE = {404, 410}


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """How much an image's address may cost."""

    timeout_s: float
    """For one attempt, from the connection to the last byte."""
    attempts: int
    concurrency: int
    """Addresses asked at the same time; at most half of them of one host."""
    max_image_bytes: int
    """Read no further than one byte beyond this."""


class _FaultError(Exception):
    """An attempt failed in a way that the next one may not."""

    def __init__(self, reason: str, *, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """What the server asked for."""


class Client:
    """Fetches images in one event loop; an async context manager.

    Args:
        allowed: what may be asked besides the public web.
        limits: time, size, attempts.
        sleep, clock: how time passes between attempts.
    """

    def __init__(
        self,
        allowed: Allowed,
        limits: FetchLimits,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed = allowed
        self._limits = limits
        self._sleep, self._clock = sleep, clock
        self._not_before: dict[str, float] = {}

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=CheckedResolver(self._allowed), limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            # A proxy of the environment would connect on our behalf, where nothing is checked.
            trust_env=False,
            # Compressed, a small answer could hold any number of bytes; images are packed anyway.
            auto_decompress=False,
            headers={"User-Agent": f"batchvlm/{__version__}", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def fetch(self, address: str, row: Pass) -> bytes:
        """The bytes behind an address; of more than `max_image_bytes`, one too many.

        Raises:
            RowError: `forbidden`, `missing_image`, `too_large` or `fetch`.
        """
        is_web = address.partition(":")[0].lower() in ("http", "https")
        ask: Callable[[], Awaitable[bytes]]
        if is_web:
            url = self._allowed.web(address)
            host = url.host or ""
            ask = partial(self._follow, url, row)
        else:
            protocol, path = self._allowed.store(address)
            host = f"{protocol}://{path.partition('/')[0]}"
            ask = partial(self._read_object, protocol, path, row)
        fault = _FaultError("")
        for attempt in range(self._limits.attempts):
            if attempt and fault.wait_s is None:
                # Half by chance: rows that failed together shall not come back together.
                backoff_s = _FIRST_BACKOFF_S * 2 ** (attempt - 1)
                await self._sleep(backoff_s * random.uniform(0.5, 1.5))
            await self._wait_for(host)
            async with row.connection(host):
                try:
                    return await ask()
                except _FaultError as error:
                    fault = error
            if fault.wait_s is not None:
                if fault.wait_s > _MAX_RETRY_AFTER_S:
                    break
                self._not_before[host] = self._clock() + fault.wait_s
        raise RowError(ErrorType.FETCH, f"the image could not be fetched: {fault}")

    async def _wait_for(self, host: str) -> None:
        """Leave a host alone that has asked for it, for other rows' sake as well."""
        while (left_s := self._not_before.get(host, 0.0) - self._clock()) > 0:
            await self._sleep(left_s)

    async def _follow(self, url: URL, row: Pass) -> bytes:
        """Ask an address, and where that leads to another one, that; each is looked at."""
        limit_s = self._limits.timeout_s
        try:
            async with asyncio.timeout(limit_s) as deadline:

                async def take_paused(num_bytes: int) -> None:
                    # Time in which we do not read is not the server's.
                    paused_s = await row.take(num_bytes)
                    when = deadline.when()
                    if paused_s and when is not None:
                        deadline.reschedule(when + paused_s)

                for _ in range(_MAX_REDIRECTS + 1):
                    async with self._session.get(url, allow_redirects=False) as response:
                        if response.status not in _REDIRECTS:
                            return await self._read(response, take_paused)
                        location = response.headers.get("Location", "")
                    try:
                        target = str(url.join(URL(location)))
                    except ValueError as error:
                        raise forbidden("leads to one that cannot be read") from error
                    url = self._allowed.web(target)
            raise RowError(ErrorType.FETCH, f"more than {_MAX_REDIRECTS} redirects")
        except TimeoutError as error:
            raise _FaultError(f"it took longer than {limit_s:g} s") from error
        except aiohttp.InvalidURL as error:
            raise forbidden("cannot be read") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _FaultError(type(error).__name__) from error

    async def _read(
        self, response: aiohttp.ClientResponse, take: Callable[[int], Awaitable[None]]
    ) -> bytes:
        status, most = response.status, self._limits.max_image_bytes
        if status in _GONE:
            raise RowError(ErrorType.MISSING_IMAGE, f"the image's server says {status}")
        if status in _TRY_AGAIN:
            wait_s = _retry_after_s(response.headers.get("Retry-After"))
            raise _FaultError(f"its server says {status}", wait_s=wait_s)
        if status != 200:
            raise RowError(ErrorType.FETCH, f"the image's server says {status}")
        if (response.content_length or 0) > most:
            raise RowError(
                ErrorType.TOO_LARGE,
                f"the image has {response.content_length} bytes, more than "
                f"data.max_image_bytes={most}",
            )
        data = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            await take(len(chunk))
            data += chunk
            if len(data) > most:
                break
        return bytes(data[: most + 1])

    async def _read_object(self, protocol: str, path: str, row: Pass) -> bytes:
        most = self._limits.max_image_bytes
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                data: bytes = await asyncio.to_thread(_cat, protocol, path, most + 1)
        except FileNotFoundError as error:
            raise RowError(ErrorType.MISSING_IMAGE, "the image's address has no object") from error
        except PermissionError as error:
            raise RowError(ErrorType.FETCH, "the image's object may not be read") from error
        except ImportError as error:
            raise RowError(ErrorType.FETCH, f"{protocol}:// needs a package: {error}") from error
        except Exception as error:  # each file system raises errors of its own
            raise _FaultError(type(error).__name__) from error
        await row.take(len(data))
        return data


def _cat(protocol: str, path: str, num_bytes: int) -> Any:
    fs = fsspec.filesystem(protocol)
    if protocol == "hf" and not path.startswith("buckets/"):
        return _cat_of_hub(fs, path, num_bytes)
    try:
        return fs.cat_file(path, start=0, end=num_bytes)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError:
        # Of an object without a byte S3 sends none.
        if fs.size(path) == 0:
            return b""
        raise


def _cat_of_hub(fs: Any, path: str, num_bytes: int) -> bytes:
    """A file of a repository, without a listing of its folder, which may hold a million."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
    )

    place = fs.resolve_path(path)
    url = hf_hub_url(
        place.repo_id,
        place.path_in_repo,
        repo_type=place.repo_type,
        revision=place.revision,
        endpoint=fs.endpoint,
    )
    headers = build_hf_headers(token=fs.token) | {"Range": f"bytes=0-{num_bytes - 1}"}
    response = http_backoff("GET", url, headers=headers, max_retries=0, follow_redirects=True)
    if response.status_code == 416:
        return b""  # of a file without a byte none can be sent
    try:
        hf_raise_for_status(response)
    except EntryNotFoundError as error:
        raise FileNotFoundError(path) from error
    return bytes(response.content)


def _retry_after_s(value: str | None) -> float | None:
    """Seconds that a `Retry-After` asks for, as a number or as a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, until.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
