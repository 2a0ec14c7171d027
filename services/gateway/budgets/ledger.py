"""Where the levels of all buckets are kept: in this process, or in a store that several gateways share.

`Local` is the whole truth when there is one gateway, and what is left when the shared store does not answer.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from services.chassis import telemetry
from services.gateway.budgets import bucket
from services.gateway.budgets.bucket import Budget, Level


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the tokens were there, and how many are left now."""

    is_granted: bool
    left: float
    is_shared: bool = False
    """Whether the store that all gateways share said so."""


class Ledger(Protocol):
    """`tokens` ≥ 0. No call raises or waits longer than the store's time limit."""

    async def look(self, tenant: str, budget: Budget, tokens: int) -> Answer:
        """What `take` would answer, as far as is known: a refusal is certain, a grant is not."""
        ...

    async def take(self, tenant: str, budget: Budget, tokens: int) -> Answer:
        """Takes `tokens` out, all or none."""
        ...

    async def put_back(self, tenant: str, budget: Budget, tokens: int) -> None:
        """Puts back what was taken and not used. To be called once for what was taken once."""
        ...

    async def close(self) -> None: ...


class Local:
    """Buckets of at most `tenants` tenants; one not seen before is full. Never waits."""

    def __init__(self, tenants: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = tenants, clock
        self._levels: OrderedDict[str, tuple[Budget, Level]] = OrderedDict()

    async def look(self, tenant: str, budget: Budget, tokens: int) -> Answer:
        level = self._now(tenant, budget)
        return Answer(bucket.taken(level, tokens) is not None, level.tokens)

    async def take(self, tenant: str, budget: Budget, tokens: int) -> Answer:
        level = self._now(tenant, budget)
        left = bucket.taken(level, tokens)
        self._keep(tenant, budget, left or level)
        return Answer(left is not None, (left or level).tokens)

    async def put_back(self, tenant: str, budget: Budget, tokens: int) -> None:
        self._keep(tenant, budget, bucket.returned(self._now(tenant, budget), budget, tokens))

    async def close(self) -> None:
        """Nothing to do."""

    def left(self, tenant: str, budget: Budget) -> float:
        """What the bucket holds now."""
        return self._now(tenant, budget).tokens

    def copy(self, tenant: str, budget: Budget, tokens: float) -> None:
        """Remembers what another ledger says the bucket holds now."""
        self._keep(tenant, budget, Level(min(tokens, budget.burst_tokens), self._clock()))

    def _now(self, tenant: str, budget: Budget) -> Level:
        now = self._clock()
        if tenant not in self._levels:
            return bucket.full(budget, now)
        _, level = self._levels[tenant]
        return bucket.refilled(level, budget, now)

    def _keep(self, tenant: str, budget: Budget, level: Level) -> None:
        self._levels[tenant] = (budget, level)
        self._levels.move_to_end(tenant)
        if len(self._levels) > self._most:
            self._forget()

    def _forget(self) -> None:
        """Full buckets can be forgotten without anyone noticing; else the one unused for longest goes, and is told."""
        now = self._clock()
        for name, (budget, level) in list(self._levels.items()):
            if bucket.refilled(level, budget, now).tokens >= budget.burst_tokens:
                del self._levels[name]
        while len(self._levels) > self._most:
            self._levels.popitem(last=False)
            telemetry.fallback("budget_forgotten", tenants=self._most)


def shared_out(budget: Budget, share: float) -> Budget:
    """What one of several gateways may grant by itself while the shared store is away."""
    return replace(
        budget,
        tokens_per_minute=max(1, int(budget.tokens_per_minute * share)),
        burst_tokens=max(1, int(budget.burst_tokens * share)),
    )
