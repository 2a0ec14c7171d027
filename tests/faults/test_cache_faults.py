"""The cache under damage, kill -9, full disks and malformed calls: a miss at worst, never wrong bytes."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import pytest
from autoglm.cache.v1 import cache_pb2 as pb
from autoglm.cache.v1 import cache_pb2_grpc

from engine.prefix import block_checksum
from services.cache.blocks import HEADER_BYTES, Block, BlockKey
from tests.fakes import kv_blocks
from tests.fakes.processes import Service, running

SCOPE = pb.Scope(variant_digest=kv_blocks.VARIANT, tenant="tenant", block_tokens=16)
REGIONS = {
    "magic": 0,
    "scope": 8,
    "hash": 40,
    "parent": 72,
    "checksum": 104,
    "size": 136,
    "digest": 144,
    "payload": 176,
}


def started(directory: Path, **more: str) -> AbstractContextManager[Service]:
    environment = {"AUTOGLM_CACHE_DIRECTORY": str(directory), "AUTOGLM_CACHE_MEMORY_BYTES": "0", **more}
    return running("services.cache", **environment)


def to_request(block: Block) -> pb.PutRequest:
    return pb.PutRequest(
        scope=SCOPE, block=pb.Block(block_hash=block.key.block_hash, payload=block.payload, checksum=block.checksum)
    )


async def put(address: str, blocks: list[Block]) -> pb.PutResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        return await cache_pb2_grpc.CacheServiceStub(channel).Put(map(to_request, blocks))


async def get(address: str, keys: list[BlockKey]) -> list[pb.Block]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = cache_pb2_grpc.CacheServiceStub(channel).Get(
            pb.GetRequest(scope=SCOPE, block_hashes=[key.block_hash for key in keys])
        )
        return [answer.block async for answer in call]


def right(found: list[pb.Block], size: int) -> bool:
    """Whether every delivered block is exactly what a worker once made."""
    scope = kv_blocks.scope()
    return all(
        block.payload == kv_blocks.block(BlockKey(scope, block.block_hash), size).payload
        and block.checksum == block_checksum(scope, block.block_hash, block.payload)
        for block in found
    )


async def test_kill_9_in_the_middle_of_writing_loses_at_most_what_was_on_its_way(tmp_path: Path) -> None:
    """Six rounds of kill -9 under load: every block acknowledged before is there afterwards, all bytes are right."""
    acknowledged: list[list[BlockKey]] = []
    for round_number in range(6):
        with started(tmp_path) as service:
            for keys in acknowledged:
                found = await get(service.address, keys)
                assert len(found) == len(keys)
                assert right(found, 3000)
            keys = kv_blocks.chain(round_number, 20)
            assert (await put(service.address, kv_blocks.blocks(keys, 3000))).stored == 20
            acknowledged.append(keys)
            unfinished = kv_blocks.chain(1000 + round_number, 200)
            task = asyncio.create_task(put(service.address, kv_blocks.blocks(unfinished, 3000)))
            while not (await get(service.address, unfinished[:5])):
                pass
            await asyncio.to_thread(service.kill)
            with pytest.raises(grpc.aio.AioRpcError):
                await task
    with started(tmp_path) as service:
        for round_number in range(6):
            found = await get(service.address, kv_blocks.chain(1000 + round_number, 200))
            assert right(found, 3000)
        assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("moment", ["while it runs", "while it is down"])
async def test_damage_anywhere_is_a_miss(tmp_path: Path, moment: str) -> None:
    """1,000 flipped bits over every region of the files: no wrong byte is ever delivered, damage is counted.

    The control arm reads the same damaged files without the checksum and does see wrong payloads.
    """
    chooser = random.Random(moment)
    chains = [kv_blocks.chain(seed, 1) for seed in range(1000)]
    blocks = [kv_blocks.block(keys[0], 600) for keys in chains]

    def damage() -> int:
        wrong = 0
        files = sorted((tmp_path / "blocks").rglob("*.kv"))
        assert len(files) == 1000
        for index, path in enumerate(files):
            start = list(REGIONS.values())[index % len(REGIONS)]
            end = min((each for each in REGIONS.values() if each > start), default=HEADER_BYTES + 600)
            data = bytearray(path.read_bytes())
            before = bytes(data[HEADER_BYTES:])
            data[chooser.randrange(start, end)] ^= 1 << chooser.randrange(8)
            wrong += data[HEADER_BYTES:] != before
            path.write_bytes(data)
        return wrong

    limits = {"AUTOGLM_CACHE_DISK_BYTES": str(64 << 20)}
    with started(tmp_path, **limits) as service:
        assert (await put(service.address, blocks)).stored == 1000
        if moment == "while it runs":
            assert damage() == 125
            assert [await get(service.address, keys) for keys in chains[:300]] == [[]] * 300
            assert 'autoglm_cache_corrupt_total{tier="disk"} 300.0' in service.metrics()
        else:
            service.kill()
    if moment == "while it is down":
        assert damage() == 125
        with started(tmp_path, **limits) as service:
            assert [await get(service.address, keys) for keys in chains] == [[]] * 1000
            page = service.metrics()
            assert 'autoglm_cache_corrupt_total{tier="disk"} 125.0' in page
            assert 'autoglm_cache_scan_dropped_total{reason="damaged header"} 875.0' in page
            assert (await put(service.address, blocks)).stored == 1000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(
            f"NOT RUN: a small file system cannot be mounted here ({done.stderr.strip()}); "
            "tests/unit/cache/test_disk_tier.py has the twin without one"
        )
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


async def test_a_full_disk_turns_spilling_off_and_serving_goes_on(small_disk: Path) -> None:
    """Blocks beyond 1 MiB are refused by count, stored ones are served, space that returns is used within 5 s."""
    ballast = small_disk / "ballast"
    with started(small_disk, AUTOGLM_CACHE_DISK_RETRY_S="0.2") as service:
        keys = kv_blocks.chain(1, 10)
        assert (await put(service.address, kv_blocks.blocks(keys, 3000))).stored == 10
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        more = kv_blocks.chain(2, 100)
        answer = await put(service.address, kv_blocks.blocks(more, 9000))
        assert answer.refused > 0
        assert answer.stored + answer.refused == 100
        found = await get(service.address, keys)
        assert len(found) == 10 and right(found, 3000)
        assert right(await get(service.address, more), 9000)
        assert 'autoglm_fallback_total{kind="cache_disk_write"}' in service.metrics()
        ballast.unlink()
        fresh = kv_blocks.block(kv_blocks.chain(3, 1)[0], 9000)
        async with asyncio.timeout(20):
            while not (await put(service.address, [fresh])).stored:
                pass
        assert right(await get(service.address, [fresh.key]), 9000)


async def test_memory_serves_on_when_the_disk_is_full(small_disk: Path) -> None:
    """With both tiers, a full disk costs only what memory cannot hold."""
    (small_disk / "ballast").write_bytes(bytes(900_000))
    with started(small_disk, AUTOGLM_CACHE_MEMORY_BYTES="600000") as service:
        for seed in range(20):
            assert (await put(service.address, kv_blocks.blocks(kv_blocks.chain(seed, 10), 9000))).stored > 0
        assert len(await get(service.address, kv_blocks.chain(19, 10))) == 10


async def test_forged_blocks_are_never_accepted(tmp_path: Path) -> None:
    """2,000 blocks with a right checksum for another key or a guessed checksum: none is stored."""
    chooser = random.Random(3)
    keys = kv_blocks.chain(1, 2)
    honest = kv_blocks.block(keys[0], 200)
    with started(tmp_path) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = cache_pb2_grpc.CacheServiceStub(channel)

            async def forge() -> None:
                forged = to_request(honest)
                match chooser.randrange(4):
                    case 0:
                        forged.block.block_hash = keys[1].block_hash
                    case 1:
                        forged.scope.tenant = f"victim{chooser.randrange(10)}"
                    case 2:
                        forged.scope.variant_digest = "sha256:" + chooser.randbytes(32).hex()
                    case _:
                        forged.block.checksum = chooser.randbytes(32)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Put(iter([forged]))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

            for _ in range(20):
                await asyncio.gather(*(forge() for _ in range(100)))
            stats = await stub.GetStats(pb.GetStatsRequest())
            assert sum(tier.entries for tier in stats.tiers) == 0


@pytest.fixture
async def running_cache(tmp_path: Path) -> AsyncIterator[Service]:
    with started(tmp_path, AUTOGLM_CACHE_MEMORY_BYTES="1000000") as service:
        yield service


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 20,
        b"\x0a\xff\xff\xff\xff\x7f",
        b"\x0a" + b"\xff" * 9 + b"\x01",
        b"\x0b" * 10_000,
        b"\xfa\x7f\x01x" * 250_000,
        os.urandom(1000),
        b"\x0a\x05\x0a\xff\xff\xff\xff",
    ],
)
async def test_malformed_calls_are_refused_and_the_connection_lives(running_cache: Service, data: bytes) -> None:
    """Truncated varints, absurd lengths, a million unknown fields: a typed refusal, then the next call is served."""
    async with grpc.aio.insecure_channel(running_cache.address) as channel:
        raw = channel.unary_unary("/autoglm.cache.v1.CacheService/Match", lambda body: body, lambda body: body)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(data)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stats = await cache_pb2_grpc.CacheServiceStub(channel).GetStats(pb.GetStatsRequest())
        assert stats.tiers[0].name == "memory"
