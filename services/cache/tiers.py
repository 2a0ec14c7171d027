"""What a tier of the block store promises, and the figures it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import Counter, Gauge

from services.cache.blocks import Block, BlockKey

USED = Gauge("autoglm_cache_used_bytes", "Bytes in use", ["tier"])
CAPACITY = Gauge("autoglm_cache_capacity_bytes", "Bytes at most", ["tier"])
ENTRIES = Gauge("autoglm_cache_entries", "Values stored", ["tier"])
HITS = Counter("autoglm_cache_hits_total", "Blocks delivered, by the tier that had them", ["tier"])
MISSES = Counter("autoglm_cache_misses_total", "Blocks asked for that were not stored")
EVICTED = Counter("autoglm_cache_evicted_total", "Values that left a full tier", ["tier"])
CORRUPT = Counter(
    "autoglm_cache_corrupt_total", "Stored values dropped because they were not what they should be", ["tier"]
)
SCANNED_OUT = Counter("autoglm_cache_scan_dropped_total", "Files not taken over at start, by reason", ["reason"])


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Figures of one tier."""

    name: str
    entries: int
    used_bytes: int
    capacity_bytes: int
    evicted: int


class Tier(Protocol):
    """One place for blocks. Nothing here raises for a tier's own trouble: a cache that fails has a miss."""

    @property
    def name(self) -> str: ...

    def accepts(self, block: Block) -> bool:
        """Whether a block of this size has room here at all."""
        ...

    async def present(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are stored, in order."""
        ...

    async def read(self, key: BlockKey) -> Block | None:
        """The block, verified if it comes from outside this process's memory."""
        ...

    async def write(self, block: Block) -> list[Block]:
        """Stores an accepted block; returns what does not stay here: victims, or the block itself."""
        ...

    def touch(self, chain: Sequence[BlockKey], promote: bool) -> None:
        """Notes a use of consecutive blocks of one prompt."""
        ...

    def occupancy(self) -> Occupancy: ...

    async def close(self) -> None: ...


def publish(tier: Tier) -> None:
    """Shows a tier's occupancy on the metrics page."""
    USED.labels(tier.name).set_function(lambda: tier.occupancy().used_bytes)
    CAPACITY.labels(tier.name).set_function(lambda: tier.occupancy().capacity_bytes)
    ENTRIES.labels(tier.name).set_function(lambda: tier.occupancy().entries)
