"""Buckets that several gateways, also of several clouds, share through Valkey or Redis.

One Lua script does each step whole, by the server's own clock. A server that is slow or dead costs one short timeout,
then a breaker leaves it alone; meanwhile this gateway grants by itself, from where it last saw each bucket.

What a lost answer means is never guessed. With each call a gateway tells how much it has drawn for the tenant in all;
the server remembers what it was told last and charges, or returns, the difference. So a call that was given up but
carried out, a return that never arrived and whatever was granted while the server was away are all put right by the
next call. For that the calls about one tenant go one after the other; what is asked meanwhile goes together in the
next. A bucket nobody touches is forgotten once it must be full.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.chassis import telemetry
from services.chassis.breaker import Breaker
from services.gateway.budgets.bucket import Budget
from services.gateway.budgets.ledger import Answer, Local, shared_out
from services.gateway.budgets.store_url import checked

PREFIX = "autoglm:tokens:1:"

MOST_AT_ONCE = 128
"""Questions about one tenant in one call."""

SCRIPT = """
local size, rate, known, keep_ms = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local account, number, drawn, confirmed = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local state = redis.call('HMGET', KEYS[1], 'level', 'at', 'n:' .. account, 'd:' .. account)
local level, at, last, told = tonumber(state[1]), tonumber(state[2]), tonumber(state[3]), tonumber(state[4])
if level == nil or at == nil then
  level, at, last, told = known, now, nil, drawn
end
if last ~= nil and number <= last then
  return {}
end
level = math.min(size, level + math.max(0, now - at) * rate)
level = math.max(-size, math.min(size, level - (drawn - (told or confirmed))))
local answers = {}
for i = 9, #ARGV do
  local looks = string.sub(ARGV[i], 1, 1) == '?'
  local tokens = tonumber(looks and string.sub(ARGV[i], 2) or ARGV[i])
  local granted = tokens <= level
  if granted and not looks then
    level, drawn = level - tokens, drawn + tokens
  end
  answers[#answers + 1] = granted and 1 or 0
  answers[#answers + 1] = string.format('%.17g', level)
end
if redis.call('HLEN', KEYS[1]) > 512 then
  redis.call('DEL', KEYS[1])
end
redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'at', string.format('%.17g', math.max(now, at)),
  'n:' .. account, string.format('%.0f', number), 'd:' .. account, string.format('%.0f', drawn))
redis.call('PEXPIRE', KEYS[1], keep_ms)
return answers
"""
"""`known` is where a gateway last saw a bucket that the server does not know: a server that was restarted empty is no
present to anyone. A call with an old `number` comes late from one that was given up. Of an account that the server
does not know (new, or forgotten, as the gateways of a tenant are bounded too), `confirmed` was charged before."""


@dataclass(frozen=True, slots=True)
class _Question:
    tokens: int
    looks: bool
    answer: asyncio.Future[Answer | None]


@dataclass(slots=True)
class _Account:
    """What this process has drawn for one tenant, less what it returned."""

    tenant: str
    budget: Budget
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    drawn: int = 0
    confirmed: int = 0
    """What the server was told by the last call that it answered."""
    calls: int = 0
    questions: list[_Question] = field(default_factory=list)
    """At most one for each request being admitted, and one return."""
    asking: asyncio.Task[None] | None = None


class Shared:
    """The shared buckets, and the process's own behind them. `share`: see `shared_out`."""

    def __init__(
        self, url: str, timeout_s: float, connections: int, local: Local, share: float, tenants: int = 10_000
    ) -> None:
        """Raises `WrongStore`."""
        self._timeout_s, self._local, self._share, self._most = timeout_s, local, share, tenants
        self._breaker = Breaker()
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        pool: Any = redis.asyncio.BlockingConnectionPool.from_url(  # the client's types change from release to release
            checked(url),
            max_connections=connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        self._client: Any = redis.asyncio.Redis(connection_pool=pool)
        self._script: Any = self._client.register_script(SCRIPT)

    async def look(self, tenant: str, budget: Budget, tokens: int) -> Answer:
        here = await self._local.look(tenant, budget, tokens)
        if here.is_granted:  # as far as was seen last: the reservation will ask
            return here
        return await self._ask(self._account(tenant, budget), tokens, looks=True) or here

    async def take(self, tenant: str, budget: Budget, tokens: int) -> Answer:
        account = self._account(tenant, budget)
        answer = await self._ask(account, tokens)
        if answer is None:
            answer = await self._local.take(tenant, shared_out(budget, self._share), tokens)
            account.drawn += tokens if answer.is_granted else 0
        return answer

    async def put_back(self, tenant: str, budget: Budget, tokens: int) -> None:
        account = self._account(tenant, budget)
        account.drawn -= tokens
        await self._local.put_back(tenant, budget, tokens)
        if not account.questions:  # else the next call tells this, too
            await self._ask(account, 0)

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    def _account(self, tenant: str, budget: Budget) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(tenant, budget)
        account.budget = budget
        self._accounts.move_to_end(tenant)
        if len(self._accounts) > self._most:
            self._accounts.popitem(last=False)
        return account

    async def _ask(self, account: _Account, tokens: int, *, looks: bool = False) -> Answer | None:
        """None when the server did not say: within two timeouts, that of the call under way and that of the next."""
        if not self._breaker.allows():
            telemetry.FALLBACKS.labels(kind="budget_store_off").inc()
            return None
        question = _Question(tokens, looks, asyncio.get_running_loop().create_future())
        account.questions.append(question)
        if account.asking is None:
            account.asking = asyncio.create_task(self._ask_all(account), name=f"budget of {account.tenant}")
        return await question.answer

    async def _ask_all(self, account: _Account) -> None:
        while batch := account.questions[:MOST_AT_ONCE]:
            del account.questions[: len(batch)]
            answers = await self._call(account, batch)
            for number, question in enumerate(batch):
                answer = answers[number] if answers is not None else None
                if answer is not None and answer.is_granted and not question.looks:
                    account.drawn += question.tokens
                if not question.answer.done():
                    question.answer.set_result(answer)
        account.asking = None

    async def _call(self, account: _Account, batch: Sequence[_Question]) -> list[Answer] | None:
        budget = account.budget
        account.calls += 1
        fixed = [
            budget.burst_tokens,
            repr(budget.per_second),
            repr(self._local.left(account.tenant, budget)),
            1000 * (math.ceil(budget.burst_tokens / budget.per_second) + 1),
            account.id,
            account.calls,
            drawn := account.drawn,
            account.confirmed,
        ]
        wanted = [f"?{question.tokens}" if question.looks else question.tokens for question in batch]
        try:
            async with asyncio.timeout(self._timeout_s):
                said = await self._script(keys=[PREFIX + account.tenant], args=[*fixed, *wanted])
            answers = [
                Answer(bool(int(granted)), float(left), is_shared=True)
                for granted, left in zip(said[::2], said[1::2], strict=True)
            ]
            if len(answers) != len(batch):
                raise ValueError(f"{len(answers)} answers to {len(batch)} questions")
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            self._breaker.failed()
            telemetry.fallback("budget_store", error=type(error).__name__)
            return None
        self._breaker.succeeded()
        taken = (q.tokens for q, answer in zip(batch, answers, strict=True) if answer.is_granted and not q.looks)
        account.confirmed = drawn + sum(taken)
        self._local.copy(account.tenant, budget, answers[-1].left)
        return answers
