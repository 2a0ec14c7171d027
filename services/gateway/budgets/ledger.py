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
    """Whether the store that all gateways share said so. What was taken there must be put back there."""


class Ledger(Protocol):
    """`tokens` ≥ 0. Neither call raises or waits longer than the store's time limit."""

    async def take(self, tenant: str, budget: Budget, tokens: int, *, only_look: bool = False) -> Answer:
        """Takes `tokens` out, all or none; `only_look` says what it would have answered."""
        ...

    async def put_back(self, tenant: str, budget: Budget, tokens: int, *, is_shared: bool) -> bool:
        """Puts back what was taken and not used, once: False when the store did not answer and it stays taken."""
        ...

    async def close(self) -> None: ...


class Local:
    """Buckets of at most `tenants` tenants; one not seen before is full. Never waits."""

    def __init__(self, tenants: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = tenants, clock
        self._levels: OrderedDict[str, tuple[Budget, Level]] = OrderedDict()

    async def take(self, tenant: str, budget: Budget, tokens: int, *, only_look: bool = False) -> Answer:
        level = self._now(tenant, budget)
        left = bucket.taken(level, tokens)
        if left is not None and not only_look:
            level = left
        self._keep(tenant, budget, level)
        return Answer(left is not None, level.tokens)

    async def put_back(self, tenant: str, budget: Budget, tokens: int, *, is_shared: bool = False) -> bool:
        self._keep(tenant, budget, bucket.returned(self._now(tenant, budget), budget, tokens))
        return True

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
