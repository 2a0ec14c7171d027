"""Where the leading key-value blocks of a prompt come from: the own pages, then the cache, in bounded time.

Whatever goes wrong costs a recomputation, is counted as a fallback, and never changes a token: a block is used only
when its checksum over scope, name and content holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry import trace
from prometheus_client import Counter

from engine.prefix import block_checksum, block_hashes, scope_key
from engine.runtime.pages import PagePool
from services.chassis import telemetry
from services.chassis.errors import ServiceError
from services.chassis.tracing import untraced

log = logging.getLogger("autoglm.prefixes")
tracer = trace.get_tracer("autoglm.sparse_inference")

BLOCKS = Counter("autoglm_prefix_blocks_total", "Prompt blocks by where their keys and values came from", ["source"])
PUBLISHED = Counter("autoglm_published_blocks_total", "Blocks handed to the cache service, by outcome", ["outcome"])

PUBLISH_BATCH = 64
PUBLISH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Scope:
    """What a block belongs to."""

    variant_digest: str
    tenant: str
    block_tokens: int

    @property
    def key(self) -> bytes:
        return scope_key(self.variant_digest, self.tenant, self.block_tokens)


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block with its name and checksum, as the cache service keeps it."""

    name: bytes
    payload: bytes
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """Names of a prompt's leading blocks, and the payloads by name of those that came from the cache service."""

    names: Sequence[bytes] = ()
    fetched: Mapping[bytes, bytes] = field(default_factory=dict)


class RemoteBlocks(Protocol):
    """The cache service, as this module needs it. Methods raise ServiceError."""

    async def match(self, scope: Scope, names: Sequence[bytes]) -> int: ...

    def get(self, scope: Scope, names: Sequence[bytes]) -> AsyncIterator[StoredBlock]: ...

    async def put(self, scope: Scope, blocks: Sequence[StoredBlock]) -> int: ...


class Prefixes:
    """Finds blocks before a prefill and publishes them after."""

    def __init__(
        self, pages: PagePool, remote: RemoteBlocks, budget_s: float, queue_blocks: int, interval_s: float = 0.0
    ) -> None:
        self._pages, self._remote, self._budget_s, self._interval_s = pages, remote, budget_s, interval_s
        self._hurry = asyncio.Event()
        self._is_flushing = False
        self._queue: asyncio.Queue[tuple[Scope, bytes, bytes]] = asyncio.Queue(queue_blocks)

    async def find(self, scope: Scope, token_ids: Sequence[int]) -> Found:
        """Leading blocks, at most all but the last token: that one must be computed to have logits.

        Those in the worker's own pages are shared when the request begins and need no payload; should one be given
        away until then, it is computed again.
        """
        usable = (len(token_ids) - 1) // scope.block_tokens
        names = block_hashes(scope.key, token_ids[: usable * scope.block_tokens], scope.block_tokens)
        if not names:
            return Found()
        own = self._pages.held(names)
        BLOCKS.labels("own").inc(own)
        missing = names[own:]
        fetched: list[bytes] = []
        if missing and self._budget_s:
            fetched = await self._fetch(scope, missing)
            BLOCKS.labels("cache").inc(len(fetched))
        BLOCKS.labels("computed").inc(len(missing) - len(fetched))
        return Found(names, dict(zip(missing, fetched, strict=False)))

    async def _fetch(self, scope: Scope, names: Sequence[bytes]) -> list[bytes]:
        fetched: list[bytes] = []
        with tracer.start_as_current_span("fetch prefix") as span:
            span.set_attribute("autoglm.blocks.wanted", len(names))
            try:
                async with asyncio.timeout(self._budget_s):
                    matched = await self._remote.match(scope, names)
                    if matched:
                        await self._collect(scope, names[:matched], fetched)
            except TimeoutError:
                telemetry.fallback("cache_too_slow", budget_s=self._budget_s)
            except ServiceError as error:
                telemetry.fallback("cache_unavailable", reason=type(error).__name__)
            span.set_attribute("autoglm.blocks.fetched", len(fetched))
        return fetched

    async def _collect(self, scope: Scope, names: Sequence[bytes], into: list[bytes]) -> None:
        async with contextlib.aclosing(self._remote.get(scope, names)) as stream:  # type: ignore[type-var]
            async for block in stream:
                wanted = names[len(into)]
                if block.name != wanted or block.checksum != block_checksum(scope.key, wanted, block.payload):
                    telemetry.fallback("cache_block_corrupt", position=len(into))
                    return
                into.append(block.payload)
                if len(into) == len(names):
                    return

    @property
    def has_room(self) -> bool:
        """Whether a block would be taken now. May be asked from any thread, to spare the copy of one that would not."""
        return not self._queue.full()

    def keep(self, scope: Scope, name: bytes, payload: bytes, at_once: bool = True) -> None:
        """Queues a computed block for the cache service; a full queue drops it, counted.

        `at_once`: others may ask for it soon, as for a prompt's; else it may wait for company.
        """
        try:
            self._queue.put_nowait((scope, name, payload))
            if at_once or self._is_enough:
                self._hurry.set()
        except asyncio.QueueFull:
            self.drop()

    def drop(self) -> None:
        """Counts a block that is not published."""
        PUBLISHED.labels("dropped").inc()

    async def publish(self) -> None:
        """Runs for ever: moves queued blocks to the cache service in batches of one scope.

        A call costs more than a block: after one it waits for `interval_s`, a block that is wanted at once, a full
        batch or a flush.
        """
        while True:
            waiting = [await self._queue.get()]
            self._hurry.clear()
            while len(waiting) < PUBLISH_BATCH and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            try:
                for scope, group in itertools.groupby(waiting, lambda each: each[0]):
                    await self._put(scope, [(name, payload) for _, name, payload in group])
            finally:
                for _ in waiting:
                    self._queue.task_done()
            if not (self._is_enough or self._is_flushing):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._hurry.wait()

    @property
    def _is_enough(self) -> bool:
        return self._queue.qsize() >= PUBLISH_BATCH

    async def flush(self, timeout_s: float) -> None:
        """While `publish` still runs: waits until the queue is empty; what remains then is dropped, counted."""
        self._is_flushing = True
        self._hurry.set()
        try:
            await asyncio.wait_for(self._queue.join(), timeout_s)
        except TimeoutError:
            PUBLISHED.labels("dropped").inc(self._queue.qsize())
            telemetry.fallback("publish_unfinished", blocks=self._queue.qsize(), timeout_s=timeout_s)

    async def _put(self, scope: Scope, blocks: Sequence[tuple[bytes, bytes]]) -> None:
        batch = [StoredBlock(name, payload, block_checksum(scope.key, name, payload)) for name, payload in blocks]
        try:
            # A block every few tokens: as traces of their own these calls would outnumber the requests'.
            with untraced():
                async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                    stored = await self._remote.put(scope, batch)
            PUBLISHED.labels("stored").inc(stored)
            PUBLISHED.labels("present").inc(len(batch) - stored)
        except Exception as error:
            if not isinstance(error, ServiceError | TimeoutError):  # a bug, but publishing must survive it
                log.exception("blocks could not be published")
            PUBLISHED.labels("failed").inc(len(batch))
            telemetry.fallback("cache_put_failed", reason=type(error).__name__, blocks=len(batch))
