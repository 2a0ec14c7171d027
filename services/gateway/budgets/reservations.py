"""Token budgets as the gateway uses them: look, reserve before the work, settle after it, exactly once.

`generation.py` calls these; which ledger keeps the levels is not known here. A tenant without a budget costs nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

from prometheus_client import Counter, Gauge

from services.chassis.errors import InvalidRequest, TooBusy
from services.gateway.budgets import bucket
from services.gateway.budgets.book import Shelf
from services.gateway.budgets.bucket import Budget, Standing
from services.gateway.budgets.ledger import Answer, Ledger

RESERVED = Counter("autoglm_budget_reserved_tokens_total", "Tokens taken out of budgets at admission", ["tenant"])
SETTLED = Counter("autoglm_budget_settled_tokens_total", "Tokens that were used, of those reserved", ["tenant"])
HELD = Gauge("autoglm_budget_held_tokens", "Tokens reserved by requests that are being served", ["tenant"])
REFUSED = Counter(
    "autoglm_budget_refusals_total",
    "Requests refused for their tenant's budget: empty (before the prompt was tokenised), too_little_left, too_large",
    ["tenant", "reason"],
)


class OverBudget(TooBusy):
    """The tenant has used its tokens; `retry_after_s` is when the request would fit."""

    def __init__(self, tenant: str, budget: Budget, left: float, tokens: int, *, is_estimate: bool) -> None:
        self.standing = bucket.standing(left, budget)
        wait_s = math.ceil(bucket.wait_s(left, budget, tokens) * 1000 + 1) / 1000  # whole ms, never too early
        wanted = f"at least {tokens}" if is_estimate else f"up to {tokens}"
        super().__init__(
            f"tenant {tenant!r} may use {budget.tokens_per_minute} tokens per minute and has {self.standing.remaining}"
            f" left; this request takes {wanted}. Ask for fewer max_tokens, or come back in {wait_s:g} s",
            retry_after_s=wait_s,
            kind="rate_limit_exceeded",
            budget="tokens_per_minute",
            tenant=tenant,
            limit=budget.tokens_per_minute,
            remaining=self.standing.remaining,
            requested=tokens,
            reset_s=round(self.standing.reset_s, 3),
        )


class Reservation:
    """Tokens taken out for one request. Every way of ending a request leads to `settle`."""

    def __init__(self, budgets: Budgets, tenant: str, label: str, budget: Budget, tokens: int, answer: Answer) -> None:
        self.tenant, self.label, self.budget, self.tokens = tenant, label, budget, tokens
        self.standing: Standing = bucket.standing(answer.left, budget)
        self._budgets, self._is_open = budgets, True

    def settle(self, used: int) -> None:
        """Puts back what was not used. Only the first call counts; never blocks, may be called from a callback."""
        if self._is_open:
            self._is_open = False
            self._budgets.settled(self, used)


class Budgets:
    """All tenants' budgets. `close` waits for what is still being put back."""

    def __init__(self, shelf: Shelf, ledger: Ledger) -> None:
        self._shelf, self._ledger = shelf, ledger
        self._tasks: set[asyncio.Task[Any]] = set()
        """Each lives for at most the store's timeout; there are at most two for each request being served."""

    async def look(self, tenant: str, least: int) -> None:
        """Raises OverBudget when not even `least` tokens are left: cheap, for before the prompt is tokenised."""
        budget = self._shelf.book.of(tenant)
        if budget is None or least > budget.burst_tokens:
            return  # what can never fit is told by `reserve`, which knows how much it really is
        answer = await self._ledger.look(tenant, budget, least)
        if not answer.is_granted:
            self._refused(tenant, "empty")
            raise OverBudget(tenant, budget, answer.left, least, is_estimate=True)

    async def reserve(self, tenant: str, tokens: int) -> Reservation | None:
        """Takes `tokens` out, or raises OverBudget or InvalidRequest. None when the tenant has no budget."""
        budget = self._shelf.book.of(tenant)
        if budget is None:
            return None
        if tokens > budget.burst_tokens:
            self._refused(tenant, "too_large")
            raise InvalidRequest(
                f"this request may take {tokens} tokens, more than tenant {tenant!r} can ever have at once"
                f" ({budget.burst_tokens}); shorten the prompt, or ask for fewer max_tokens or choices",
                field="max_tokens",
                kind="request_over_budget",
                budget="burst_tokens",
                limit=budget.burst_tokens,
                requested=tokens,
            )
        # In a task of its own: a caller who goes while the store is asked must not leave with tokens nobody returns.
        taking = self._start(self._ledger.take(tenant, budget, tokens))
        try:
            answer = await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(lambda done: self._unwanted(done, tenant, budget, tokens))
            raise
        if not answer.is_granted:
            self._refused(tenant, "too_little_left")
            raise OverBudget(tenant, budget, answer.left, tokens, is_estimate=False)
        return self._opened(tenant, budget, tokens, answer)

    def settled(self, reservation: Reservation, used: int) -> None:
        """For `Reservation` only."""
        SETTLED.labels(reservation.label).inc(used)
        HELD.labels(reservation.label).dec(reservation.tokens)
        unused = reservation.tokens - used
        if unused > 0:
            self._start(self._ledger.put_back(reservation.tenant, reservation.budget, unused))

    async def close(self) -> None:
        """Puts back what is on its way and closes the store."""
        while self._tasks:  # the end of one may begin another
            await asyncio.wait(self._tasks)
        await self._ledger.close()

    def _opened(self, tenant: str, budget: Budget, tokens: int, answer: Answer) -> Reservation:
        label = self._shelf.book.label(tenant)
        RESERVED.labels(label).inc(tokens)
        HELD.labels(label).inc(tokens)
        return Reservation(self, tenant, label, budget, tokens, answer)

    def _unwanted(self, done: asyncio.Task[Answer], tenant: str, budget: Budget, tokens: int) -> None:
        if not done.cancelled() and done.exception() is None and done.result().is_granted:
            self._opened(tenant, budget, tokens, done.result()).settle(0)

    def _refused(self, tenant: str, reason: str) -> None:
        REFUSED.labels(self._shelf.book.label(tenant), reason).inc()

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
