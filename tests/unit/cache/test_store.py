"""One suite for every tier: what is put comes back, scopes never meet, bounds hold, failures are misses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.cache.blocks import Block, BlockKey
from services.cache.disk_tier import DiskTier
from services.cache.eviction import Eviction
from services.cache.memory_tier import MemoryTier
from services.cache.redis_tier import RedisTier
from services.cache.store import BlockStore, Outcome
from services.cache.tiers import Tier
from services.chassis.offload import Offload
from tests.fakes import kv_blocks, redis_server

MAX_BLOCK = 100_000
KINDS = ["memory", "disk", "memory over disk", "redis (fake)", "redis (real)", "memory over redis (fake)"]


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlockStore]:
    kind: str = request.param
    tiers: list[Tier] = []
    offload = Offload("test", 2, 64)
    async with AsyncExitStack() as stack:
        if kind.startswith("memory"):
            tiers.append(MemoryTier(20_000 if "over" in kind else 400_000, 400_000))
        if "disk" in kind:
            disk = DiskTier(tmp_path, Eviction(400_000, 400_000), offload, MAX_BLOCK, 0.1, keeps_victims=False)
            await disk.open()
            tiers.append(disk)
        if "redis" in kind:
            if "fake" in kind:
                url = (await stack.enter_async_context(redis_server.FakeRedis())).url
            elif redis_server.real_binary() is None:
                pytest.skip("NOT RUN: neither valkey-server nor redis-server is installed here")
            else:
                url = stack.enter_context(redis_server.real_server(str(tmp_path)))
            tiers.append(RedisTier(url, 2.0, 60, 4, MAX_BLOCK))
        store = BlockStore(tiers, MAX_BLOCK, links=1000)
        yield store
        await store.close(spill_s=0)
        offload.close()


async def put(store: BlockStore, blocks: list[Block]) -> list[Outcome]:
    outcomes, previous = [], None
    for block in blocks:
        outcomes.append(await store.put(block, previous))
        previous = block.key
    store.settle([block.key for block in blocks])
    return outcomes


async def fetch(store: BlockStore, keys: list[BlockKey]) -> list[Block]:
    return [block async for block in store.fetch(keys)]


async def test_what_is_put_comes_back(store: BlockStore) -> None:
    """Stored blocks match and are fetched byte for byte, in order."""
    keys = kv_blocks.chain(1, 20)
    blocks = kv_blocks.blocks(keys)
    assert await put(store, blocks) == [Outcome.STORED] * 20
    assert await store.match(keys) == 20
    assert [(b.key, b.payload, b.checksum) for b in await fetch(store, keys)] == [
        (b.key, b.payload, b.checksum) for b in blocks
    ]


async def test_only_leading_blocks_count(store: BlockStore) -> None:
    """A hole ends both the match and the fetch; hits and misses are counted."""
    keys = kv_blocks.chain(2, 6)
    blocks = kv_blocks.blocks(keys)
    await put(store, blocks[:2] + blocks[3:])
    assert await store.match(keys) == 2
    assert len(await fetch(store, keys)) == 2
    assert (store.hit_blocks, store.missed_blocks) == (4, 8)
    assert await store.match(kv_blocks.chain(3, 4)) == 0


async def test_scopes_never_meet(store: BlockStore) -> None:
    """The same hashes under another tenant or block size are a miss, fetched or matched."""
    keys = kv_blocks.chain(4, 4)
    await put(store, kv_blocks.blocks(keys))
    for other in (kv_blocks.scope("other"), kv_blocks.scope(block_tokens=8), bytes(32)):
        foreign = [BlockKey(other, key.block_hash) for key in keys]
        assert await store.match(foreign) == 0
        assert await fetch(store, foreign) == []


async def test_too_large_a_block_is_refused(store: BlockStore) -> None:
    """The limit per value is exact."""
    exact, over = kv_blocks.chain(5, 2)
    assert await store.put(kv_blocks.block(exact, MAX_BLOCK), None) is Outcome.STORED
    assert await store.put(kv_blocks.block(over, MAX_BLOCK + 1), None) is Outcome.REFUSED
    assert len(await fetch(store, [exact])) == 1


async def test_bounds_hold_and_beginnings_survive(store: BlockStore) -> None:
    """Ten times the capacity goes in; no tier exceeds its bound, and of every prompt a prefix is what is left."""
    chains = [kv_blocks.chain(100 + number, 20) for number in range(40)]
    for keys in chains:
        await put(store, kv_blocks.blocks(keys, 5000))
        for tier in store.occupancies():
            assert tier.used_bytes <= tier.capacity_bytes
    if any(tier.name == "redis" for tier in store.occupancies()):
        return  # it bounds itself
    left = 0
    for keys in chains:
        matched = await store.match(keys)
        left += matched
        assert [await store.match([key]) for key in keys] == [1] * matched + [0] * (20 - matched)
    assert 0 < left < 800


async def test_many_at_once(store: BlockStore) -> None:
    """Concurrent puts and fetches of the same prompts give right bytes or a miss, never anything else."""
    chains = [kv_blocks.chain(200 + number % 4, 10) for number in range(16)]

    async def work(keys: list[BlockKey]) -> int:
        await put(store, kv_blocks.blocks(keys, 3000))
        found = await fetch(store, keys)
        assert all(block.payload == kv_blocks.block(block.key, 3000).payload for block in found)
        return len(found)

    assert sum(await asyncio.gather(*(work(keys) for keys in chains))) > 0


async def test_victims_sink_and_hits_rise(tmp_path: Path) -> None:
    """What memory lets go is on disk; fetched from there it is in memory again, at the price of another."""
    offload = Offload("test", 1, 64)
    memory = MemoryTier(25_000, 25_000)
    disk = DiskTier(tmp_path, Eviction(10**6, 10**6), offload, MAX_BLOCK, 0.1, keeps_victims=False)
    await disk.open()
    store = BlockStore([memory, disk], MAX_BLOCK, links=0)
    old, new = kv_blocks.chain(1, 4), kv_blocks.chain(2, 4)
    await put(store, kv_blocks.blocks(old, 4000))
    await put(store, kv_blocks.blocks(new, 4000))
    assert not any(await memory.present(old))
    assert await store.match([*old]) == 4
    assert len(await fetch(store, old)) == 4
    assert all(await memory.present(old))
    assert await store.match(new) == 4
    await store.close(spill_s=5)
    assert await disk.present([*old, *new]) == [True] * 8
    offload.close()
