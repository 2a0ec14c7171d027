"""Token budgets: never more than the budget, never much less, settled once, told in words one can act on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from services.chassis.errors import InvalidRequest, status_of
from services.chassis.telemetry import FALLBACKS
from services.gateway.budgets.book import Book, Shelf, WrongBudgets, parse
from services.gateway.budgets.bucket import Budget
from services.gateway.budgets.ledger import Answer, Local
from services.gateway.budgets.reservations import Budgets, OverBudget, Reservation
from services.gateway.metering import Meter
from services.gateway.rest.errors import told
from services.gateway.tenancy import tenant_of

SLOW = Budget(60, 100)


class Clock:
    """The time it is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def budgets_over(ledger: Any, **tenants: Budget) -> Budgets:
    shelf = Shelf(None, 1)
    shelf.book = Book(None, tenants)
    return Budgets(shelf, ledger)


def figure(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0, 120)),
        st.tuples(st.just("reserve"), st.integers(0, 160)),
        st.tuples(st.just("settle"), st.floats(0, 1)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(per_minute=st.integers(1, 6000), burst=st.integers(1, 200), steps=STEPS)
def test_never_more_than_the_budget_and_what_was_saved(
    per_minute: int, burst: int, steps: list[tuple[str, float]]
) -> None:
    """Whatever is asked, waited and settled: used and reserved together are at most burst + rate × time, always."""

    async def play() -> None:
        clock, began = Clock(), 1000.0
        ledger, budget = Local(10, clock), Budget(per_minute, burst)
        held: list[int] = []
        used = 0
        for kind, amount in steps:
            if kind == "wait":
                clock.now += amount
            elif kind == "reserve":
                before = ledger.left("t", budget)
                answer = await ledger.take("t", budget, int(amount))
                assert answer.is_granted == (amount <= before)
                held += [int(amount)] if answer.is_granted else []
            elif held:
                reserved = held.pop(0)
                spent = int(reserved * amount)
                used += spent
                await ledger.put_back("t", budget, reserved - spent)
            assert 0 <= ledger.left("t", budget) <= burst
            assert used + sum(held) <= burst + budget.per_second * (clock.now - began) + 1e-6

    asyncio.run(play())


@settings(max_examples=50, deadline=None)
@given(per_minute=st.integers(600, 60_000), size=st.integers(1, 50), share=st.floats(0, 1))
def test_a_greedy_tenant_gets_its_whole_budget(per_minute: int, size: int, share: float) -> None:
    """Asking ten times as much as allowed, with part of every reservation unused, it gets rate × time, no less."""

    async def play() -> None:
        clock = Clock()
        ledger, budget = Local(10, clock), Budget(per_minute, 100)
        await ledger.take("t", budget, 100)
        used, step_s = 0, size / budget.per_second / 10
        for _ in range(2000):
            clock.now += step_s
            if (await ledger.take("t", budget, size)).is_granted:
                spent = max(1, int(size * share))
                used += spent
                await ledger.put_back("t", budget, size - spent)
        most = budget.per_second * step_s * 2000
        offered = 2000 * max(1, int(size * share))
        assert min(most, offered) - 2 * size <= used <= most + 1e-6

    asyncio.run(play())


async def test_settling_counts_once() -> None:
    """The unused part goes back at the first settle and never again; looking takes nothing."""
    ledger = Local(10, Clock())
    budgets = budgets_over(ledger, once=SLOW)
    reservation = await budgets.reserve("once", 80)
    assert reservation is not None and ledger.left("once", SLOW) == 20
    assert figure("autoglm_budget_held_tokens", tenant="once") == 80
    for _ in range(3):
        reservation.settle(30)
    await budgets.close()
    assert ledger.left("once", SLOW) == 70
    assert figure("autoglm_budget_settled_tokens_total", tenant="once") == 30
    assert figure("autoglm_budget_held_tokens", tenant="once") == 0
    await budgets.look("once", 70)
    with pytest.raises(OverBudget):
        await budgets.look("once", 71)
    assert ledger.left("once", SLOW) == 70


async def test_a_refusal_says_what_and_when() -> None:
    """The text, the facts and the trailers name the budget and the time after which the same request fits."""
    clock = Clock()
    ledger = Local(10, clock)
    budgets = budgets_over(ledger, acme=SLOW)
    await budgets.reserve("acme", 90)
    with pytest.raises(OverBudget) as caught:
        await budgets.reserve("acme", 40)
    refusal = caught.value
    assert 30 <= refusal.retry_after_s <= 30.01
    assert "60 tokens per minute" in refusal.message and f"in {refusal.retry_after_s:g} s" in refusal.message
    assert refusal.metadata["limit"] == "60" and refusal.metadata["remaining"] == "10"
    assert refusal.metadata["kind"] == "rate_limit_exceeded" and refusal.metadata["requested"] == "40"
    code, _, trailers = status_of(refusal)
    assert code.name == "RESOURCE_EXHAUSTED"
    assert dict(trailers)["retry-after-ms"] == str(round(refusal.retry_after_s * 1000))
    error = told(refusal)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.headers["retry-after"] == "31"
    assert error.headers["x-ratelimit-limit-tokens"] == "60"
    assert error.headers["x-ratelimit-remaining-tokens"] == "10"
    assert error.headers["x-ratelimit-reset-tokens"] == "90s"
    clock.now += refusal.retry_after_s
    assert await budgets.reserve("acme", 40) is not None


async def test_what_can_never_fit_is_not_worth_a_wait() -> None:
    """More than the bucket can hold is the request's fault: InvalidRequest, not "come back"."""
    budgets = budgets_over(Local(10, Clock()), t=SLOW)
    await budgets.look("t", 101)
    with pytest.raises(InvalidRequest, match="more than tenant 't' can ever have at once"):
        await budgets.reserve("t", 101)


async def test_no_budget_costs_nothing() -> None:
    """A tenant without a budget is neither asked for nor counted."""

    class Untouchable:
        async def take(self, *_: Any, **__: Any) -> Answer:
            raise AssertionError("asked")

        async def close(self) -> None: ...

    budgets = budgets_over(Untouchable())
    await budgets.look("anyone", 10**9)
    assert await budgets.reserve("anyone", 10**9) is None
    await budgets.close()


async def test_a_caller_who_goes_while_the_store_is_asked_leaves_nothing_taken() -> None:
    """The tokens that the store gives to nobody go back."""

    class Slow(Local):
        asked, answer = asyncio.Event(), asyncio.Event()

        async def take(self, tenant: str, budget: Budget, tokens: int) -> Answer:
            given = await super().take(tenant, budget, tokens)
            self.asked.set()
            await self.answer.wait()
            return given

    ledger = Slow(10, Clock())
    budgets = budgets_over(ledger, t=SLOW)
    asking: asyncio.Task[Reservation | None] = asyncio.create_task(budgets.reserve("t", 60))
    await ledger.asked.wait()
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled() and ledger.left("t", SLOW) == 40
    ledger.answer.set()
    await budgets.close()
    assert ledger.left("t", SLOW) == 100


async def test_memory_is_bounded_and_full_buckets_go_first() -> None:
    """Past the bound, buckets that are full again are forgotten unnoticed; only then one that is not, and it counts."""
    clock = Clock()
    ledger = Local(2, clock)
    forgotten = FALLBACKS.labels(kind="budget_forgotten")._value
    await ledger.take("a", SLOW, 10)
    clock.now += 20
    await ledger.take("b", SLOW, 50)
    before = forgotten.get()
    await ledger.take("c", SLOW, 50)
    assert forgotten.get() == before and ledger.left("b", SLOW) == 50
    await ledger.take("d", SLOW, 50)
    assert forgotten.get() == before + 1
    assert [ledger.left(name, SLOW) for name in "bcd"] == [100, 50, 50]


GOOD = """
version = 1
[default]
tokens_per_minute = 60
[tenants.acme]
tokens_per_minute = 600
burst_tokens = 50
[tenants."batch:night"]
unlimited = true
"""


def test_the_file_is_read_as_it_says() -> None:
    """A name, the default, no limit; a minute's worth may be saved unless told; only named tenants are labels."""
    book = parse(GOOD.encode())
    assert book.of("acme") == Budget(600, 50) and book.of("who") == Budget(60, 60) and book.of("batch:night") is None
    assert (book.label("acme"), book.label("who")) == ("acme", "other")
    assert Book().of("anyone") is None


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("", "version"),
        ("version = 2", "version"),
        ("version = 1\n[default]\n", "tokens_per_minute is missing"),
        ("version = 1\n[default]\ntokens_per_minute = 0", "default.tokens_per_minute"),
        ("version = 1\n[default]\ntokens_per_minute = 1.5", "default.tokens_per_minute"),
        ("version = 1\n[default]\ntoken_per_minute = 5", "default.token_per_minute"),
        ("version = 1\n[tenants.a]\nunlimited = true\nburst_tokens = 5", "tenants.a"),
        ('version = 1\n[tenants."a b"]\nunlimited = true', "tenants.a b"),
        ("version = 1\n[tenants.a]\n[tenants.a]", "line"),
        ("version = 1\n" + "#" * 300_000, "larger"),
        ("\udcff", "utf-8"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(content: str, place: str) -> None:
    """Every mistake is found, and the text says where."""
    with pytest.raises(WrongBudgets, match=place):
        parse(content.encode(errors="surrogateescape"))


def test_a_changed_file_is_read_and_a_broken_one_is_not_used(tmp_path: Path) -> None:
    """The new budgets apply; a broken or vanished file keeps the old ones and is counted once."""
    path = tmp_path / "budgets.toml"

    def write(content: str) -> None:
        path.with_suffix(".new").write_text(content)
        os.replace(path.with_suffix(".new"), path)

    kept: Callable[[], float] = FALLBACKS.labels(kind="budgets_kept")._value.get
    write(GOOD)
    shelf = Shelf(path, 1)
    before = kept()
    write(GOOD.replace("600", "700"))
    shelf.look(path)
    assert shelf.book.of("acme") == Budget(700, 50) and kept() == before
    write("version = 3")
    shelf.look(path)
    shelf.look(path)
    assert shelf.book.of("acme") == Budget(700, 50) and kept() == before + 1
    path.unlink()
    shelf.look(path)
    shelf.look(path)
    assert shelf.book.of("acme") == Budget(700, 50) and kept() == before + 2
    write(GOOD)
    shelf.look(path)
    assert shelf.book.of("acme") == Budget(600, 50)
    with pytest.raises(WrongBudgets, match=r"nowhere\.toml"):
        Shelf(tmp_path / "nowhere.toml", 1)


def test_a_prompt_counts_once_and_only_when_it_was_worked_for() -> None:
    """Choices share their prompt; unanswered prompts are paid by a caller who left, not when the mesh failed."""
    meter = Meter([10, 20], choices=2)
    assert meter.used(has_left=True) == 0
    meter.asked(0)
    meter.asked(2)
    assert (meter.used(has_left=False), meter.used(has_left=True)) == (0, 30)
    meter.received(0, 3)
    meter.received(1, 4)
    meter.received(0, 5)
    assert (meter.used(has_left=False), meter.used(has_left=True)) == (10 + 9, 30 + 9)


@pytest.mark.parametrize("named", [["a", "b"], [""], ["a b"], ["x" * 65], ["ä"], ["a\n"]])
def test_an_odd_tenant_fails_closed(named: list[str]) -> None:
    """Two names, none, too long or not plain ASCII: refused, never the default tenant."""
    with pytest.raises(InvalidRequest, match="tenant"):
        tenant_of(named, "public")
    assert tenant_of([], "public") == "public" and tenant_of(["acme"], "public") == "acme"
