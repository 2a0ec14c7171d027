"""Keeps the worker's lease with the scheduler: registers, reports load and prefixes, renews a broken stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import AsyncIterator, Callable

from autoglm.scheduler.v1 import scheduler_pb2

from engine.runtime.pages import PagePool
from services.chassis.errors import ServiceError
from services.sparse_inference.clients import LeaseClient, drain_notice, load_report, prefix_report, registration
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker

log = logging.getLogger("autoglm.lease")

FIRST_INTERVAL_S = 0.2
BACKOFF_S = (0.1, 2.0)
PREFIXES_PER_REPORT = 4096
SHORTEST_INTERVAL_S = 0.01


def reached_at(settings: WorkerSettings, port: int) -> str:
    """`ip:port` by which Envoy reaches the worker. One that listens everywhere says the address it has on the way to
    Envoy: no packet is sent to find it.
    """
    if settings.advertise:
        return settings.advertise
    address = settings.bind
    if address == "0.0.0.0":
        host, _, number = settings.target("scheduler").removeprefix("dns:///").rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(number)))
            address = probe.getsockname()[0]
    return f"{address}:{port}"


class Lease:
    """Run `hold` as a task for as long as the worker lives; `drain` tells the scheduler at once."""

    def __init__(
        self,
        settings: WorkerSettings,
        worker: Worker,
        pages: PagePool,
        client: LeaseClient,
        endpoint: str,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings, self._worker, self._pages, self._client = settings, worker, pages, client
        self._endpoint, self._jitter = endpoint, jitter
        self._interval_s = FIRST_INTERVAL_S
        self._drain = asyncio.Event()
        self._told = asyncio.Event()

    async def hold(self) -> None:
        """Leases for ever; a broken stream is renewed after a jittered, growing pause."""
        pause = BACKOFF_S[0]
        while True:
            try:
                async with contextlib.aclosing(self._client.hold(self._reports())) as intervals:  # type: ignore[type-var]
                    async for interval in intervals:
                        self._interval_s = max(interval, SHORTEST_INTERVAL_S)
                        pause = BACKOFF_S[0]
                log.info("the scheduler ended the lease")
            except ServiceError as error:
                log.info("no lease", extra={"facts": {"reason": error.message, "again_in_s": round(pause, 2)}})
            except Exception:  # a bug, but a worker without a lease gets no requests: try again
                log.exception("the lease failed")
            await asyncio.sleep(pause * (0.5 + self._jitter()))
            pause = min(pause * 2, BACKOFF_S[1])

    async def drain(self) -> None:
        """Tells the scheduler, if it listens, that no new requests are taken."""
        self._drain.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), 1.0)

    async def _reports(self) -> AsyncIterator[scheduler_pb2.LeaseRequest]:
        yield registration(self._settings, self._worker, self._endpoint)
        self._pages.restate()
        reset = True
        while True:
            yield load_report(self._worker.load())
            while True:
                added, removed = self._pages.changes(PREFIXES_PER_REPORT)
                if added or removed or reset:
                    yield prefix_report(added, removed, reset)
                    reset = False
                if max(len(added), len(removed)) < PREFIXES_PER_REPORT:
                    break
            if self._drain.is_set():
                yield drain_notice()
                self._told.set()
                await asyncio.Event().wait()  # the stream stays open until the process ends
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drain.wait(), self._interval_s)
