"""The artifact store's last tier: a bucket (S3, GCS, Azure) or a folder, which the caches of several clouds share.

One object per artifact, `sha256/<xx>/<hex>`, visible only when it is whole. Nothing here proves content: who reads
does. Every request has a time limit; a store that keeps failing is left alone for growing pauses. Credentials are the
environment's, as the clouds' own tools read them (AWS_…, GOOGLE_…, AZURE_…), and are never logged.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from services.chassis import telemetry
from services.chassis.breaker import Breaker
from services.chassis.errors import Unavailable

log = logging.getLogger("autoglm.object_store")

T = TypeVar("T")

SCHEMES = ("file", "s3", "gs", "az", "azure", "abfs", "abfss")
READ_BYTES = 4 << 20
"""Asked for at once. One download holds this much in memory."""
WRITE_BYTES = 5 << 20
"""A part of an upload: the smallest that S3 takes. One upload holds two."""
MOST_PARTS = 9_000
"""S3 takes 10,000; a larger artifact goes in larger parts."""
PARTS_AT_ONCE = 1
RETRIES = 2
WORDS = 200
_QUERY = re.compile(r"\?\S*")


class BadUrl(ValueError):
    """The object store's URL cannot be used; the text says why."""


class ObjectStore:
    """Artifacts by the hexadecimal part of their digest. Failures are `Unavailable`, absence is None."""

    def __init__(self, url: str, timeout_s: float, connect_timeout_s: float, allows_http: bool) -> None:
        """Raises `BadUrl`; nothing is asked of the store yet."""
        self._store: Any = _open(
            url, timeout_s, connect_timeout_s, allows_http
        )  # one of several classes with the same methods
        self._timeout_s = timeout_s
        self._breaker = Breaker()

    async def size(self, name: str) -> int | None:
        """Bytes of the object; None when there is none."""
        facts = await self._try("size", lambda: obstore.head_async(self._store, _path(name)))
        return None if facts is None else int(facts["size"])

    async def read(self, name: str, size: int) -> AsyncIterator[bytes]:
        """The object's first `size` bytes in pieces."""
        position = 0
        while position < size:
            length = min(READ_BYTES, size - position)
            content = await self._try("read", self._range(name, position, length))
            if not content:
                raise _failure("read", "the object is shorter than it was, or gone")
            yield content
            position += len(content)

    async def write(self, name: str, size: int, pieces: AsyncIterator[bytes]) -> None:
        """Stores an object whole or not at all; one that is there is replaced by the same."""
        part = max(WRITE_BYTES, -(-size // MOST_PARTS))
        writer = obstore.open_writer_async(self._store, _path(name), buffer_size=part, max_concurrency=PARTS_AT_ONCE)
        # A writer that is dropped before `close` leaves nothing that can be read.
        async for piece in pieces:
            await self._try("write", lambda piece=piece: writer.write(piece))  # type: ignore[misc]
        await self._try("write", writer.close)

    def _range(self, name: str, start: int, length: int) -> Callable[[], Coroutine[Any, Any, bytes]]:
        async def ask() -> bytes:
            return bytes(await obstore.get_range_async(self._store, _path(name), start=start, length=length))

        return ask

    async def _try(self, operation: str, call: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        if not self._breaker.allows():
            telemetry.FALLBACKS.labels(kind="cache_object_store_off").inc()
            raise _failure(operation, "it has failed before and is left alone for a while")
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await call()
        except FileNotFoundError:
            self._breaker.succeeded()
            return None
        except TimeoutError:
            self._breaker.failed()
            telemetry.fallback("cache_object_store", operation=operation, error="TimeoutError")
            raise _failure(operation, f"no answer within {self._timeout_s:g} s") from None
        except (BaseError, OSError) as error:
            self._breaker.failed()
            kind = type(error).__name__
            telemetry.fallback("cache_object_store", operation=operation, error=kind)
            log.warning("the object store failed", extra={"facts": {"operation": operation, "details": _words(error)}})
            raise _failure(operation, kind) from None
        self._breaker.succeeded()
        return answer


def check(url: str) -> None:
    """Raises `BadUrl` for what can be seen to be wrong without asking anybody."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise BadUrl(f"must begin with one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadUrl("must have neither credentials, nor ?, nor #; credentials come from the environment")
    if parts.scheme == "file":
        if parts.netloc or not parts.path.strip("/"):
            raise BadUrl("a folder is written file:///absolute/path")
    elif not parts.netloc:
        raise BadUrl("names no bucket or container")


def _open(url: str, timeout_s: float, connect_timeout_s: float, allows_http: bool) -> object:
    check(url)
    try:
        if urlsplit(url).scheme == "file":
            return LocalStore.from_url(url, mkdir=True)
        return from_url(
            url,
            client_options={
                "allow_http": allows_http,
                "connect_timeout": timedelta(seconds=connect_timeout_s),
                "timeout": timedelta(seconds=timeout_s),
            },
            retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=timeout_s)},
        )
    except (BaseError, ValueError, OSError) as error:
        raise BadUrl(_words(error)) from None


def _path(name: str) -> str:
    return f"sha256/{name[:2]}/{name}"


def _failure(operation: str, why: str) -> Unavailable:
    return Unavailable(f"the shared object store failed ({operation}: {why})", operation=operation)


def _words(error: BaseException) -> str:
    """What the library says, in one line and without what a signed URL has after its question mark."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return _QUERY.sub("", first)[:WORDS]
