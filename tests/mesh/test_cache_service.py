"""The cache as a real process over gRPC: what it stores, what it refuses, and how it ends and begins again."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from autoglm.cache.v1 import cache_pb2 as pb
from autoglm.cache.v1 import cache_pb2_grpc

from services.cache.blocks import Block
from tests.fakes import kv_blocks
from tests.fakes.processes import Service, running

SCOPE = pb.Scope(variant_digest=kv_blocks.VARIANT, tenant="tenant", block_tokens=16)


def put_request(block: Block, scope: pb.Scope = SCOPE) -> pb.PutRequest:
    return pb.PutRequest(
        scope=scope,
        block=pb.Block(block_hash=block.key.block_hash, payload=block.payload, checksum=block.checksum),
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = str(tmp_path_factory.mktemp("cache"))
    with running(
        "services.cache",
        AUTOGLM_CACHE_DIRECTORY=directory,
        AUTOGLM_CACHE_MEMORY_BYTES="500000",
        AUTOGLM_CACHE_MAX_BLOCKS_PER_PUT="100",
    ) as process:
        yield process


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[cache_pb2_grpc.CacheServiceAsyncStub]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield cache_pb2_grpc.CacheServiceStub(channel)


async def test_blocks_come_back_byte_for_byte(stub: cache_pb2_grpc.CacheServiceAsyncStub) -> None:
    """Put, match, get: over memory and disk alike, for empty-ish and large payloads."""
    for seed, size in ((1, 1), (2, 30_000), (3, 1 << 20)):
        keys = kv_blocks.chain(seed, 4)
        blocks = kv_blocks.blocks(keys, size)
        hashes = [key.block_hash for key in keys]
        assert (await stub.Put(map(put_request, blocks))).stored == 4
        assert (await stub.Put(map(put_request, blocks))).present == 4
        assert (await stub.Match(pb.MatchRequest(scope=SCOPE, block_hashes=hashes))).matched_blocks == 4
        answers = [answer async for answer in stub.Get(pb.GetRequest(scope=SCOPE, block_hashes=hashes))]
        assert [(a.block.payload, a.block.checksum) for a in answers] == [(b.payload, b.checksum) for b in blocks]
    stats = await stub.GetStats(pb.GetStatsRequest())
    assert [tier.name for tier in stats.tiers] == ["memory", "disk", "artifacts"]
    assert all(tier.used_bytes <= tier.capacity_bytes for tier in stats.tiers)
    assert stats.tiers[1].entries > 0


@pytest.mark.parametrize(
    "other",
    [
        pb.Scope(variant_digest=kv_blocks.VARIANT, tenant="other", block_tokens=16),
        pb.Scope(variant_digest="sha256:" + "b" * 64, tenant="tenant", block_tokens=16),
        pb.Scope(variant_digest=kv_blocks.VARIANT, tenant="tenant", block_tokens=17),
    ],
)
async def test_another_scope_never_hits(stub: cache_pb2_grpc.CacheServiceAsyncStub, other: pb.Scope) -> None:
    """Reading another's hash is a miss; writing a block proved for another scope is refused."""
    keys = kv_blocks.chain(11, 3)
    blocks = kv_blocks.blocks(keys)
    hashes = [key.block_hash for key in keys]
    await stub.Put(map(put_request, blocks))
    assert (await stub.Match(pb.MatchRequest(scope=other, block_hashes=hashes))).matched_blocks == 0
    assert [answer async for answer in stub.Get(pb.GetRequest(scope=other, block_hashes=hashes))] == []
    with pytest.raises(grpc.aio.AioRpcError, match="checksum") as caught:
        await stub.Put(put_request(block, other) for block in blocks)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_does_not_prove_itself_is_refused(stub: cache_pb2_grpc.CacheServiceAsyncStub) -> None:
    """Wrong checksums, mixed scopes, unknown variants and too many blocks: typed refusals, and nothing is stored."""
    keys = kv_blocks.chain(21, 101)
    good = put_request(kv_blocks.block(keys[0]))
    flipped = put_request(kv_blocks.block(keys[1]))
    flipped.block.payload = flipped.block.payload[:-1] + bytes([flipped.block.payload[-1] ^ 1])
    moved = put_request(kv_blocks.block(keys[1]))
    moved.block.block_hash = keys[2].block_hash
    mixed = put_request(kv_blocks.block(keys[1]), pb.Scope(variant_digest="v", tenant="tenant", block_tokens=16))
    unknown = put_request(kv_blocks.block(keys[1]), pb.Scope(variant_digest="unknown", tenant="t", block_tokens=16))
    many = [put_request(kv_blocks.block(key, 10)) for key in keys]
    for requests, word in (
        ([flipped], "checksum"),
        ([moved], "checksum"),
        ([good, mixed], "scope"),
        ([unknown], "known"),
        ([pb.PutRequest()], "must be set"),
        (many, "more than 100"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Put(iter(requests))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert word in str(caught.value.details())
        if requests is not many:
            for key in keys[1:3]:
                request = pb.MatchRequest(scope=SCOPE, block_hashes=[key.block_hash])
                assert (await stub.Match(request)).matched_blocks == 0


async def test_artifacts_over_the_wire(stub: cache_pb2_grpc.CacheServiceAsyncStub) -> None:
    """Stored once, resumed from any offset, refused when the digest lies or is malformed, NOT_FOUND when absent."""
    data = random.Random(5).randbytes(2_500_000)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()

    def pieces(content: bytes) -> Iterator[pb.PutArtifactRequest]:
        for start in range(0, len(content), 1 << 20):
            yield pb.PutArtifactRequest(digest=digest if not start else "", content=content[start : start + (1 << 20)])

    with pytest.raises(grpc.aio.AioRpcError, match="the content is not"):
        await stub.PutArtifact(pieces(data[:-1] + b"?"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetArtifact(pb.GetArtifactRequest(digest=digest)).read()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    first = await stub.PutArtifact(pieces(data))
    assert (first.total_bytes, first.present) == (len(data), False)
    again = await stub.PutArtifact(pieces(data))
    assert (again.total_bytes, again.present) == (len(data), True)
    for offset in (0, 1_234_567, len(data)):
        request = pb.GetArtifactRequest(digest=digest, offset=offset)
        answers = [answer async for answer in stub.GetArtifact(request)]
        assert b"".join(answer.content for answer in answers) == data[offset:]
        assert {answer.total_bytes for answer in answers} == {len(data)}
    for bad in ("sha256:" + "A" * 64, "sha256:" + "../" * 21 + "a"):
        with pytest.raises(grpc.aio.AioRpcError, match="hexadecimal"):
            await stub.PutArtifact(iter([pb.PutArtifactRequest(digest=bad)]))


async def test_the_metrics_page_shows_every_tier(service: Service) -> None:
    """Occupancy, capacity and counters by tier, under stable names."""
    metrics = service.metrics()
    for tier in ("memory", "disk"):
        for name in ("used_bytes", "capacity_bytes", "entries"):
            assert f'autoglm_cache_{name}{{tier="{tier}"}}' in metrics
    assert "autoglm_cache_misses_total" in metrics


async def test_sigterm_drains_and_a_restart_is_warm(tmp_path: Path) -> None:
    """An open Put finishes during the drain; memory is moved to disk; the next process serves all of it."""
    keys = kv_blocks.chain(31, 30)
    blocks = kv_blocks.blocks(keys, 5000)
    environment = {"AUTOGLM_CACHE_DIRECTORY": str(tmp_path)}
    with running("services.cache", **environment) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = cache_pb2_grpc.CacheServiceStub(channel)
            call = stub.Put()
            await call.write(put_request(blocks[0]))
            first = pb.MatchRequest(scope=SCOPE, block_hashes=[keys[0].block_hash])
            while not (await stub.Match(first)).matched_blocks:
                pass
            process.process.terminate()
            await asyncio.to_thread(process.wait_for, "draining")
            for block in blocks[1:]:
                await call.write(put_request(block))
            await call.done_writing()
            assert (await call).stored == 30
        assert process.wait(20) == 0
    with running("services.cache", **environment) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = cache_pb2_grpc.CacheServiceStub(channel)
            hashes = [key.block_hash for key in keys]
            answers = [answer async for answer in stub.Get(pb.GetRequest(scope=SCOPE, block_hashes=hashes))]
            assert [answer.block.payload for answer in answers] == [block.payload for block in blocks]
        with running("services.cache", ready=None, **environment) as second:
            assert second.wait(20) == 2
            assert any("belongs to another cache" in line.get("text", "") for line in second.lines)
        assert process.terminate() == 0
