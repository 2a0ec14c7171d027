"""Tells the other clouds what is ready here, and hears the same from them: what Istio does through remote secrets.

Each cloud listens on one port and writes its whole offer, one JSON line, to whoever connects: at every change, and as a
heartbeat. Whole offers, so nothing can get out of step. Lines are read as a stranger's: bounded and validated. They are
not secret, and a liar gains nothing: whoever answers at an endpoint must show the certificate of the service.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from pydantic import ValidationError

from services.mesh.clouds.neighbours import Neighbours, Offer, Pace
from services.mesh.registry import Registry

log = logging.getLogger("autoglm.federation")

MAX_LINE_BYTES = 256 * 1024
MAX_LISTENERS = 32
RECONNECT_S = 0.2
TICK_S = 0.1

Peers = dict[str, tuple[str, int]]


class Federation:
    """One cloud's part in the exchange. `open`, then `run` until cancelled."""

    def __init__(
        self, address: str, port: int, peers: Peers, pace: Pace, offer: Callable[[], Offer], changed: Callable[[], None]
    ) -> None:
        """`offer` says what is ready here; `changed` is called when what the others offer has changed."""
        self._address, self._port, self._peers, self._pace = address, port, peers, pace
        self._offer, self._changed = offer, changed
        self._neighbours = Neighbours(tuple(peers), pace)
        self._moved = asyncio.Event()
        self._listeners: set[asyncio.Task[None]] = set()

    def joined(self, registry: Registry) -> Registry:
        """Our registry and what the others offer now."""
        return self._neighbours.joined(registry, time.monotonic())

    def heard(self) -> dict[str, float | None]:
        """Seconds since each of the others was heard; none for one that is gone."""
        return self._neighbours.heard(time.monotonic())

    def offer_changed(self) -> None:
        """Call when something became ready here or went away."""
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def run(self) -> None:
        """Serves and listens until cancelled."""
        server = await asyncio.start_server(self._meet, self._address, self._port, limit=4096)
        try:
            async with asyncio.TaskGroup() as group:
                for name, (host, port) in self._peers.items():
                    group.create_task(self._hear(name, host, port))
                group.create_task(self._watch())
        finally:
            server.close()
            for task in self._listeners:
                task.cancel()
            await asyncio.gather(*self._listeners, return_exceptions=True)

    def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._listeners) >= MAX_LISTENERS:
            writer.close()
            return
        task = asyncio.ensure_future(self._tell(writer))
        self._listeners.add(task)
        task.add_done_callback(self._listeners.discard)

    async def _tell(self, writer: asyncio.StreamWriter) -> None:
        """To one listener, until it goes away or no longer reads."""
        try:
            while True:
                moved = self._moved
                writer.write(self._offer().model_dump_json().encode() + b"\n")
                await asyncio.wait_for(writer.drain(), 4 * self._pace.stale_s)
                with suppress(TimeoutError):
                    await asyncio.wait_for(moved.wait(), self._pace.heartbeat_s)
        except (OSError, TimeoutError):
            pass
        finally:
            writer.close()

    async def _hear(self, name: str, host: str, port: int) -> None:
        while True:
            try:
                await self._listen(name, host, port)
            except (OSError, TimeoutError, ValueError) as error:  # ValueError: a line without end, or no offer
                log.debug("lost a neighbour", extra={"facts": {"cloud": name, "error": repr(error)[:200]}})
            await asyncio.sleep(RECONNECT_S)

    async def _listen(self, name: str, host: str, port: int) -> None:
        opening = asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)
        reader, writer = await asyncio.wait_for(opening, self._pace.stale_s)
        try:
            # `_watch` says when a cloud is gone; here only a connection that leads nowhere is given up.
            while line := await asyncio.wait_for(reader.readline(), 2 * self._pace.stale_s):
                try:
                    offer = Offer.model_validate_json(line)
                except ValidationError as error:
                    log.warning("an offer is not understood", extra={"facts": {"cloud": name, "why": str(error)[:300]}})
                    raise ValueError("not an offer") from None
                if offer.cloud != name:
                    raise ValueError(f"{offer.cloud} answers in the place of {name}")
                if self._neighbours.hear(name, offer, time.monotonic()):
                    log.info("heard", extra={"facts": {"cloud": name}})
                    self._changed()
        finally:
            writer.close()

    async def _watch(self) -> None:
        """Expiry and ramps: what changes by time alone."""
        ramps: dict[tuple[str, str], float] = {}
        now = time.monotonic()
        while True:
            due = now + TICK_S
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            late_s = now - due
            # A busy machine is always a little late; only a stall that could have swallowed heartbeats counts.
            gone = self._neighbours.expire(now, late_s if late_s > self._pace.stale_s / 2 else 0.0)
            for name in gone:
                log.warning("not heard of; its endpoints are dropped", extra={"facts": {"cloud": name}})
            before, ramps = ramps, self._neighbours.ramps(now)
            if gone or ramps != before:
                self._changed()
