"""The block store: tiers in order, fastest first. New blocks enter at the top, victims sink, hits rise.

A failing tier is a miss, never an error: whoever asks recomputes. Used from one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from enum import Enum

from services.cache.blocks import Block, BlockKey
from services.cache.disk_tier import DiskTier
from services.cache.memory_tier import MemoryTier
from services.cache.redis_tier import RedisTier
from services.cache.tiers import HITS, MISSES, Occupancy, Tier, publish
from services.chassis import telemetry


class Outcome(Enum):
    """What became of a block that was put."""

    STORED = "stored"
    PRESENT = "present"
    REFUSED = "refused"


class Links:
    """Parents learnt from requests, for blocks that may be stored soon. Oldest forgotten first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parents: OrderedDict[BlockKey, BlockKey] = OrderedDict()

    def learn(self, chain: Sequence[BlockKey]) -> None:
        for parent, key in itertools.pairwise(chain):
            if parent != key:
                self._parents[key] = self._parents.pop(key, parent)
        while len(self._parents) > self._limit:
            self._parents.popitem(last=False)

    def parent(self, key: BlockKey) -> BlockKey | None:
        return self._parents.get(key)


class BlockStore:
    """Blocks by key over one or more tiers."""

    def __init__(self, tiers: Sequence[Tier], max_block_bytes: int, links: int) -> None:
        self._tiers = tuple(tiers)
        self._max_block_bytes = max_block_bytes
        self._links = Links(links)
        self.hit_blocks = self.missed_blocks = 0
        for tier in self._tiers:
            publish(tier)

    async def match(self, chain: Sequence[BlockKey]) -> int:
        """How many leading blocks are stored. Makes them young, but only fetching protects."""
        self._links.learn(chain)
        is_there = [False] * len(chain)
        for tier in self._tiers:
            missing = [index for index, found in enumerate(is_there) if not found]
            if not missing:
                break
            for index, found in zip(missing, await tier.present([chain[each] for each in missing]), strict=True):
                is_there[index] = found
        matched = is_there.index(False) if False in is_there else len(chain)
        self._count(matched, len(chain) - matched)
        self._touch(chain[:matched], promote=False)
        return matched

    async def fetch(self, chain: Sequence[BlockKey]) -> AsyncIterator[Block]:
        """Blocks in order, up to the first that is missing or damaged."""
        self._links.learn(chain)
        found = 0
        try:
            for key in chain:
                block = await self._read(key)
                if block is None:
                    break
                found += 1
                yield block
            else:
                return
            self._count(0, len(chain) - found)
        finally:
            self._count(found, 0)
            self._touch(chain[:found], promote=True)

    async def put(self, block: Block, previous: BlockKey | None) -> Outcome:
        """Stores a block that is intact. `previous` came before it in the same call and is taken for its parent."""
        if len(block.payload) > self._max_block_bytes:
            return Outcome.REFUSED
        for tier in self._tiers:
            if not isinstance(tier, RedisTier) and (await tier.present([block.key]))[0]:
                return Outcome.PRESENT
        parent = self._links.parent(block.key) or (previous if previous != block.key else None)
        known = Block(block.key, block.payload, block.checksum, parent)
        return Outcome.STORED if await self._write(0, known) else Outcome.REFUSED

    def settle(self, chain: Sequence[BlockKey]) -> None:
        """After the blocks of one call have been put: brings them and their ancestors into the order of eviction."""
        self._touch(chain, promote=False)

    @property
    def corrupt_blocks(self) -> int:
        return sum(tier.corrupt for tier in self._tiers if isinstance(tier, DiskTier | RedisTier))

    def occupancies(self) -> list[Occupancy]:
        return [tier.occupancy() for tier in self._tiers]

    async def close(self, spill_s: float) -> None:
        """Moves memory to the tiers below, as far as time allows, and closes them."""
        memory = self._tiers[0] if self._tiers else None
        if isinstance(memory, MemoryTier) and len(self._tiers) > 1 and spill_s:
            try:
                async with asyncio.timeout(spill_s):
                    for block in memory.oldest_first():
                        await self._write(1, block)
            except TimeoutError:
                telemetry.fallback("cache_spill_unfinished", seconds=spill_s)
        for tier in self._tiers:
            await tier.close()

    async def _read(self, key: BlockKey) -> Block | None:
        for level, tier in enumerate(self._tiers):
            block = await tier.read(key)
            if block is not None:
                HITS.labels(tier.name).inc()
                await self._write(0, block, until=level)
                return block
        return None

    async def _write(self, level: int, block: Block, until: int | None = None) -> bool:
        """Writes to the first tier in `level` … `until` that has room; victims sink. Whether `block` is stored now."""
        for index in range(level, len(self._tiers) if until is None else until):
            tier = self._tiers[index]
            if not tier.accepts(block):
                continue
            is_stored = True
            for leaving in await tier.write(block):
                is_kept = await self._write(index + 1, leaving)
                if leaving.key == block.key:
                    is_stored = is_kept
            return is_stored
        return False

    def _touch(self, chain: Sequence[BlockKey], promote: bool) -> None:
        for tier in self._tiers:
            tier.touch(chain, promote)

    def _count(self, hits: int, misses: int) -> None:
        self.hit_blocks += hits
        self.missed_blocks += misses
        MISSES.inc(misses)
