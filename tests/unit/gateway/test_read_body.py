"""Reading a request's body: bounded, and polite to a client that sends too much."""

from __future__ import annotations

import pytest
from starlette.requests import Request
from starlette.types import Message

from services.gateway.rest.connection import DISCARDED_TIMES, read_body
from services.gateway.rest.errors import ApiError

LIMIT, PIECE = 1000, 100


def sending(pieces: int, declared: bool) -> tuple[Request, list[int]]:
    """A request whose client sends `pieces` pieces, and the list of those that were read."""
    read: list[int] = []

    async def receive() -> Message:
        read.append(PIECE)
        return {"type": "http.request", "body": b"x" * PIECE, "more_body": len(read) < pieces}

    length = [(b"content-length", str(pieces * PIECE).encode())] if declared else []
    return Request({"type": "http", "method": "POST", "path": "/", "headers": length}, receive), read


@pytest.mark.parametrize("declared", [True, False])
async def test_what_is_too_much_is_read_before_it_is_refused(declared: bool) -> None:
    """The client has sent everything when the 413 comes, so it reads the answer and not a reset."""
    request, read = sending(2 * LIMIT // PIECE, declared)
    with pytest.raises(ApiError, match="larger than 1000 bytes"):
        await read_body(request, LIMIT, 5)
    assert sum(read) == 2 * LIMIT


@pytest.mark.parametrize("declared", [True, False])
async def test_a_client_without_end_is_cut_off(declared: bool) -> None:
    """Beyond the discarded share nothing more is read; a declared length that long is not read at all."""
    request, read = sending(100 * LIMIT // PIECE, declared)
    with pytest.raises(ApiError, match="larger than 1000 bytes"):
        await read_body(request, LIMIT, 5)
    assert sum(read) == (0 if declared else DISCARDED_TIMES * LIMIT + PIECE)


async def test_a_body_of_just_the_bound_is_read_whole() -> None:
    """The bound itself is allowed."""
    request, _ = sending(LIMIT // PIECE, True)
    assert len(await read_body(request, LIMIT, 5)) == LIMIT
