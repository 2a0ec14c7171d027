"""Model files by content: stored once, streamed in pieces, proved by SHA-256 before they are visible.

A file is written beside, hashed as it comes, synced and renamed; one with another digest is removed. The first read
after a start proves the file again. Least recently used artifacts leave when room is needed; whoever is reading one
keeps it open and finishes. Unlike blocks, artifacts are fsynced: they are large and costly to fetch again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from services.cache.files import charge, remove
from services.cache.tiers import CORRUPT, EVICTED, SCANNED_OUT, Occupancy
from services.chassis import telemetry
from services.chassis.errors import CorruptData, InvalidRequest, NotFound, TooBusy
from services.chassis.offload import Offload

T = TypeVar("T")

PIECE_BYTES = 1 << 20
RETRY_AFTER_S = 1.0
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an artifact."""

    offset: int
    content: bytes
    total_bytes: int


@dataclass(slots=True)
class _Entry:
    size: int
    is_proved: bool


class ArtifactStore:
    """Artifacts under one directory, within `capacity_bytes`. `root` None stores nothing."""

    name = "artifacts"

    def __init__(self, root: Path | None, capacity_bytes: int, max_bytes: int, offload: Offload) -> None:
        self._root, self._offload = root, offload
        self._capacity, self._max_bytes = capacity_bytes, max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._arriving_bytes = 0
        self._evicted = 0

    @property
    def largest_bytes(self) -> int:
        """The largest artifact that has room here."""
        return min(self._max_bytes, self._capacity)

    async def open(self) -> None:
        """Takes over what an earlier process left; the directory for files being written must be empty."""
        if self._root is None:
            return
        for name, size in await self._offload(_scan, self._root / "artifacts"):
            self._entries[name] = _Entry(size, is_proved=False)
        await self._make_room(0)

    def occupancy(self) -> Occupancy:
        return Occupancy(self.name, len(self._entries), self._used_bytes, self._capacity, self._evicted)

    async def read(self, digest: str, offset: int) -> AsyncIterator[Piece]:
        """Pieces from `offset` on; one empty piece at the very end. Raises NotFound, InvalidRequest, CorruptData."""
        name = parse_digest(digest)
        entry = self._entries.get(name)
        if entry is None or self._root is None:
            raise NotFound(f"no artifact {digest} is stored", digest=digest)
        if offset > entry.size:
            raise InvalidRequest(f"offset: {offset} is past the artifact's {entry.size} bytes", field="offset")
        self._entries.move_to_end(name)
        path = self._path(name)
        try:
            descriptor = await _whole(self._offload(_open_and_note, path), undo=os.close)
        except OSError:
            self._entries.pop(name, None)
            raise NotFound(f"no artifact {digest} is stored", digest=digest) from None
        try:
            if not entry.is_proved:
                if await self._offload(_sha256, descriptor) != name:
                    await self._drop_corrupt(name, digest)
                entry.is_proved = True
            position = offset
            while True:
                content = await self._offload(os.pread, descriptor, min(PIECE_BYTES, entry.size - position), position)
                if not content and position < entry.size:
                    await self._drop_corrupt(name, digest)
                yield Piece(position, content, entry.size)
                position += len(content)
                if position >= entry.size:
                    return
        finally:
            os.close(descriptor)

    def size_of(self, digest: str) -> int | None:
        """Bytes of a stored artifact."""
        entry = self._entries.get(parse_digest(digest))
        return None if entry is None else entry.size

    def begin(self, digest: str) -> Upload:
        """Starts to take in an artifact: `async with store.begin(digest) as upload`."""
        if self._root is None:
            raise InvalidRequest("this cache has no directory and stores no artifacts")
        return Upload(
            self, parse_digest(digest), self._root / "tmp" / f"artifact-{secrets.token_hex(8)}", self._offload
        )

    async def reserve(self, size: int, total: int) -> None:
        """Room for `size` more bytes of an arriving artifact that then has `total`. Raises InvalidRequest, TooBusy."""
        self._arriving_bytes += size  # whatever follows: the upload gives back all that it asked for
        limit = self.largest_bytes
        if total > limit:
            raise InvalidRequest(f"the artifact is larger than {limit} bytes", limit=limit)
        await self._make_room(0)
        if self._used_bytes > self._capacity:
            raise TooBusy("other artifacts that are arriving have taken the room", RETRY_AFTER_S, limit=self._capacity)

    def release(self, size: int) -> None:
        """Gives back what was reserved."""
        self._arriving_bytes -= size

    async def admit(self, name: str, temporary: Path, size: int) -> None:
        """Makes a proved file visible."""
        await self._offload(_publish, temporary, self._path(name))
        self._entries[name] = _Entry(size, is_proved=True)
        self._entries.move_to_end(name)

    @property
    def _used_bytes(self) -> int:
        return sum(charge(entry.size) for entry in self._entries.values()) + self._arriving_bytes

    def _path(self, name: str) -> Path:
        assert self._root is not None
        return self._root / "artifacts" / name[:2] / name

    async def _make_room(self, size: int) -> None:
        while self._entries and self._used_bytes + size > self._capacity:
            name, _ = self._entries.popitem(last=False)
            self._evicted += 1
            EVICTED.labels(self.name).inc()
            await self._offload(remove, self._path(name))

    async def _drop_corrupt(self, name: str, digest: str) -> None:
        self._entries.pop(name, None)
        CORRUPT.labels(self.name).inc()
        telemetry.fallback("cache_artifact_corrupt", digest=digest)
        await self._offload(remove, self._path(name))
        raise CorruptData(f"the stored artifact {digest} was damaged and has been dropped", digest=digest)


class Upload:
    """One arriving artifact. Leaves nothing behind unless `finish` succeeded."""

    def __init__(self, store: ArtifactStore, name: str, temporary: Path, offload: Offload) -> None:
        self._store, self._name, self._temporary, self._offload = store, name, temporary, offload
        self._hasher = hashlib.sha256()
        self._descriptor = -1
        self._reserved = self.total_bytes = 0

    async def __aenter__(self) -> Upload:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = await _whole(self._offload(os.open, self._temporary, flags, 0o600), undo=self._discard)
        return self

    def shared_descriptor(self) -> int:
        """What has been written, for reading while more arrives. The caller closes it."""
        return os.dup(self._descriptor)

    async def write(self, content: bytes) -> None:
        """Takes the next bytes."""
        self._reserved += len(content)
        await self._store.reserve(len(content), self.total_bytes + len(content))
        try:
            await _whole(self._offload(_append, self._descriptor, self._hasher, content))
        except OSError as error:
            telemetry.fallback("cache_artifact_write", error=os.strerror(error.errno or 0))
            raise TooBusy("the disk takes no more at the moment", RETRY_AFTER_S) from None
        self.total_bytes += len(content)

    async def finish(self) -> None:
        """Proves and keeps the artifact. Raises InvalidRequest when it is not what its digest says."""
        if self._hasher.hexdigest() != self._name:
            raise InvalidRequest(f"the content is not sha256:{self._name}", digest=f"sha256:{self._name}")
        try:
            await self._offload(os.fsync, self._descriptor)
            await _whole(self._store.admit(self._name, self._temporary, self.total_bytes))
        except OSError as error:
            telemetry.fallback("cache_artifact_write", error=os.strerror(error.errno or 0))
            raise TooBusy("the disk takes no more at the moment", RETRY_AFTER_S) from None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.release(self._reserved)
        self._discard(self._descriptor)

    def _discard(self, descriptor: int) -> None:
        os.close(descriptor)
        remove(self._temporary)  # gone already when it was admitted; a moment's work otherwise


async def _whole(work: Coroutine[Any, Any, T], undo: Callable[[T], object] = lambda _: None) -> T:
    """The result of `work`, to whose end even a cancelled caller waits: a descriptor that is closed under a thread
    would soon be another file's. What a cancelled caller cannot take is undone.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            undo(task.result())
        raise


def parse_digest(digest: str) -> str:
    """The hexadecimal part. Raises InvalidRequest."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise InvalidRequest("digest: must be sha256: and 64 lower-case hexadecimal digits", field="digest")
    return match[1]


def _scan(directory: Path) -> list[tuple[str, int]]:
    found = []
    for path in directory.glob("*/*") if directory.is_dir() else ():
        if not _NAME.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            SCANNED_OUT.labels("foreign").inc()
            continue
        status = path.stat()
        found.append((status.st_mtime_ns, path.name, status.st_size))
    return [(name, size) for _, name, size in sorted(found)]


def _open_and_note(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    os.utime(descriptor)  # the order of use survives a restart
    return descriptor


def _sha256(descriptor: int) -> str:
    hasher, position = hashlib.sha256(), 0
    while content := os.pread(descriptor, PIECE_BYTES, position):
        hasher.update(content)
        position += len(content)
    return hasher.hexdigest()


def _append(descriptor: int, hasher: hashlib._Hash, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    hasher.update(content)


def _publish(temporary: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
