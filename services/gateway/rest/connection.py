"""One HTTP exchange below the level of JSON: reading a bounded body, noticing that the client has gone, replying."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Send

from services.gateway.rest.errors import ApiError
from services.gateway.rest.render import Json, encode

DISCARDED_TIMES = 4


class ClientGone(Exception):
    """The client closed the connection; there is no one to answer."""


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body, or ApiError 413, 415 or 408. Never holds more than `max_bytes`.

    What is too much is read and thrown away up to DISCARDED_TIMES the bound: a client that is still sending when the
    connection closes would see a reset instead of the answer.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, not {kind[:64]}", code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(
            415, f"the body must be sent as it is, not {coding[:64]}-encoded", code="unsupported_content_encoding"
        )
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > DISCARDED_TIMES * max_bytes:
        raise too_large
    body, received = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_s):
            async for some in request.stream():
                received += len(some)
                if received <= max_bytes:
                    body += some
                elif received > DISCARDED_TIMES * max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", code="body_timeout") from None
    except ClientDisconnect:
        raise ClientGone from None
    if received > max_bytes:
        raise too_large
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` and cancels it when the client goes (ClientGone). Call once the body has been read."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


class Reply:
    """Sends one response; every one carries `headers`."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send, self._headers = send, dict(headers)
        self.status: int | None = None

    @property
    def has_begun(self) -> bool:
        return self.status is not None

    async def json(self, status: int, body: Json, headers: Mapping[str, str] | None = None) -> None:
        content = encode(body)
        await self._begin(
            status, {"content-type": "application/json", "content-length": str(len(content))} | dict(headers or {})
        )
        await self._send({"type": "http.response.body", "body": content})

    async def stream(self, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sends a part of an event stream; the first one sends the status and `headers`."""
        if not self.has_begun:
            kind = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            await self._begin(200, kind | dict(headers or {}))
        await self._send({"type": "http.response.body", "body": content, "more_body": True})

    async def end(self) -> None:
        """Ends an event stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        raw = [(name.encode(), value.encode()) for name, value in (self._headers | dict(headers)).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
