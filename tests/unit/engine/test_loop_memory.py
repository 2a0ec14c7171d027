"""Pages under pressure: requests step back and come again with the same tokens, prefixes are shared, nothing leaks."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.prefix import scope_key
from engine.runtime.loop import Limits, Loop
from engine.runtime.sampling import Sampling
from engine.runtime.sequences import Failure, Finished, Request, Running
from tests.fakes.counting_executor import BLOCK, CountingExecutor, next_token
from tests.fakes.ear import WAIT_S, Ear

GREEDY = Sampling(temperature=0)
HOT = Sampling(temperature=60.0, seed=5, frequency_penalty=0.7, repetition_penalty=1.1)
SCOPE = scope_key("v", "t", BLOCK)
ENDLESS = 1_000_000


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def start(executor: CountingExecutor, **limits: int) -> Loop:
    loop = Loop(executor, Limits(**limits))
    loop.start()
    return loop


def stop(loop: Loop, executor: CountingExecutor) -> None:
    loop.close()
    assert loop.join(WAIT_S), "the step thread did not end"
    assert loop.pages.used == 0 and loop.pages.available == executor.page_count, "a page was lost"


def ask(loop: Loop, request: Request) -> tuple[Ear, Running]:
    ear = Ear()
    return ear, loop.submit(request, ear)


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_a_request_that_stepped_back_says_the_same(sampling: Sampling) -> None:
    """Eight streams that together need three times the pages there are: each is exactly what it is alone."""
    requests = [Request([n + 1] * (n + 2), 40, sampling, logprobs=True) for n in range(8)]
    executor = CountingExecutor()
    roomy = start(executor)
    alone = []
    for request in requests:
        alone.append(ask(roomy, request)[0].all())
    stop(roomy, executor)
    executor = CountingExecutor(page_count=32)
    tight = start(executor, max_running=8)
    ears = [ask(tight, request)[0] for request in requests]
    assert [ear.all() for ear in ears] == alone
    assert tight.load().preemptions > 0
    stop(tight, executor)


def test_scores_are_told_once_however_often_they_are_computed() -> None:
    """A scoring request that steps back does not repeat positions."""
    executor = CountingExecutor(page_count=40)
    loop = start(executor, max_running=8, step_rows=8, logit_rows=4)
    ears = [ask(loop, Request([n + 1] * 4, 100, GREEDY))[0] for n in range(3)]
    ids = [9, *expected([9], 60)]
    scored, _ = ask(loop, Request(ids, 0, score_from=1))
    tokens, end = scored.all()
    assert tokens == ids[1:] and isinstance(end, Finished)
    for n, ear in enumerate(ears):
        assert ear.all()[0] == expected([n + 1] * 4, 100)
    stop(loop, executor)


def test_the_oldest_is_never_disturbed() -> None:
    """Whoever came first runs as if alone, in exactly as many steps as it has tokens."""
    executor = CountingExecutor(page_count=12)
    loop = start(executor, max_running=4)
    oldest, _ = ask(loop, Request([1], 4 * 11 - 1, GREEDY))
    young = [ask(loop, Request([n], 30, GREEDY))[0] for n in (2, 3, 4)]
    assert oldest.all()[0] == expected([1], 43)
    for n, ear in zip((2, 3, 4), young, strict=True):
        assert ear.all()[0] == expected([n], 30)
    stop(loop, executor)


def test_a_prefix_is_in_memory_once_while_many_use_it() -> None:
    """Five streams with one beginning of ten blocks share its pages, and give them back when they end."""
    executor = CountingExecutor()
    loop = start(executor)
    prompt = [n % 90 for n in range(10 * BLOCK)]
    first, running = ask(loop, Request([*prompt, 1], ENDLESS, GREEDY, scope=SCOPE))
    first.first()
    others = [ask(loop, Request([*prompt, n], ENDLESS, GREEDY, scope=SCOPE)) for n in range(2, 6)]
    for ear, _ in others:
        assert ear.first().cached_tokens == len(prompt)
    shared = others[0][1].pages[:10]
    assert all(each.pages[:10] == shared and each.pages[10] != others[0][1].pages[10] for _, each in others[1:])
    assert [loop.pages.references(page) for page in shared] == [5] * 10
    for ear, each in [(first, running), *others]:
        loop.cancel(each)
        assert ear.all()[1] is Failure.CANCELLED
    stop(loop, executor)


def test_requests_that_arrive_together_end_up_with_one_copy() -> None:
    """Two that compute the same blocks in the same steps use the same pages as soon as those are whole."""
    executor = CountingExecutor()
    gate = threading.Event()
    executor.before_step = lambda: gate.wait(WAIT_S) and None
    loop = start(executor)
    pair = [ask(loop, Request([*range(1, 21)], ENDLESS, GREEDY, scope=SCOPE)) for _ in range(2)]
    gate.set()
    for ear, _ in pair:
        ear.first()
    assert pair[0][1].pages[:5] == pair[1][1].pages[:5]
    for ear, running in pair:
        loop.cancel(running)
        tokens, _ = ear.all()
        assert tokens == expected([*range(1, 21)], len(tokens) + 1)[1:]
    stop(loop, executor)


def test_cancelling_frees_the_pages() -> None:
    """A request that was refused pages by another's size runs as soon as that one is cancelled."""
    executor = CountingExecutor(page_count=10)
    loop = start(executor, max_running=4)
    large, running = ask(loop, Request([1] * 36, 4, GREEDY, scope=SCOPE))
    large.all()
    hog, running = ask(loop, Request([2] * 30, 10, GREEDY))
    hog.first()
    loop.cancel(running)
    assert ask(loop, Request([3] * 33, 3, GREEDY))[0].all()[0] == expected([3] * 33, 3)
    stop(loop, executor)


@pytest.mark.parametrize("step_rows", [1, 3, 7, 64])
def test_how_a_prompt_is_cut_changes_nothing(step_rows: int) -> None:
    """Chunks of any length, not only whole blocks."""
    executor = CountingExecutor()
    loop = start(executor, step_rows=step_rows, least_prefill_rows=1)
    prompts = [[n + 1] * (3 * n + 1) for n in range(6)]
    ears = [ask(loop, Request(prompt, 5, GREEDY, scope=SCOPE))[0] for prompt in prompts]
    assert [ear.all()[0] for ear in ears] == [expected(prompt, 5) for prompt in prompts]
    assert max(executor.steps) <= step_rows
    stop(loop, executor)


_REQUESTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(0, 25), st.booleans(), st.integers(0, 9)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(_REQUESTS, st.sampled_from([1, 5, 32]), st.sampled_from([15, 25, 60]), st.sampled_from([0, 4]))
def test_no_page_is_lost_whatever_is_asked(
    asked: list[tuple[int, int, int, bool, int]], step_rows: int, page_count: int, draft: int
) -> None:
    """Random requests with common beginnings, some cancelled, in little memory: right tokens, all pages return."""
    executor = CountingExecutor(page_count=page_count)
    loop = start(executor, step_rows=step_rows, max_running=5, least_prefill_rows=2, max_draft=draft, draft_match=2)
    at_work = []
    for first, length, count, shares, fate in asked:
        prompt = [first] * (length // 2) + [first + 1] * (length - length // 2)
        ear, running = ask(loop, Request(prompt, count, GREEDY, scope=SCOPE if shares else None))
        if fate == 0:
            loop.cancel(running)
        at_work.append((ear, prompt, count, fate))
    for ear, prompt, count, fate in at_work:
        tokens, end = ear.all()
        assert tokens == expected(prompt, count)[: len(tokens)]
        assert fate == 0 or (isinstance(end, Finished) and len(tokens) == count)
    stop(loop, executor)
