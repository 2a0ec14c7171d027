"""The arithmetic of a token budget: a bucket that fills at a steady rate and never above its size.

A reservation takes tokens out before the work, settling puts back what was not used. So at any time, what was used and
what is still reserved together are at most the size plus what has flowed in since the bucket was first seen. Pure: the
time is given. `redis_ledger.py` says the same in Lua.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """What one tenant may use: a steady rate, and how much it may have saved up."""

    tokens_per_minute: int
    burst_tokens: int

    @property
    def per_second(self) -> float:
        return self.tokens_per_minute / 60


@dataclass(frozen=True, slots=True)
class Level:
    """How full a bucket was at a time: at most the budget's size; below 0 after a shared store was away."""

    tokens: float
    at_s: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How a tenant stands, in the words of OpenAI's response headers."""

    limit: int
    remaining: int
    reset_s: float
    """Until the bucket is full if nothing more is asked."""


def full(budget: Budget, now_s: float) -> Level:
    """A bucket nobody has drawn from."""
    return Level(float(budget.burst_tokens), now_s)


def refilled(level: Level, budget: Budget, now_s: float) -> Level:
    """The bucket now. A clock that went back adds nothing."""
    gained = max(0.0, now_s - level.at_s) * budget.per_second
    return Level(min(budget.burst_tokens, level.tokens + gained), max(now_s, level.at_s))


def taken(level: Level, tokens: int) -> Level | None:
    """The bucket without `tokens`, or None when it does not hold as many."""
    return Level(level.tokens - tokens, level.at_s) if tokens <= level.tokens else None


def returned(level: Level, budget: Budget, tokens: int) -> Level:
    """The bucket with `tokens` put back; what does not fit is lost, like any rain on a full bucket."""
    return Level(min(budget.burst_tokens, level.tokens + tokens), level.at_s)


def wait_s(tokens_left: float, budget: Budget, tokens: int) -> float:
    """How long until the bucket holds `tokens`, if nobody else draws."""
    return max(0.0, tokens - tokens_left) / budget.per_second


def standing(tokens_left: float, budget: Budget) -> Standing:
    """How a tenant with this much left stands."""
    return Standing(
        budget.tokens_per_minute, int(max(0.0, tokens_left)), wait_s(tokens_left, budget, budget.burst_tokens)
    )
