"""The second tier: one file per block, bounded in bytes, found again after a restart.

The index lives in memory; files are only touched in threads. A disk that is full or failing turns the tier read-only
for a moment: what should be written falls through to the next tier or is forgotten, and is counted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from services.cache import files
from services.cache.blocks import HEADER_BYTES, BadBlock, Block, BlockKey, pack, unpack
from services.cache.eviction import MAX_ANCESTORS, Eviction
from services.cache.tiers import CORRUPT, EVICTED, Occupancy
from services.chassis import telemetry
from services.chassis.errors import TooBusy
from services.chassis.offload import Offload

log = logging.getLogger("autoglm.cache.disk")


class DiskTier:
    """Made by `open`. `keeps_victims` reads evicted blocks back, for a tier below."""

    name = "disk"

    def __init__(
        self,
        root: Path,
        order: Eviction,
        offload: Offload,
        max_block_bytes: int,
        retry_s: float,
        keeps_victims: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._order, self._offload, self._clock = root, order, offload, clock
        self._max_file_bytes = max_block_bytes + HEADER_BYTES
        self._retry_s, self._keeps_victims = retry_s, keeps_victims
        self._files: dict[BlockKey, files.StoredFile] = {}
        self._writing: set[BlockKey] = set()
        self._doomed: list[Path] = []
        self._off_until = 0.0
        self._tasks: set[asyncio.Task[list[Block]]] = set()
        self._evicted = self._corrupt = 0
        self._temporary = root / "tmp"
        # Unique over restarts, so that a name is never written twice.
        self._generations = (f"{secrets.randbits(32):08x}{number & 0xFFFFFFFF:08x}" for number in itertools.count())

    async def open(self) -> None:
        """Takes over what an earlier process left, and brings it within the bounds."""
        await self._offload(files.clear_temporary, self._root)
        for found in _children_first(await self._offload(files.scan, self._root)):
            key = found.header.key
            if not self._order.fits(found.file.charged_bytes):
                self._doomed.append(found.file.path)
                continue
            self._files[key] = found.file
            for victim in self._order.add(key, found.file.charged_bytes, found.header.parent):
                self._doomed.append(self._files.pop(victim).path)
        await self._offload(_remove_all, self._take_doomed())

    @property
    def corrupt(self) -> int:
        return self._corrupt

    def accepts(self, block: Block) -> bool:
        return self._order.fits(_charge(block))

    async def present(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [key in self._files for key in keys]

    async def read(self, key: BlockKey) -> Block | None:
        file = self._files.get(key)
        if file is None:
            return None
        try:
            return await self._offload(_read, file.path, key, self._max_file_bytes)
        except TooBusy:
            telemetry.fallback("cache_disk_busy", operation="read")
            return None
        except BadBlock as error:
            self._drop(key, file)
            self._corrupt += 1
            CORRUPT.labels(self.name).inc()
            telemetry.fallback("cache_block_corrupt", tier=self.name, reason=error)
        except OSError as error:
            self._drop(key, file)
            telemetry.fallback("cache_disk_read", error=_symbol(error))
        return None

    async def write(self, block: Block) -> list[Block]:
        # Books and files must agree even if the caller goes away in the middle.
        task = asyncio.create_task(self._write(block))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _write(self, block: Block) -> list[Block]:
        key = block.key
        if key in self._files or key in self._writing:
            return []
        if self._clock() < self._off_until:
            telemetry.FALLBACKS.labels(kind="cache_disk_off").inc()
            return [block]
        victims = self._order.add(key, _charge(block), block.parent)
        self._evicted += len(victims)
        EVICTED.labels(self.name).inc(len(victims))
        stays = key not in victims
        leaving = {victim: self._files.pop(victim) for victim in victims if victim in self._files}
        self._doomed += [file.path for file in leaving.values()]
        down = [block] if not stays else []
        path = files.path_of(self._root, key, next(self._generations))
        self._writing.add(key)
        doomed: list[Path] = []
        try:
            if self._keeps_victims:
                down += await self._offload(_read_all, leaving, self._max_file_bytes)
            doomed = self._take_doomed()
            temporary = self._temporary / path.name
            await self._offload(_make_room_and_write, doomed, path, temporary, block if stays else None)
        except TooBusy:
            self._doomed += doomed
            telemetry.fallback("cache_disk_busy", operation="write")
            self._order.remove(key)
            return [*down, block] if stays else down
        except OSError as error:
            self._off_until = self._clock() + self._retry_s
            telemetry.fallback("cache_disk_write", error=_symbol(error))
            self._order.remove(key)
            return [*down, block] if stays else down
        finally:
            self._writing.discard(key)
        if key in self._order:
            self._files[key] = files.StoredFile(path, _charge(block))
        elif stays:  # evicted while it was being written
            self._doomed.append(path)
        return down

    def touch(self, chain: Sequence[BlockKey], promote: bool) -> None:
        self._order.touch(chain, promote)

    def occupancy(self) -> Occupancy:
        return Occupancy(self.name, len(self._files), self._order.used_bytes, self._order.capacity_bytes, self._evicted)

    async def close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._offload(_remove_all, self._take_doomed())

    def _drop(self, key: BlockKey, file: files.StoredFile) -> None:
        if self._files.get(key) is file:
            del self._files[key]
            self._order.remove(key)
        self._doomed.append(file.path)

    def _take_doomed(self) -> list[Path]:
        doomed, self._doomed = self._doomed, []
        return doomed


def _children_first(oldest_first: list[files.Found]) -> list[files.Found]:
    """The same files by age, but each before its parent: time stamps are too coarse to tell."""
    by_key = {found.header.key: found for found in oldest_first}
    youngest_first: dict[BlockKey, files.Found] = {}
    for found in reversed(oldest_first):
        line: list[files.Found] = []
        each: files.Found | None = found
        while each is not None and each.header.key not in youngest_first and len(line) < MAX_ANCESTORS:
            line.append(each)
            each = by_key.get(each.header.parent) if each.header.parent else None
        youngest_first.update((each.header.key, each) for each in reversed(line))
    return list(reversed(youngest_first.values()))


def _charge(block: Block) -> int:
    return files.charge(HEADER_BYTES + len(block.payload))


def _read(path: Path, key: BlockKey, max_bytes: int) -> Block:
    return unpack(files.read(path, max_bytes), key)


def _read_all(wanted: dict[BlockKey, files.StoredFile], max_bytes: int) -> list[Block]:
    blocks = []
    for key, file in wanted.items():
        try:
            blocks.append(_read(file.path, key, max_bytes))
        except (OSError, BadBlock):
            CORRUPT.labels(DiskTier.name).inc()
    return blocks


def _make_room_and_write(doomed: list[Path], path: Path, temporary: Path, block: Block | None) -> None:
    _remove_all(doomed)
    if block is not None:
        files.write(path, temporary, pack(block))


def _remove_all(paths: list[Path]) -> None:
    for path in paths:
        try:
            files.remove(path)
        except OSError as error:
            log.warning("a file cannot be removed", extra={"facts": {"error": _symbol(error)}})


def _symbol(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else type(error).__name__
