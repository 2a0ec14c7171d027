"""What a step computes, and what it is thought to cost: pure decisions."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.runtime.planning import Budget, Need, plan
from engine.runtime.speculation import DraftController, PromptLookup
from engine.runtime.step_cost import StepCost

BUDGET = Budget(max_rows=64, logit_rows=32, slowdown=1.8, least_prefill_rows=4)


def learnt(base: float, decode: float, prefill: float, noise: float = 0.0, steps: int = 200) -> StepCost:
    cost, chooser = StepCost(), random.Random(1)
    for _ in range(steps):
        rows, fill = chooser.randrange(1, 17), chooser.choice([0, 0, chooser.randrange(256)])
        seconds = base + decode * rows + prefill * fill
        cost.observe(rows, fill, seconds * (1 + noise * chooser.uniform(-1, 1)))
    return cost


def test_the_cost_of_rows_is_learnt() -> None:
    """With 5 % noise, predictions are within 10 % after 200 steps."""
    cost = learnt(0.030, 0.001, 0.0004, noise=0.05)
    for rows, fill in ((1, 0), (8, 0), (8, 128), (16, 256)):
        truth = 0.030 + 0.001 * rows + 0.0004 * fill
        assert abs(cost.predict(rows, fill) / truth - 1) < 0.1


def test_one_slow_step_is_no_news() -> None:
    """A step that took 50 times as long moves the estimate by less than a third; a lasting change is followed."""
    cost = learnt(0.030, 0.001, 0.0004, noise=0.05)
    before = cost.predict(8, 64)
    cost.observe(8, 64, 50 * before)
    assert cost.predict(8, 64) < 1.34 * before
    for number in range(300):
        cost.observe(8, 64 * (number % 2), 3 * (0.038 + 0.0256 * (number % 2)))
    assert abs(cost.predict(8, 64) / (3 * 0.0636) - 1) < 0.15


def test_prefill_stays_within_the_slowdown() -> None:
    """While 8 decode, prefill takes as many rows as fit 1.8 times their step; alone it takes all."""
    cost = learnt(0.030, 0.001, 0.0004)
    budget = Budget(512, 64, 1.8, 4)
    needs = [Need(1)] * 8 + [Need(2048)]
    rows = plan(needs, cost, budget)
    assert rows[:8] == [1] * 8
    assert 0.95 * 1.8 < cost.predict(8, rows[8]) / cost.predict(8, 0) <= 1.8
    assert plan([Need(2048)], cost, budget) == [512]


def test_a_long_prompt_keeps_within_the_slowdown_to_its_end() -> None:
    """Steps that all look alike teach no wrong cost: as context and machine get slower, the bound holds on."""
    cost = learnt(0.030, 0.001, 0.0005, steps=100)
    budget = Budget(512, 64, 1.8, 4)
    worst = []
    for step in range(600):
        slower = 1.0 if step < 200 else 2.0
        row_s = 0.0005 + 0.000002 * step  # attention over the prompt so far
        fill = plan([Need(1)] * 8 + [Need(100_000)], cost, budget)[8]
        seconds = slower * (0.038 + row_s * fill)
        cost.observe(8, fill, seconds)
        worst.append(seconds / (slower * 0.038))
    assert sum(1 for ratio in worst[:200] + worst[300:] if ratio > 1.9) <= 5
    assert sum(worst[400:]) / len(worst[400:]) > 1.5, "prefill goes on at the speed that is allowed"


def test_some_prefill_always_goes() -> None:
    """Even when a single row would cost too much, or decoding alone fills the step."""
    assert plan([Need(1), Need(100)], learnt(0.001, 0.001, 1.0), BUDGET) == [1, 4]
    crowd = [Need(1)] * 64 + [Need(100)]
    rows = [plan(crowd, StepCost(), BUDGET, turn) for turn in range(64)]
    assert all(each[64] == 4 and sum(each) == 64 for each in rows)
    assert all(sum(each[n] for each in rows) >= 58 for n in range(64)), "those that must wait take turns"


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 8), st.booleans()), min_size=1, max_size=80),
    st.integers(0, 99),
)
def test_a_plan_keeps_its_bounds(asked: list[tuple[int, int, bool]], turn: int) -> None:
    """Never more rows than a step or a sequence has, nor more logits than allowed; never nothing."""
    needs = [
        Need(pending, drafts if pending == 1 and not scoring else 0, scoring) for pending, drafts, scoring in asked
    ]
    rows = plan(needs, learnt(0.03, 0.001, 0.0004, steps=20), BUDGET, turn)
    assert 1 <= sum(rows) <= BUDGET.max_rows
    assert all(0 <= count <= need.pending + need.drafts for count, need in zip(rows, needs, strict=True))
    logits = sum(count for count, need in zip(rows, needs, strict=True) if need.all_logits or need.is_decode)
    assert logits <= BUDGET.logit_rows + len(needs)


def test_drafts_take_only_what_is_left() -> None:
    """Prefill is served before a gamble."""
    cost = learnt(0.030, 0.001, 0.0004)
    assert plan([Need(1, 8), Need(1, 8)], cost, Budget(12, 32, 1.8, 4)) == [9, 3]
    assert plan([Need(1, 8), Need(63)], cost, Budget(64, 32, 100.0, 4)) == [1, 63]


def test_a_text_that_repeats_is_guessed() -> None:
    """After the second time of three tokens, what followed the first time is the guess, round and round."""
    tokens = [1, 2, 3, 4, 5, 1, 2]
    lookup = PromptLookup(tokens, 3)
    lookup.advance()
    assert not lookup.has_match and lookup.draft(4) == []
    tokens.append(3)
    lookup.advance()
    assert lookup.draft(4) == [4, 5, 1, 2] and lookup.draft(7) == [4, 5, 1, 2, 3, 4, 5] and lookup.draft(0) == []
    tokens.append(9)
    lookup.advance()
    assert lookup.draft(4) == []


def test_drafting_stops_when_it_does_not_pay_and_is_tried_again_rarely() -> None:
    """Wrong guesses, or rows as dear as steps, turn it off; right guesses and cheap rows make drafts long."""
    control = DraftController(8)
    for _ in range(50):
        control.learn(4, 4)
    assert control.wanted(0.030, 0.001, 1) == 8
    assert control.wanted(0.030, 0.040, 1) in (0, 2), "a row costs more than a step"
    control = DraftController(8)
    for _ in range(50):
        control.learn(4, 0)
    tried = [control.wanted(0.030, 0.003, 1) for _ in range(600)]
    assert sum(1 for count in tried if count) <= 8 and sum(tried) > 0
    for _ in range(60):
        control.learn(4, 4)
    assert control.wanted(0.030, 0.003, 1) == 8
