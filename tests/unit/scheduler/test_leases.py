"""Leases over a real gRPC server: a replica is known exactly as long as its stream lives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from autoglm.scheduler.v1 import scheduler_pb2 as api
from autoglm.scheduler.v1 import scheduler_pb2_grpc

from services.chassis.interceptors import EdgeInterceptor
from services.scheduler.records import Recorder
from services.scheduler.replicas import Flight, Load, Registration, ReplicaTable
from services.scheduler.server import SchedulerService
from services.scheduler.settings import SchedulerSettings


class Watched(ReplicaTable):
    """The real table, with an event for every change of membership."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.changed = asyncio.Condition()

    def _resort(self) -> None:
        super()._resort()
        asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, names: set[str]) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: {r.registration.replica_id for r in self.replicas()} == names)


class House:
    """A server with its table, and clients."""

    def __init__(self, table: Watched, address: str, draining: asyncio.Event) -> None:
        self.table, self.address, self.draining = table, address, draining
        self.channels: list[grpc.aio.Channel] = []

    def stub(self) -> scheduler_pb2_grpc.SchedulerServiceStub:
        """A client with a connection of its own."""
        self.channels.append(grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]))
        return scheduler_pb2_grpc.SchedulerServiceStub(self.channels[-1])

    async def join(self, name: str, **facts: Any) -> Any:
        call = self.stub().Lease()
        await call.write(registration(name, **facts))
        assert isinstance(await call.read(), api.LeaseResponse)
        return call


def registration(name: str, **facts: Any) -> api.LeaseRequest:
    plain = {"endpoint": "127.0.0.1:1", "model": "m", "variant_digest": "v", "block_tokens": 16, "max_running": 4}
    return api.LeaseRequest(registration=api.Registration(replica_id=name, **(plain | facts)))


@contextlib.asynccontextmanager
async def house(**settings: Any) -> AsyncIterator[House]:
    chosen = SchedulerSettings(**settings)
    table = Watched(chosen.max_replicas, chosen.max_prefix_blocks, lambda: 42, 7)
    draining = asyncio.Event()
    server = grpc.aio.server(interceptors=[EdgeInterceptor()])
    service = SchedulerService(table, Recorder(10), chosen, draining)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    made = House(table, f"127.0.0.1:{port}", draining)
    try:
        yield made
    finally:
        for channel in made.channels:
            await channel.close()
        await server.stop(0)


async def test_a_lease_lasts_as_long_as_its_stream() -> None:
    """Half-closed politely or torn by a lost connection: the replica is gone at once."""
    async with house() as at:
        polite, _torn = await at.join("polite"), await at.join("torn")
        await at.table.until({"polite", "torn"})
        await polite.done_writing()
        await at.table.until({"torn"})
        await at.channels[-1].close()
        await at.table.until(set())


async def test_a_newer_lease_wins() -> None:
    """The same replica_id again: higher epoch, the older stream ends with ABORTED, and its end removes nobody."""
    async with house() as at:
        older = at.stub().Lease()
        await older.write(registration("w", endpoint="127.0.0.1:1"))
        first = await older.read()
        newer = at.stub().Lease()
        await newer.write(registration("w", endpoint="127.0.0.1:2"))
        second = await newer.read()
        assert first.epoch == 7 and second.epoch == 8  # type: ignore[union-attr]
        assert await older.code() is grpc.StatusCode.ABORTED
        listed = await at.stub().ListReplicas(api.ListReplicasRequest())
        assert [(r.registration.endpoint, r.epoch) for r in listed.replicas] == [("127.0.0.1:2", 8)]


async def test_reports_change_what_is_known() -> None:
    """Load replaces load, prefixes add up and reset, drain marks."""
    async with house(max_prefix_blocks=3) as at:
        call = await at.join("w", labels={"version": "v1"})
        await call.write(api.LeaseRequest(load=api.LoadReport(running=3, waiting=2, kv_used_bytes=9)))
        blocks = [bytes([number]) * 32 for number in range(5)]
        await call.write(api.LeaseRequest(prefixes=api.PrefixReport(added=blocks[:2])))
        await call.write(api.LeaseRequest(prefixes=api.PrefixReport(added=blocks[2:], removed=blocks[:1])))
        await call.write(api.LeaseRequest(drain=api.Drain()))
        await call.done_writing()
        replica = at.table.replicas()[0]
        await at.table.until(set())
        assert (replica.load, replica.reported_ns, replica.draining) == (Load(3, 2, 9, 0), 42, True)
        assert list(replica.prefixes) == blocks[2:], "the oldest block is forgotten when the set is full"
        assert replica.matched_blocks([blocks[2], blocks[3], blocks[0]]) == 2


async def test_a_silent_worker_loses_its_lease() -> None:
    """No report within the lease time-out: the stream ends with UNAVAILABLE and the replica is gone."""
    async with house(lease_timeout_ms=50) as at:
        call = await at.join("w")
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        await at.table.until(set())


async def test_a_draining_worker_may_be_silent() -> None:
    """It has nothing left to report: its lease lasts until its stream ends, though others time out beside it."""
    async with house(lease_timeout_ms=50) as at:
        draining = await at.join("draining")
        await draining.write(api.LeaseRequest(drain=api.Drain()))
        for _ in range(2):  # each of these lives its whole time-out after the drain was sent
            assert await (await at.join("silent")).code() is grpc.StatusCode.UNAVAILABLE
        await at.table.until({"draining"})
        await draining.done_writing()
        await at.table.until(set())


async def test_a_drain_ends_leases_cleanly() -> None:
    """The scheduler goes away: workers see a clean end and may register with another."""
    async with house() as at:
        call = await at.join("w")
        at.draining.set()
        assert await call.code() is grpc.StatusCode.OK
        await at.table.until(set())


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (api.LeaseRequest(load=api.LoadReport()), "must be a registration"),
        (registration("w", endpoint="worker.local:1"), "ip:port"),
        (registration("w", endpoint="1.2.3.4:1,5.6.7.8:2"), "ip:port"),
        (registration("w", block_tokens=0), "block_tokens"),
    ],
)
async def test_a_bad_registration_is_refused(message: api.LeaseRequest, words: str) -> None:
    """With INVALID_ARGUMENT, and nobody is in the table."""
    async with house() as at:
        call = at.stub().Lease()
        await call.write(message)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (await call.details() or "") and len(at.table) == 0


async def test_the_table_is_bounded() -> None:
    """One worker more than max_replicas: RESOURCE_EXHAUSTED for it, the others stay."""
    async with house(max_replicas=1) as at:
        await at.join("first")
        call = at.stub().Lease()
        await call.write(registration("second"))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await at.table.until({"first"})


def test_a_flight_is_counted_once_wherever_it_is() -> None:
    """Boarding another replica leaves the first; ending twice is ending once; a report remembers the count."""
    table = ReplicaTable(2, 0, lambda: 1)
    one, two = (
        table.register(Registration(name, f"{name}:1", "m", "v", 16, 1), lambda: None) for name in ("one", "two")
    )
    with Flight() as flight:
        flight.board(one)
        flight.board(one)
        table.report_load(one, Load(running=1))
        flight.board(two)
        assert (one.in_flight, one.in_flight_at_report, two.in_flight) == (0, 1, 1)
        flight.end()
    assert (one.in_flight, two.in_flight) == (0, 0)
