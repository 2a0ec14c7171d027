"""The Redis tier when its server misbehaves: short waits, a breaker, counted fallbacks, no trust in what comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.cache.redis_tier import RedisTier
from services.chassis.breaker import FAILURES_TO_OPEN, LONGEST_PAUSE_S, Breaker
from services.chassis.telemetry import FALLBACKS
from tests.fakes import kv_blocks
from tests.fakes.redis_server import FakeRedis

KEY, OTHER = kv_blocks.chain(1, 2)
BLOCK = kv_blocks.block(KEY)


@pytest.fixture
async def server() -> AsyncIterator[FakeRedis]:
    async with FakeRedis() as fake:
        yield fake


@pytest.fixture
async def tier(server: FakeRedis) -> AsyncIterator[RedisTier]:
    tier = RedisTier(server.url, 0.25, 60, 4, 100_000)
    yield tier
    await tier.close()


def fallbacks(kind: str) -> float:
    return float(FALLBACKS.labels(kind=kind)._value.get())


async def test_a_hung_server_is_asked_a_few_times_then_no_more(server: FakeRedis, tier: RedisTier) -> None:
    """After the breaker opens, a read does not ask; every fallback is counted."""
    assert await tier.write(BLOCK) == []
    server.is_hung = True
    before = fallbacks("cache_redis"), fallbacks("cache_redis_off")
    for _ in range(FAILURES_TO_OPEN + 100):
        assert await tier.read(KEY) is None
    assert fallbacks("cache_redis") - before[0] == FAILURES_TO_OPEN
    assert fallbacks("cache_redis_off") - before[1] == 100


async def test_a_server_that_returns_is_used_again(server: FakeRedis, tier: RedisTier) -> None:
    """Gone: blocks fall through. Back: after the pause one call tries, and all go through again."""
    now = 0.0
    tier._breaker.clock = lambda: now
    await server.stop()
    for _ in range(5):
        assert await tier.write(BLOCK) == [BLOCK]
    await server.start()
    assert await tier.write(BLOCK) == [BLOCK], "the breaker is open"
    now += LONGEST_PAUSE_S
    assert await tier.write(BLOCK) == []
    read = await tier.read(KEY)
    assert read is not None and read.payload == BLOCK.payload


@pytest.mark.parametrize("kind", ["flip", "swap", "huge", "junk"])
async def test_what_the_server_returns_is_proved(server: FakeRedis, tier: RedisTier, kind: str) -> None:
    """Flipped, swapped, oversize or foreign values are dropped and counted, never served."""
    await tier.write(BLOCK)
    await tier.write(kv_blocks.block(OTHER))
    (name,) = [name for name in server.values if name.endswith(KEY.block_hash)]
    (other,) = [name for name in server.values if name.endswith(OTHER.block_hash)]
    data = server.values[name]
    server.values[name] = {
        "flip": data[:300] + bytes([data[300] ^ 1]) + data[301:],
        "swap": server.values[other],
        "huge": data + bytes(10_000_000),
        "junk": b"junk",
    }[kind]
    assert await tier.read(KEY) is None
    assert tier.corrupt == 1
    assert name not in server.values


def test_pauses_grow_to_a_limit_and_start_over() -> None:
    """Doubling pauses, one try after each, forgotten at the first success."""
    now = 0.0
    breaker = Breaker(lambda: now)
    pauses = []
    for _ in range(FAILURES_TO_OPEN + 7):
        assert breaker.allows()
        breaker.failed()
        if breaker.failures >= FAILURES_TO_OPEN:
            assert not breaker.allows()
            pauses.append(breaker.closed_at - now)
            now = breaker.closed_at
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    breaker.succeeded()
    assert breaker.allows() and breaker.pause_s == 1
