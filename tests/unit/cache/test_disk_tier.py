"""The disk tier: restarts, damage of every kind, a full disk, callers that leave in the middle."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.cache import files
from services.cache.blocks import HEADER_BYTES, BlockKey, pack
from services.cache.disk_tier import DiskTier
from services.cache.eviction import Eviction
from services.chassis.offload import Offload
from tests.fakes import kv_blocks

CAPACITY = 1_000_000
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


@pytest.fixture
async def offload() -> AsyncIterator[Offload]:
    pool = Offload("test", 2, 64)
    yield pool
    pool.close()


async def opened(root: Path, offload: Offload, capacity: int = CAPACITY, retry_s: float = 0.0) -> DiskTier:
    tier = DiskTier(root, Eviction(capacity, capacity), offload, 100_000, retry_s, keeps_victims=False)
    await tier.open()
    return tier


async def filled(root: Path, offload: Offload, count: int = 5, seed: int = 1) -> tuple[DiskTier, list[BlockKey]]:
    tier, keys, parent = await opened(root, offload), kv_blocks.chain(seed, count), None
    for key in keys:
        assert await tier.write(kv_blocks.block(key, 2000, parent)) == []
        parent = key
    return tier, keys


def stored(root: Path) -> list[Path]:
    return sorted((root / "blocks").rglob("*.kv"))


async def test_a_restart_finds_everything_again(tmp_path: Path, offload: Offload) -> None:
    """Payloads, checksums, parents and sums are as before; the same bytes are charged."""
    before, keys = await filled(tmp_path, offload)
    after = await opened(tmp_path, offload)
    assert await after.present(keys) == [True] * 5
    for index, key in enumerate(keys):
        assert await after.read(key) == kv_blocks.block(key, 2000, keys[index - 1] if index else None)
    assert after.occupancy().used_bytes == before.occupancy().used_bytes


@pytest.mark.parametrize("region", REGIONS)
async def test_a_flipped_byte_in_any_region_is_a_counted_miss(tmp_path: Path, offload: Offload, region: str) -> None:
    """Found while running: the block is dropped with its file, counted, and can be stored again."""
    tier, keys = await filled(tmp_path, offload)
    chooser = random.Random(region)
    offset = REGIONS[region]
    end = min((start for start in REGIONS.values() if start > offset), default=HEADER_BYTES + 2000)
    damaged = next(path for path in stored(tmp_path) if keys[2].block_hash.hex() in path.name)
    data = bytearray(damaged.read_bytes())
    data[chooser.randrange(offset, end)] ^= 1 << chooser.randrange(8)
    damaged.write_bytes(data)
    assert await tier.read(keys[2]) is None
    assert tier.corrupt == 1
    assert await tier.present(keys) == [True, True, False, True, True]
    assert await tier.write(kv_blocks.block(keys[2], 2000)) == []
    assert await tier.read(keys[2]) is not None
    assert not damaged.exists()


@pytest.mark.parametrize("region", [region for region in REGIONS if region != "payload"])
async def test_a_damaged_header_is_dropped_at_start(tmp_path: Path, offload: Offload, region: str) -> None:
    """The scan reads headers only, and trusts none of them."""
    _, keys = await filled(tmp_path, offload)
    for path in stored(tmp_path):
        data = bytearray(path.read_bytes())
        data[REGIONS[region]] ^= 0x40
        path.write_bytes(data)
    tier = await opened(tmp_path, offload)
    assert not any(await tier.present(keys))
    assert stored(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1999])
async def test_truncated_files_are_dropped(tmp_path: Path, offload: Offload, size: int) -> None:
    """Cut anywhere, at start or while running: a miss."""
    tier, keys = await filled(tmp_path, offload)
    for path in stored(tmp_path):
        os.truncate(path, size)
    assert await tier.read(keys[0]) is None
    again = await opened(tmp_path, offload)
    assert not any(await again.present(keys))


async def test_foreign_and_unfinished_files(tmp_path: Path, offload: Offload) -> None:
    """Someone else's files are left alone and not served; our unfinished ones go; a renamed block is refused."""
    _, keys = await filled(tmp_path, offload)
    foreign = tmp_path / "blocks" / "letter.txt"
    foreign.write_text("dear")
    (tmp_path / "tmp" / "half.kv").write_bytes(b"x")
    first = next(path for path in stored(tmp_path) if keys[0].block_hash.hex() in path.name)
    forged = kv_blocks.chain(9, 1)[0]
    target = files.path_of(tmp_path, forged, "0" * 16)
    target.parent.mkdir(parents=True, exist_ok=True)
    first.rename(target)
    tier = await opened(tmp_path, offload)
    assert foreign.read_text() == "dear"
    assert list((tmp_path / "tmp").iterdir()) == []
    assert await tier.present([keys[0], keys[1], forged]) == [False, True, False]


async def test_a_block_stored_under_anothers_name_is_not_served(tmp_path: Path, offload: Offload) -> None:
    """A whole, valid file in the place of another block is damage, not a hit."""
    tier, keys = await filled(tmp_path, offload)
    path = next(path for path in stored(tmp_path) if keys[1].block_hash.hex() in path.name)
    path.write_bytes(pack(kv_blocks.block(kv_blocks.chain(5, 1)[0], 2000)))
    assert await tier.read(keys[1]) is None
    assert tier.corrupt == 1


async def test_a_smaller_bound_is_kept_after_a_restart(tmp_path: Path, offload: Offload) -> None:
    """With half the room, the ends of prompts go at start, and files with them."""
    _, keys = await filled(tmp_path, offload, count=10)
    tier = await opened(tmp_path, offload, capacity=5 * 4096)
    assert await tier.present(keys) == [True] * 5 + [False] * 5
    assert len(stored(tmp_path)) == 5
    assert sum(files.charge(path.stat().st_size) for path in stored(tmp_path)) <= 5 * 4096


async def test_files_never_exceed_the_bound(tmp_path: Path, offload: Offload) -> None:
    """Room is made before a file is written, not after."""
    tier = await opened(tmp_path, offload, capacity=8 * 4096)
    for number in range(30):
        await tier.write(kv_blocks.block(kv_blocks.chain(number, 1)[0], 2000))
        assert sum(files.charge(path.stat().st_size) for path in stored(tmp_path)) <= 8 * 4096
    assert tier.occupancy().evicted == 22


async def test_a_full_disk_turns_writing_off_and_on_again(
    tmp_path: Path, offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks fall through while it is full, what is stored is still served, nothing half-written is visible."""
    tier, keys = await filled(tmp_path, offload)
    now = 100.0
    tier._clock, tier._retry_s = lambda: now, 1.0
    full = True
    write = files.write

    def writing(path: Path, temporary: Path, data: bytes) -> None:
        if full:
            temporary.write_bytes(data[: len(data) // 2])
            temporary.unlink()
            raise OSError(errno.ENOSPC, "full")
        write(path, temporary, data)

    monkeypatch.setattr(files, "write", writing)
    block = kv_blocks.block(kv_blocks.chain(7, 1)[0], 2000)
    assert await tier.write(block) == [block]
    assert await tier.read(keys[0]) is not None
    full = False
    assert await tier.write(block) == [block], "still off within the pause"
    now += 1.1
    assert await tier.write(block) == []
    assert await tier.read(block.key) == block
    assert tier.occupancy().used_bytes == 6 * 4096


async def test_a_caller_that_leaves_does_not_bend_the_books(tmp_path: Path, offload: Offload) -> None:
    """Cancelled in the middle of a write, the tier still knows exactly what is on disk."""
    tier = await opened(tmp_path, offload)
    keys = [kv_blocks.chain(number, 1)[0] for number in range(20)]
    for key in keys:
        task = asyncio.create_task(tier.write(kv_blocks.block(key, 2000)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await tier.close()
    present = await tier.present(keys)
    assert sum(present) == len(stored(tmp_path)) == tier.occupancy().entries
    assert tier.occupancy().used_bytes == sum(present) * 4096


async def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    """A second cache on the same directory is refused by name until the first has gone."""
    held = files.lock(tmp_path)
    with pytest.raises(files.DirectoryInUse, match="another cache"):
        files.lock(tmp_path)
    os.close(held)
    os.close(files.lock(tmp_path))
