"""Fetch one address within limits of time and size, with checked redirects and retries."""

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
"""If a server asks for a longer wait, there is no retry."""
_FIRST_BACKOFF_S = 0.5
_REDIRECTS = {301, 302, 303, 307, 308}
_RETRIED_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_MISSING_STATUSES = {404, 410}


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """Limits for fetching images."""

    timeout_s: float
    """Limit for one attempt, from the connection to the last byte."""
    attempts: int
    concurrency: int
    """Concurrent requests; at most half of them go to one host."""
    max_image_bytes: int
    """At most one byte more than this is read of an image."""


class _FaultError(Exception):
    """An attempt failed, but the next one may succeed."""

    def __init__(self, reason: str, *, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """Seconds that the server asked to wait; None if it did not."""


class Client:
    """Fetches images in one event loop; an async context manager.

    Args:
        allowed: addresses that are allowed in addition to the public web.
        limits: limits of time, size and attempts.
        sleep, clock: replaced in tests.
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
            # A proxy from the environment would connect to addresses that are not checked.
            trust_env=False,
            # A small compressed response could expand without limit; images are compressed anyway.
            auto_decompress=False,
            headers={"User-Agent": f"batchvlm/{__version__}", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def fetch(self, address: str, row: Pass) -> bytes:
        """Return the content of an address, cut one byte after `max_image_bytes`.

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
                # Random jitter, so that rows that failed together do not retry together.
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
        """Wait until the `Retry-After` of a host has passed; it applies to all rows."""
        while (left_s := self._not_before.get(host, 0.0) - self._clock()) > 0:
            await self._sleep(left_s)

    async def _follow(self, url: URL, row: Pass) -> bytes:
        """Request an address and follow redirects, checking each address."""
        limit_s = self._limits.timeout_s
        try:
            async with asyncio.timeout(limit_s) as deadline:

                async def take_paused(num_bytes: int) -> None:
                    # Time spent waiting for room does not count against the server.
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
        if status in _MISSING_STATUSES:
            raise RowError(ErrorType.MISSING_IMAGE, f"the image's server says {status}")
        if status in _RETRIED_STATUSES:
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
        except Exception as error:  # each file system has its own errors
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
        # S3 refuses a range of an empty object.
        if fs.size(path) == 0:
            return b""
        raise


def _cat_of_hub(fs: Any, path: str, num_bytes: int) -> bytes:
    """Read a file of a Hub repository without listing its folder, which may hold a million."""
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
        return b""  # an empty file has no valid range
    try:
        hf_raise_for_status(response)
    except EntryNotFoundError as error:
        raise FileNotFoundError(path) from error
    return bytes(response.content)


def _retry_after_s(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, a number or a date; None if it is invalid."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, until.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
