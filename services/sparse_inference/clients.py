"""The worker's outgoing calls: the cache service for blocks, the scheduler for its lease. Protobuf stays in here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc
from autoglm.cache.v1 import cache_pb2, cache_pb2_grpc
from autoglm.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

from engine.runtime.loop import Load
from services.chassis.errors import from_rpc
from services.sparse_inference.prefixes import Scope, StoredBlock
from services.sparse_inference.settings import WorkerSettings
from services.sparse_inference.worker import Worker


class CacheClient:
    """`prefixes.RemoteBlocks` over gRPC."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = cache_pb2_grpc.CacheServiceStub(channel)

    async def match(self, scope: Scope, names: Sequence[bytes]) -> int:
        try:
            answer = await self._stub.Match(cache_pb2.MatchRequest(scope=_scope(scope), block_hashes=names))
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        return int(answer.matched_blocks)

    async def get(self, scope: Scope, names: Sequence[bytes]) -> AsyncIterator[StoredBlock]:
        try:
            async for answer in self._stub.Get(cache_pb2.GetRequest(scope=_scope(scope), block_hashes=names)):
                yield StoredBlock(answer.block.block_hash, answer.block.payload, answer.block.checksum)
        except grpc.RpcError as error:
            raise from_rpc(error) from None

    async def put(self, scope: Scope, blocks: Sequence[StoredBlock]) -> int:
        async def requests() -> AsyncIterator[cache_pb2.PutRequest]:
            for block in blocks:
                message = cache_pb2.Block(block_hash=block.name, payload=block.payload, checksum=block.checksum)
                yield cache_pb2.PutRequest(scope=_scope(scope), block=message)

        try:
            answer = await self._stub.Put(requests())
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        return int(answer.stored)


class LeaseClient:
    """The worker's membership: one stream to the scheduler, as long as it lasts."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)

    async def hold(self, reports: AsyncIterator[scheduler_pb2.LeaseRequest]) -> AsyncIterator[float]:
        """Sends `reports`; yields the reporting interval in seconds whenever the scheduler states it."""
        try:
            async for answer in self._stub.Lease(reports):
                yield answer.report_interval_ms / 1000
        except grpc.RpcError as error:
            raise from_rpc(error) from None


def registration(settings: WorkerSettings, worker: Worker, endpoint: str) -> scheduler_pb2.LeaseRequest:
    """The first message of a lease."""
    return scheduler_pb2.LeaseRequest(
        registration=scheduler_pb2.Registration(
            replica_id=settings.instance,
            endpoint=endpoint,
            model=settings.model_name,
            variant_digest=worker.variant.digest,
            block_tokens=worker.executor.block_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            kv_capacity_bytes=worker.kv_capacity_bytes,
            labels=settings.label_map,
            weight_bytes=worker.weight_bytes,
            kv_bytes_per_token=worker.kv_bytes_per_token,
            context_tokens=worker.context_tokens,
        )
    )


def load_report(load: Load) -> scheduler_pb2.LeaseRequest:
    """How busy the worker is."""
    return scheduler_pb2.LeaseRequest(
        load=scheduler_pb2.LoadReport(
            running=load.running,
            waiting=load.waiting,
            kv_used_bytes=load.kv_used_bytes,
            pending_prefill_tokens=load.pending_prefill_tokens,
        )
    )


def prefix_report(added: Sequence[bytes], removed: Sequence[bytes], reset: bool) -> scheduler_pb2.LeaseRequest:
    """Which blocks came and went."""
    return scheduler_pb2.LeaseRequest(prefixes=scheduler_pb2.PrefixReport(reset=reset, added=added, removed=removed))


def drain_notice() -> scheduler_pb2.LeaseRequest:
    """The worker takes no new requests."""
    return scheduler_pb2.LeaseRequest(drain=scheduler_pb2.Drain())


def _scope(scope: Scope) -> cache_pb2.Scope:
    return cache_pb2.Scope(variant_digest=scope.variant_digest, tenant=scope.tenant, block_tokens=scope.block_tokens)
