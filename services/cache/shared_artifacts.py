"""Artifacts as callers see them: this cache's own, and behind them the object store that it shares with others.

What is missing here is downloaded once, however many ask, and handed on while it arrives; its last piece is held back
until the whole has been proved, so that a caller who got all bytes got the right ones. What is put here is written
through: success means that both have it. With the object store in trouble everything that is here is served as always.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from prometheus_client import Counter

from services.cache.artifacts import PIECE_BYTES, RETRY_AFTER_S, ArtifactStore, Piece, Upload, parse_digest
from services.cache.object_store import ObjectStore
from services.chassis import telemetry
from services.chassis.errors import CorruptData, InvalidRequest, NotFound, ServiceError, TooBusy, Unavailable
from services.chassis.offload import Offload

WAITING_PER_DOWNLOAD = 16
"""Beyond those under way; more are refused."""
DAMAGED_KNOWN = 1024
"""Damaged objects that are remembered, so that the next upload replaces them."""

MOVED = Counter("autoglm_cache_object_store_total", "Artifacts moved to or from the object store", ["way", "outcome"])
MOVED_BYTES = Counter("autoglm_cache_object_store_bytes_total", "Bytes moved to or from the object store", ["way"])


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of an artifact that was put."""

    total_bytes: int
    is_old: bool


@dataclass(slots=True)
class _Download:
    """An artifact on its way from the object store. The file stays open until the last of its `users` has left."""

    users: int = 1
    size: int = -1
    written: int = 0
    descriptor: int = -1
    is_proved: bool = False
    failure: BaseException | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wakes everybody who waits."""
        self.changed.set()
        self.changed = asyncio.Event()

    def leave(self) -> None:
        """One user less."""
        self.users -= 1
        if not self.users and self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def readable(self) -> int:
        """Bytes that may be handed on."""
        return self.size if self.is_proved else min(self.written, self.size - 1)


class SharedArtifacts:
    """`remote` None: only what is here. At most `downloads` arrive at a time; further ones wait."""

    def __init__(self, local: ArtifactStore, remote: ObjectStore | None, offload: Offload, downloads: int) -> None:
        self.local, self._remote, self._offload = local, remote, offload
        self._places, self._most = asyncio.Semaphore(downloads), downloads * WAITING_PER_DOWNLOAD
        self._arriving: dict[str, _Download] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._damaged: OrderedDict[str, None] = OrderedDict()

    async def read(self, digest: str, offset: int) -> AsyncIterator[Piece]:
        """Pieces from `offset` on; one empty piece at the very end.

        Raises NotFound, InvalidRequest, CorruptData, TooBusy (no room), Unavailable (the object store fails).
        """
        if self._remote is None:
            async for piece in self.local.read(digest, offset):
                yield piece
            return
        is_begun = False
        if self.local.size_of(digest) is not None:
            try:
                async for piece in self.local.read(digest, offset):
                    is_begun = True
                    yield piece
                return
            except (CorruptData, NotFound):
                if is_begun:
                    raise  # the caller resumes, and then the object store is asked
        async for piece in self._follow(self._join(self._remote, digest), offset):
            yield piece

    async def put(self, digest: str, contents: AsyncIterator[bytes]) -> Stored:
        """Keeps the artifact here, then in the object store. Content of a known digest is not read to its end."""
        size = self.local.size_of(digest)
        is_old = size is not None
        if size is None:
            async with self.local.begin(digest) as upload:
                async for content in contents:
                    await upload.write(content)
                await upload.finish()
            size = upload.total_bytes
        if self._remote is not None:
            await self._share(self._remote, digest, size)
        return Stored(size, is_old)

    async def close(self) -> None:
        """Gives up what is still arriving."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _join(self, remote: ObjectStore, digest: str) -> _Download:
        name = parse_digest(digest)
        download = self._arriving.get(name)
        if download is None:
            if len(self._arriving) >= self._most:
                raise TooBusy(f"{self._most} artifacts are arriving or waiting to", RETRY_AFTER_S, limit=self._most)
            download = self._arriving[name] = _Download()
            task = asyncio.create_task(self._fetch(remote, digest, name, download))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        download.users += 1
        return download

    async def _fetch(self, remote: ObjectStore, digest: str, name: str, download: _Download) -> None:
        """Brings one artifact here. Its result is what the download says; nothing is raised."""
        outcome = "failed"
        try:
            async with self._places:
                size = await remote.size(name)
                if size is None:
                    outcome = "absent"
                    raise NotFound(f"no artifact {digest} is stored, here or in the object store", digest=digest)
                if size > self.local.largest_bytes:
                    raise InvalidRequest(
                        f"the artifact {digest} has {size} bytes and this cache takes {self.local.largest_bytes}: "
                        f"AUTOGLM_CACHE_MAX_ARTIFACT_BYTES, AUTOGLM_CACHE_ARTIFACT_BYTES",
                        size=size,
                    )
                async with self.local.begin(digest) as upload:
                    await self._receive(remote, name, size, upload, download)
                outcome = "done"
        except asyncio.CancelledError:
            download.failure = Unavailable("this cache is stopping")
            raise
        except InvalidRequest as error:
            download.failure = error
            if "digest" in error.metadata:  # the content is another's
                outcome = "damaged"
                self._damaged[name] = None
                while len(self._damaged) > DAMAGED_KNOWN:
                    self._damaged.popitem(last=False)
                telemetry.fallback("cache_object_store_corrupt", digest=digest)
                download.failure = CorruptData(
                    f"the object store's {digest} is damaged; publish it again to replace it", digest=digest
                )
        except Exception as error:  # a bug, too, must reach who waits
            download.failure = error
        finally:
            MOVED.labels("from", outcome).inc()
            download.is_proved = download.failure is None
            self._arriving.pop(name, None)
            download.tell()
            download.leave()

    async def _receive(self, remote: ObjectStore, name: str, size: int, upload: Upload, download: _Download) -> None:
        download.descriptor, download.size = upload.shared_descriptor(), size
        async for content in remote.read(name, size):
            await upload.write(content)
            MOVED_BYTES.labels("from").inc(len(content))
            download.written = upload.total_bytes
            download.tell()
        await upload.finish()

    async def _follow(self, download: _Download, offset: int) -> AsyncIterator[Piece]:
        position = offset
        try:
            while True:
                if isinstance(failure := download.failure, ServiceError):
                    raise failure from None
                if failure is not None:
                    raise failure
                if 0 <= download.size < offset:
                    raise InvalidRequest(
                        f"offset: {offset} is past the artifact's {download.size} bytes", field="offset"
                    )
                if download.size < 0 or (position >= download.readable and not download.is_proved):
                    await download.changed.wait()
                    continue
                length = min(PIECE_BYTES, download.readable - position)
                content = await self._offload(os.pread, download.descriptor, length, position)
                if len(content) < length:
                    raise CorruptData("the file of an arriving artifact was cut short on this cache's disk")
                yield Piece(position, content, download.size)
                position += len(content)
                if position >= download.size:
                    return
        finally:
            download.leave()

    async def _share(self, remote: ObjectStore, digest: str, size: int) -> None:
        name = parse_digest(digest)
        try:
            if name not in self._damaged and await remote.size(name) == size:
                return
            await remote.write(name, size, self._contents(digest))
        except Unavailable as error:
            MOVED.labels("to", "failed").inc()
            raise Unavailable(
                f"{digest} is kept in this cache only: {error.message}; put it again", digest=digest, kept=True
            ) from None
        self._damaged.pop(name, None)
        MOVED.labels("to", "done").inc()
        MOVED_BYTES.labels("to").inc(size)

    async def _contents(self, digest: str) -> AsyncIterator[bytes]:
        async for piece in self.local.read(digest, 0):
            yield piece.content
