"""The optional last tier: a Valkey or Redis server, which several caches may share.

Blocks travel in their byte form and are proved on the way back like a file from disk. The server bounds its own memory
(set `maxmemory` with an `allkeys-*` policy); blocks also expire. A slow or dead server costs one short timeout, then a
breaker keeps it out of the way and tries again with growing pauses.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.cache.blocks import HEADER_BYTES, BadBlock, Block, BlockKey, pack, unpack
from services.cache.tiers import CORRUPT, Occupancy
from services.chassis import telemetry
from services.chassis.breaker import Breaker

T = TypeVar("T")

PREFIX = b"autoglm:kv:1:"


class RedisTier:
    """Stores what the local tiers let go."""

    name = "redis"

    def __init__(self, url: str, timeout_s: float, ttl_s: int, connections: int, max_block_bytes: int) -> None:
        self._ttl_ms = ttl_s * 1000
        self._max_bytes = max_block_bytes + HEADER_BYTES
        self._breaker = Breaker()
        self._corrupt = 0
        self._client: Any = redis.asyncio.Redis.from_url(  # the client's own types change from release to release
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            max_connections=connections,
            retry=Retry(NoBackoff(), 0),
            decode_responses=False,
        )

    @property
    def corrupt(self) -> int:
        return self._corrupt

    def accepts(self, block: Block) -> bool:
        return len(block.payload) + HEADER_BYTES <= self._max_bytes

    async def present(self, keys: Sequence[BlockKey]) -> list[bool]:
        async def ask() -> list[bool]:
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.exists(_name(key))
            return [bool(answer) for answer in await pipeline.execute()]

        return await self._try("exists", ask) or [False] * len(keys)

    async def read(self, key: BlockKey) -> Block | None:
        # GETRANGE bounds what a stranger's value can cost; a missing key reads as empty.
        data = await self._try("read", lambda: self._client.getrange(_name(key), 0, self._max_bytes))
        if not data:
            return None
        try:
            return unpack(bytes(data), key)
        except BadBlock as error:
            self._corrupt += 1
            CORRUPT.labels(self.name).inc()
            telemetry.fallback("cache_block_corrupt", tier=self.name, reason=error)
            await self._try("delete", lambda: self._client.delete(_name(key)))
            return None

    async def write(self, block: Block) -> list[Block]:
        done = await self._try("write", lambda: self._client.set(_name(block.key), pack(block), px=self._ttl_ms))
        return [] if done else [block]

    def touch(self, chain: Sequence[BlockKey], promote: bool) -> None:
        """The server keeps its own order."""

    def occupancy(self) -> Occupancy:
        """The server's figures are its own; none are asked for on the way of a request."""
        return Occupancy(self.name, 0, 0, 0, 0)

    async def close(self) -> None:
        await self._client.aclose()

    async def _try(self, operation: str, call: Callable[[], Awaitable[T]]) -> T | None:
        if not self._breaker.allows():
            telemetry.FALLBACKS.labels(kind="cache_redis_off").inc()
            return None
        try:
            answer = await call()
        except (RedisError, OSError, TimeoutError) as error:
            self._breaker.failed()
            telemetry.fallback("cache_redis", operation=operation, error=type(error).__name__)
            return None
        self._breaker.succeeded()
        return answer


def _name(key: BlockKey) -> bytes:
    return PREFIX + key.scope + key.block_hash
