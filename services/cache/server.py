"""The gRPC face of the cache: protobuf in and out, checks that no single field can make, counters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias

import grpc
from autoglm.cache.v1 import cache_pb2 as pb
from autoglm.cache.v1 import cache_pb2_grpc
from opentelemetry import trace

from engine.prefix import scope_key
from services.cache.blocks import Block, BlockKey
from services.cache.shared_artifacts import SharedArtifacts
from services.cache.store import BlockStore, Outcome
from services.cache.tiers import Occupancy
from services.chassis.errors import InvalidRequest
from services.chassis.offload import Offload

CHECKED_AT_ONCE_BYTES = 64 << 10
"""Smaller payloads are hashed on the event loop (about 70 µs); a thread would cost more."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class CacheServicer(cache_pb2_grpc.CacheServiceServicer):
    """Blocks and artifacts over the stores."""

    def __init__(
        self, blocks: BlockStore, artifacts: SharedArtifacts, offload: Offload, max_blocks_per_put: int
    ) -> None:
        self._blocks, self._artifacts, self._offload = blocks, artifacts, offload
        self._max_blocks_per_put = max_blocks_per_put

    async def Match(self, request: pb.MatchRequest, context: Context) -> pb.MatchResponse:
        matched = await self._blocks.match(_chain(request.scope, request.block_hashes))
        _note(**{"autoglm.cache.asked": len(request.block_hashes), "autoglm.cache.matched": matched})
        return pb.MatchResponse(matched_blocks=matched)

    async def Get(self, request: pb.GetRequest, context: Context) -> AsyncIterator[pb.GetResponse]:
        count = 0
        async for block in self._blocks.fetch(_chain(request.scope, request.block_hashes)):
            count += 1
            yield pb.GetResponse(
                block=pb.Block(block_hash=block.key.block_hash, payload=block.payload, checksum=block.checksum)
            )
        _note(**{"autoglm.cache.asked": len(request.block_hashes), "autoglm.cache.delivered": count})

    async def Put(self, request_iterator: AsyncIterator[pb.PutRequest], context: Context) -> pb.PutResponse:
        counts = dict.fromkeys(Outcome, 0)
        chain: list[BlockKey] = []
        first: pb.Scope | None = None
        try:
            async for request in request_iterator:
                if len(chain) == self._max_blocks_per_put:
                    raise InvalidRequest(f"more than {self._max_blocks_per_put} blocks in one call")
                if first is None:
                    first, scope = request.scope, _scope(request.scope)
                elif request.scope != first:
                    raise InvalidRequest("scope: differs from that of the first message", field="scope")
                block = Block(BlockKey(scope, request.block.block_hash), request.block.payload, request.block.checksum)
                await self._prove(block)
                counts[await self._blocks.put(block, chain[-1] if chain else None)] += 1
                chain.append(block.key)
        finally:
            self._blocks.settle(chain)
        _note(**{f"autoglm.cache.{outcome.value}": count for outcome, count in counts.items()})
        return pb.PutResponse(
            stored=counts[Outcome.STORED], present=counts[Outcome.PRESENT], refused=counts[Outcome.REFUSED]
        )

    async def GetArtifact(
        self, request: pb.GetArtifactRequest, context: Context
    ) -> AsyncIterator[pb.GetArtifactResponse]:
        async for piece in self._artifacts.read(request.digest, request.offset):
            yield pb.GetArtifactResponse(offset=piece.offset, content=piece.content, total_bytes=piece.total_bytes)

    async def PutArtifact(
        self, request_iterator: AsyncIterator[pb.PutArtifactRequest], context: Context
    ) -> pb.PutArtifactResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            raise InvalidRequest("the stream is empty; its first message must carry the digest", field="digest")

        async def contents() -> AsyncIterator[bytes]:
            yield first.content
            async for request in request_iterator:
                yield request.content

        stored = await self._artifacts.put(first.digest, contents())
        return pb.PutArtifactResponse(total_bytes=stored.total_bytes, present=stored.is_old)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        occupancies = [*self._blocks.occupancies(), self._artifacts.local.occupancy()]
        return pb.GetStatsResponse(
            tiers=map(_stats, occupancies),
            hit_blocks=self._blocks.hit_blocks,
            missed_blocks=self._blocks.missed_blocks,
            corrupt_blocks=self._blocks.corrupt_blocks,
        )

    async def _prove(self, block: Block) -> None:
        is_small = len(block.payload) <= CHECKED_AT_ONCE_BYTES
        if not (block.is_intact() if is_small else await self._offload(block.is_intact)):
            raise InvalidRequest("block.checksum: does not fit scope, hash and payload", field="block.checksum")


def _chain(scope: pb.Scope, hashes: Sequence[bytes]) -> list[BlockKey]:
    key = _scope(scope)
    return [BlockKey(key, block_hash) for block_hash in hashes]


def _scope(scope: pb.Scope) -> bytes:
    if scope.variant_digest.strip().lower() in ("", "unknown") or not scope.tenant.strip():
        raise InvalidRequest("scope: variant and tenant must be known", field="scope")
    return scope_key(scope.variant_digest, scope.tenant, scope.block_tokens)


def _stats(occupancy: Occupancy) -> pb.TierStats:
    return pb.TierStats(
        name=occupancy.name,
        entries=occupancy.entries,
        used_bytes=occupancy.used_bytes,
        capacity_bytes=occupancy.capacity_bytes,
        evicted=occupancy.evicted,
    )


def _note(**facts: int) -> None:
    trace.get_current_span().set_attributes(facts)
