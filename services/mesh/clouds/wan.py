"""The distance between clouds: TCP proxies that hold every byte back for a one-way delay with seeded jitter.

The kernel of a small machine often has no netem, and this needs no privilege. Order is kept, the buffer of each
direction is bounded, and whoever stops reading stops the sender. A connection is accepted before the far side is
reached, as a real wide-area network does not: nothing is read until it is, and it is closed at once when it cannot be.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger("autoglm.wan")

CHUNK_BYTES = 64 * 1024
CHUNKS_UNDER_WAY = 64
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Way:
    """Listens at `at`, leads to `to`."""

    at: tuple[str, int]
    to: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Distance:
    """One-way delay and the jitter around it."""

    one_way_s: float = 0.012
    jitter_s: float = 0.002
    seed: int = 7


async def serve(ways: Iterable[Way], distance: Distance) -> list[asyncio.Server]:
    """All ways open, until the servers are closed."""
    draw = random.Random(distance.seed)
    servers = []
    for way in ways:
        chance = random.Random(draw.random())

        def meet(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way = way, chance: random.Random = chance
        ) -> asyncio.Task[None]:
            return asyncio.ensure_future(_carry(reader, writer, way, distance, chance))

        servers.append(await asyncio.start_server(meet, *way.at, limit=CHUNK_BYTES))
    return servers


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way, distance: Distance, chance: random.Random
) -> None:
    far_writer: asyncio.StreamWriter | None = None
    try:
        opening = asyncio.open_connection(*way.to, limit=CHUNK_BYTES)
        far_reader, to_far = await asyncio.wait_for(opening, CONNECT_S)
        far_writer = to_far
        there = asyncio.create_task(_one_way(reader, to_far, distance, chance))
        back = asyncio.create_task(_one_way(far_reader, writer, distance, chance))
        try:
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in (there, back):
                task.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
    except (OSError, TimeoutError) as error:
        log.debug("no way", extra={"facts": {"to": way.to, "error": repr(error)[:200]}})
    finally:
        for each in (writer, far_writer):
            if each is not None:
                each.transport.abort()


async def _one_way(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, distance: Distance, chance: random.Random
) -> None:
    """Bytes with their time of arrival, one after the other; the end of the stream travels like any byte."""
    loop = asyncio.get_running_loop()
    under_way: deque[tuple[float, bytes]] = deque()
    room = asyncio.Semaphore(CHUNKS_UNDER_WAY)
    sent = asyncio.Event()

    async def deliver() -> None:
        while True:
            while not under_way:
                sent.clear()
                await sent.wait()
            due, data = under_way.popleft()
            room.release()
            if (left := due - loop.time()) > 0:
                await asyncio.sleep(left)
            if not data:
                with suppress(OSError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    delivery = asyncio.create_task(deliver())
    due = 0.0
    try:
        while True:
            await room.acquire()
            data = await reader.read(CHUNK_BYTES)
            delay = distance.one_way_s + chance.uniform(-distance.jitter_s, distance.jitter_s)
            due = max(due, loop.time() + max(0.0, delay))
            under_way.append((due, data))
            sent.set()
            if not data:
                break
            if delivery.done():
                break
        await delivery
    finally:
        delivery.cancel()
