"""Buckets that several gateways, also of several clouds, share through Valkey or Redis.

One Lua script does each step whole, by the server's own clock. A server that is slow or dead costs one short timeout,
then a breaker leaves it alone; meanwhile this gateway grants by itself, from where it last saw each bucket. Nothing is
sent twice: a reservation whose return is lost stays taken, and the bucket fills again with time. A bucket that nobody
touches is forgotten once it must be full.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.chassis import telemetry
from services.chassis.breaker import Breaker
from services.gateway.budgets.bucket import Budget
from services.gateway.budgets.ledger import Answer, Local, shared_out

T = TypeVar("T")

PREFIX = "autoglm:tokens:1:"

SCRIPT = """
local size, rate, take, only_look, known, keep_ms = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4],
  tonumber(ARGV[5]), ARGV[6]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local state = redis.call('HMGET', KEYS[1], 'level', 'at')
local level, at = tonumber(state[1]), tonumber(state[2])
if level == nil or at == nil then
  level, at = known, now
end
level = math.min(size, level + math.max(0, now - at) * rate)
local granted = 0
if take <= level then
  granted = 1
  if only_look == '0' then
    level = math.min(size, level - take)
  end
end
if only_look == '0' then
  redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'at', string.format('%.17g', math.max(now, at)))
  redis.call('PEXPIRE', KEYS[1], keep_ms)
end
return {granted, string.format('%.17g', level)}
"""
"""A negative `take` puts back. `known` is where a gateway last saw a bucket that the server does not know: a server
that was restarted empty is no present to anyone."""


class Shared:
    """The shared buckets, and the process's own behind them. `share`: see `shared_out`."""

    def __init__(self, url: str, timeout_s: float, connections: int, local: Local, share: float) -> None:
        self._timeout_s, self._local, self._share = timeout_s, local, share
        self._breaker = Breaker()
        pool: Any = redis.asyncio.BlockingConnectionPool.from_url(  # the client's types change from release to release
            url,
            max_connections=connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        self._client: Any = redis.asyncio.Redis(connection_pool=pool)
        self._script: Any = self._client.register_script(SCRIPT)

    async def take(self, tenant: str, budget: Budget, tokens: int, *, only_look: bool = False) -> Answer:
        answer = await self._ask(tenant, budget, tokens, only_look)
        if answer is not None:
            return answer
        return await self._local.take(tenant, shared_out(budget, self._share), tokens, only_look=only_look)

    async def put_back(self, tenant: str, budget: Budget, tokens: int, *, is_shared: bool) -> bool:
        if not is_shared:
            return await self._local.put_back(tenant, shared_out(budget, self._share), tokens)
        return await self._ask(tenant, budget, -tokens, False) is not None

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def _ask(self, tenant: str, budget: Budget, tokens: int, only_look: bool) -> Answer | None:
        keep_s = math.ceil(budget.burst_tokens / budget.per_second) + 1
        arguments = [
            budget.burst_tokens,
            repr(budget.per_second),
            tokens,
            int(only_look),
            repr(self._local.left(tenant, budget)),
            keep_s * 1000,
        ]
        said = await self._try(lambda: self._script(keys=[PREFIX + tenant], args=arguments))
        if said is None:
            return None
        left = float(said[1])
        self._local.copy(tenant, budget, left)
        return Answer(bool(int(said[0])), left, is_shared=True)

    async def _try(self, call: Callable[[], Awaitable[T]]) -> T | None:
        if not self._breaker.allows():
            telemetry.FALLBACKS.labels(kind="budget_store_off").inc()
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await call()
        except (RedisError, OSError, TimeoutError) as error:
            self._breaker.failed()
            telemetry.fallback("budget_store", error=type(error).__name__)
            return None
        self._breaker.succeeded()
        return answer
