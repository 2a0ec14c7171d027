"""The step loop: right tokens in any company, bounded, cancellable, and alive after a failed step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest

from engine.prefix import block_hashes, scope_key
from engine.runtime.loop import Closed, Limits, Loop, QueueFull, TooLong
from engine.runtime.sampling import Sampling
from engine.runtime.sequences import Failure, Finished, FinishReason, Request, Running, Tokens
from tests.fakes.counting_executor import BLOCK, CountingExecutor, next_token, payload_of
from tests.fakes.ear import WAIT_S, Ear

GREEDY = Sampling(temperature=0)
ENDLESS = 1_000_000
"""Tokens nobody waits for: the fake takes longer for each one, so such a stream never ends by itself."""


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@pytest.fixture
def started() -> Iterator[list[Loop]]:
    loops: list[Loop] = []
    yield loops
    for loop in loops:
        loop.close()
        assert loop.join(WAIT_S), "the step thread did not end"


def make(started: list[Loop], executor: CountingExecutor, **limits: int) -> Loop:
    loop = Loop(executor, Limits(**limits))
    loop.start()
    started.append(loop)
    return loop


def ask(loop: Loop, prompt: list[int], count: int, **more: object) -> tuple[Ear, Running]:
    ear = Ear()
    return ear, loop.submit(Request(prompt, count, GREEDY, **more), ear)  # type: ignore[arg-type]


def test_many_requests_at_once_get_what_each_would_get_alone(started: list[Loop]) -> None:
    """20 requests of all lengths over 4 slots: every stream is exactly its own."""
    loop = make(started, CountingExecutor(), max_running=4, step_rows=8)
    prompts = [[n % 90 + 1] * (n % 23 + 1) for n in range(20)]
    ears = [ask(loop, prompt, n % 7 + 1)[0] for n, prompt in enumerate(prompts)]
    for n, (ear, prompt) in enumerate(zip(ears, prompts, strict=True)):
        tokens, end = ear.all()
        assert tokens == expected(prompt, n % 7 + 1)
        assert isinstance(end, Finished) and end.reason is FinishReason.LENGTH
        assert (end.prompt_tokens, end.completion_tokens) == (len(prompt), len(tokens))


def test_an_end_token_stops_and_is_not_part_of_the_answer(started: list[Loop]) -> None:
    """The model's end and the caller's stop tokens end with STOP and name the token."""
    loop = make(started, CountingExecutor())
    path = expected([5, 6], 4)
    tokens, end = ask(loop, [5, 6], 10, end_token_ids=frozenset({path[2]}))[0].all()
    assert isinstance(end, Finished)
    assert (tokens, end.reason, end.stop_token_id) == (path[:2], FinishReason.STOP, path[2])
    tokens, _ = ask(loop, [5, 6], 10, stop_token_ids=frozenset({path[1]}))[0].all()
    assert tokens == path[:1]


def test_cached_blocks_are_not_computed_again(started: list[Loop]) -> None:
    """With two leading blocks given, only the rest is prefilled; the tokens are the same; new blocks are published."""
    executor = CountingExecutor()
    scope = scope_key("v", "t", BLOCK)
    prompt = list(range(1, 12))
    fetched = {name: payload_of(prompt, n) for n, name in enumerate(block_hashes(scope, prompt, BLOCK))}
    tokens, end = ask(make(started, executor), prompt, 6, scope=scope, prefix_blocks=fetched)[0].all()
    assert tokens == expected(prompt, 6) and isinstance(end, Finished) and end.cached_tokens == 2 * BLOCK
    assert executor.computed_tokens == len(prompt) - 2 * BLOCK + 5


def test_pages_of_a_finished_request_serve_the_next_one(started: list[Loop]) -> None:
    """The same prompt again skips its whole blocks without any copy; without the same scope nothing is shared."""
    executor = CountingExecutor()
    loop = make(started, executor)
    prompt = list(range(1, 12))
    scopes = [scope_key("v", tenant, BLOCK) for tenant in ("t", "t", "u")]
    hits = []
    for scope in [*scopes, None]:
        tokens, end = ask(loop, prompt, 6, scope=scope)[0].all()
        assert tokens == expected(prompt, 6) and isinstance(end, Finished)
        hits.append(end.cached_tokens)
    assert hits == [0, 2 * BLOCK, 0, 0] and executor.reads == 0
    assert loop.load().kv_used_bytes == 0 and loop.load().kv_kept_bytes == 8 * executor.page_bytes


def test_new_blocks_are_handed_on_once(started: list[Loop]) -> None:
    """Every block a request completes, prompt and answer, is offered with its payload; a known one is not again."""
    loop = make(started, CountingExecutor())
    scope = scope_key("v", "t", BLOCK)
    told: queue.Queue[tuple[bytes, bytes]] = queue.Queue()
    prompt = list(range(1, 12))
    for _ in range(2):
        tokens, _end = ask(loop, prompt, 6, scope=scope, on_block=lambda name, read: told.put((name, read())))[0].all()
    loop.close()
    assert loop.join(WAIT_S)
    text = prompt + tokens
    names = block_hashes(scope, text[:-1], BLOCK)
    assert list(told.queue) == [(name, payload_of(text, n)) for n, name in enumerate(names)]


def test_a_bad_cached_block_is_recomputed(started: list[Loop]) -> None:
    """A block the executor cannot use costs time, not correctness."""
    loop = make(started, CountingExecutor())
    scope = scope_key("v", "t", BLOCK)
    names = block_hashes(scope, [1, 2, 3, 4], BLOCK)
    tokens, end = ask(loop, [1, 2, 3, 4, 5, 6], 3, scope=scope, prefix_blocks={names[0]: b"wrong size"})[0].all()
    assert tokens == expected([1, 2, 3, 4, 5, 6], 3) and isinstance(end, Finished) and end.cached_tokens == 0


def test_a_resumed_request_goes_on_exactly(started: list[Loop]) -> None:
    """Prompt plus tokens already sent gives the rest of the undisturbed stream, sampled or not."""
    loop = make(started, CountingExecutor())
    sampling = Sampling(temperature=60.0, seed=3)  # hot enough that the draw matters
    ear = Ear()
    loop.submit(Request([3, 1, 4], 12, sampling), ear)
    whole, _ = ear.all()
    ear = Ear()
    loop.submit(Request([3, 1, 4, *whole[:5]], 7, sampling, resumed_tokens=5), ear)
    rest, end = ear.all()
    assert whole[:5] + rest == whole and isinstance(end, Finished) and end.completion_tokens == 12


def test_cancelling_frees_the_slot_before_the_next_step(started: list[Loop]) -> None:
    """With one slot, a cancelled request gives way; at most the step under way is still computed for it."""
    executor = CountingExecutor()
    loop = make(started, executor, max_running=1)
    ear, running = ask(loop, [1], ENDLESS)
    assert isinstance(ear.events.get(timeout=WAIT_S), Tokens)
    loop.cancel(running)
    after, end = ask(loop, [2], 3)[0].all()
    assert after == expected([2], 3) and isinstance(end, Finished)
    assert ear.all()[1] is Failure.CANCELLED


def test_a_full_queue_refuses_at_once(started: list[Loop]) -> None:
    """One running, one waiting, the third is refused; nothing hangs."""
    gate = threading.Event()
    executor = CountingExecutor(before_step=lambda: gate.wait(WAIT_S) and None)
    loop = make(started, executor, max_running=1, max_waiting=1)
    first, _ = ask(loop, [1], 2)
    deadline = time.monotonic() + WAIT_S
    while loop.load().running == 0 and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    second, _ = ask(loop, [2], 2)
    with pytest.raises(QueueFull):
        ask(loop, [3], 2)
    with pytest.raises(TooLong, match="memory"):
        ask(loop, [3], 20_000_000)
    gate.set()
    assert first.all()[0] == expected([1], 2) and second.all()[0] == expected([2], 2)


def test_an_expired_request_is_dropped_before_its_prefill(started: list[Loop]) -> None:
    """Nobody waits for it any more, so nothing is computed for it."""
    executor = CountingExecutor()
    loop = make(started, executor)
    _, end = ask(loop, [1] * 50, 5, deadline=time.monotonic() - 1)[0].all()
    assert end is Failure.EXPIRED and executor.computed_tokens == 0


def test_a_failed_step_ends_its_requests_and_nothing_else(started: list[Loop]) -> None:
    """An exception inside the executor is a typed failure for those in the step; the next request works."""
    failures = iter([True])

    def fail_once() -> None:
        if next(failures, False):
            raise RuntimeError("planted")

    loop = make(started, CountingExecutor(before_step=fail_once))
    assert ask(loop, [1], 3)[0].all()[1] is Failure.INTERNAL
    assert ask(loop, [1], 3)[0].all()[0] == expected([1], 3)


def test_a_long_prompt_does_not_stall_the_others(started: list[Loop]) -> None:
    """While 400 tokens are prefilled in steps of 8 rows, a decoding stream still gets a token each step."""
    executor = CountingExecutor()
    loop = make(started, executor, step_rows=8)
    stream, running = ask(loop, [1], ENDLESS)
    assert isinstance(stream.events.get(timeout=WAIT_S), Tokens)
    ask(loop, [2] * 400, 1)[0].all()
    loop.cancel(running)
    tokens, _ = stream.all()
    assert max(executor.steps) <= 8 and len(tokens) >= 400 // 8


def test_scoring_reports_every_position(started: list[Loop]) -> None:
    """Teacher forcing gives one log-probability per token from the first position asked for."""
    loop = make(started, CountingExecutor())
    ids = [9, *expected([9], 10)]
    ear = Ear()
    loop.submit(Request(ids, 0, score_from=1, top_logprobs=2), ear)
    scores = []
    while isinstance(event := ear.events.get(timeout=WAIT_S), Tokens):
        scores += event.logprobs
    assert [entry.chosen[0] for entry in scores] == ids[1:]
    assert all(entry.chosen[1] > -0.01 and len(entry.top) == 2 for entry in scores)


def test_a_closed_loop_finishes_its_work_and_refuses_more(started: list[Loop]) -> None:
    """Draining: what was accepted ends well, new requests are told to go elsewhere."""
    loop = make(started, CountingExecutor())
    ear, _ = ask(loop, [1], 30)
    loop.close()
    with pytest.raises(Closed):
        ask(loop, [2], 1)
    assert ear.all()[0] == expected([1], 30)


def test_streams_keep_their_pace_while_long_prompts_arrive(started: list[Loop]) -> None:
    """Eight decode while prompts of 2,048 tokens come in: no step takes twice a quiet one, and the prompts get done."""
    executor = CountingExecutor()

    def seconds(rows: int) -> float:
        return 0.030 + 0.0004 * rows

    def clock() -> float:
        return sum(map(seconds, executor.steps))

    loop = Loop(executor, Limits(), clock=clock)
    loop.start()
    started.append(loop)
    streams = [ask(loop, [n + 1] * 64, ENDLESS) for n in range(8)]
    for ear, _ in streams:
        ear.first()
    quiet = len(executor.steps)
    for n in range(3):
        assert ask(loop, [n + 20] * 2048, 2)[0].all()[0] == expected([n + 20] * 2048, 2)
    busy = [rows for rows in executor.steps[quiet : len(executor.steps)] if rows > 9]  # not those between two prompts
    for _, running in streams:
        loop.cancel(running)
    assert max(map(seconds, busy)) <= 2 * seconds(8)
    assert len(busy) < 3 * 2048 / 40, "the budget is used"
