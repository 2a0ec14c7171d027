"""The step loop when something inside it goes wrong: the request at fault ends with a typed failure, nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from engine.executors.interface import F32, Span
from engine.prefix import block_hashes, scope_key
from engine.runtime.loop import Limits, Loop
from engine.runtime.sampling import NOTHING_SEEN, Sampling, draw, logprobs_of
from engine.runtime.sequences import Failure, Finished, FinishReason, Request, Running, Tokens
from tests.fakes.counting_executor import BLOCK, CountingExecutor, next_token, payload_of
from tests.fakes.ear import WAIT_S, Ear

ENDLESS = 1_000_000
"""Tokens nobody waits for: the fake takes longer for each one, so such a stream never ends by itself."""
GREEDY = Sampling(temperature=0)
SCOPE = scope_key("v", "t", BLOCK)
BAD = 200
"""A token after which the executor below gives NaN; outside its vocabulary, so it neither generates nor scores it."""


class PoisonedExecutor(CountingExecutor):
    """NaN logits after the token BAD; no memory to load the payload `unlucky`."""

    unlucky = b""

    def step(self, spans: Sequence[Span]) -> list[F32 | None]:
        results = super().step(spans)
        for span, logits in zip(spans, results, strict=True):
            for row, token in () if logits is None else zip(reversed(logits), reversed(span.token_ids), strict=False):
                if token == BAD:
                    row[5] = np.nan
        return results

    def write_page(self, page: int, payload: bytes) -> None:
        if payload == self.unlucky:
            raise MemoryError
        super().write_page(page, payload)


@pytest.fixture
def executor() -> PoisonedExecutor:
    return PoisonedExecutor()


@pytest.fixture
def loop(executor: PoisonedExecutor) -> Iterator[Loop]:
    loop = Loop(executor, Limits(step_rows=8))
    loop.start()
    yield loop
    loop.close()
    assert loop.join(WAIT_S), "the step thread did not end"


def ask(loop: Loop, prompt: list[int], count: int, **more: object) -> tuple[Ear, Running]:
    ear = Ear()
    return ear, loop.submit(Request(prompt, count, **({"sampling": GREEDY} | more)), ear)  # type: ignore[arg-type]


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def mate_survives(loop: Loop, poison: dict[str, object], prompt: list[int]) -> None:
    """A stream that runs beside the poisoned request is undisturbed, and so is the one after it."""
    mate, running = ask(loop, [1], ENDLESS)
    assert isinstance(mate.events.get(timeout=WAIT_S), Tokens)
    ear, _ = ask(loop, prompt, 3, **poison)
    assert ear.all()[1] is Failure.INTERNAL
    assert ear.events.empty(), "one end, told once"
    assert ask(loop, [2, 3], 4)[0].all()[0] == expected([2, 3], 4)
    loop.cancel(running)
    tokens, end = mate.all()
    assert end is Failure.CANCELLED and tokens == expected([1], len(tokens) + 1)[1:]
    assert (loop.load().running, loop.load().kv_used_bytes) == (0, 0)


def test_a_draw_that_fails_ends_its_own_request(loop: Loop) -> None:
    """An exception while sampling does not take the step thread down."""
    mate_survives(loop, {"sampling": Sampling(temperature=0, logit_bias={10**6: 1.0})}, [4, 5])


def test_logits_that_are_no_numbers_end_their_request(loop: Loop) -> None:
    """From NaN no token is drawn: any choice would be wrong, silently."""
    mate_survives(loop, {}, [4, BAD])


def test_scores_of_nan_end_their_request(loop: Loop) -> None:
    """Teacher forcing refuses NaN as well, and reports the failure once, however many spans the prompt has."""
    mate_survives(loop, {"score_from": 1}, [BAD] + [3] * 29)


def test_a_request_that_cannot_begin_ends_alone(loop: Loop, executor: PoisonedExecutor) -> None:
    """No memory for what was fetched for it: a failure of that request only, and no page is lost."""
    prompt = [4, 5, 6, 7, 8]
    executor.unlucky = payload_of(prompt, 0)
    name = block_hashes(SCOPE, prompt, BLOCK)[0]
    mate_survives(loop, {"scope": SCOPE, "prefix_blocks": {name: executor.unlucky}}, prompt)
    assert loop.pages.available == executor.page_count


def test_a_name_that_fails_at_the_start_ends_its_request(loop: Loop) -> None:
    """A scope that is no key is that request's failure."""
    mate_survives(loop, {"scope": b"x" * 65}, [4, 5, 6, 7, 8])


def test_blocks_that_cannot_be_handed_on_cost_no_token(loop: Loop) -> None:
    """Publishing is a favour to later requests: its failure changes neither the stream nor the thread."""
    told: list[bytes] = []

    def fail(name: bytes, read: object) -> None:
        told.append(name)
        raise RuntimeError("planted")

    tokens, end = ask(loop, [1, 2, 3, 4, 5], 12, scope=SCOPE, on_block=fail)[0].all()
    assert tokens == expected([1, 2, 3, 4, 5], 12) and isinstance(end, Finished)
    loop.close()
    assert loop.join(WAIT_S)
    assert len(told) == 1


def test_an_unforeseen_failure_ends_all_requests_but_not_the_thread(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks in the loop itself: everyone is told, and the next request works."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_plan", lambda: 1 / 0)
        assert ask(loop, [1], 3)[0].all()[1] is Failure.INTERNAL
    assert ask(loop, [1], 3)[0].all()[0] == expected([1], 3)


def test_a_failed_step_is_told_once(loop: Loop, executor: PoisonedExecutor) -> None:
    """A prompt with several spans in the failing step still has one end."""
    executor.before_step = lambda: 1 / 0
    ear, _ = ask(loop, [1] * 8, 3)
    assert ear.all()[1] is Failure.INTERNAL
    executor.before_step = lambda: None
    assert ask(loop, [1], 3)[0].all()[0] == expected([1], 3)
    assert ear.events.empty()


def test_nothing_to_generate_gives_nothing(loop: Loop) -> None:
    """max_tokens 0 means no token, not one for which no memory was reserved."""
    tokens, end = ask(loop, [1, 2, 3], 0)[0].all()
    assert tokens == [] and isinstance(end, Finished) and end.reason is FinishReason.LENGTH


def test_prefix_payloads_are_let_go_when_the_request_begins(loop: Loop) -> None:
    """While it runs, a prefix is in memory once: in the request's cache."""
    fetched = {block_hashes(SCOPE, [1, 2, 3, 4], BLOCK)[0]: payload_of([1, 2, 3, 4], 0)}
    ear, running = ask(loop, [1, 2, 3, 4, 5], ENDLESS, scope=SCOPE, prefix_blocks=fetched)
    first = ear.events.get(timeout=WAIT_S)
    assert isinstance(first, Tokens) and first.cached_tokens == BLOCK
    assert running.request.prefix_blocks == {}
    loop.cancel(running)


def test_many_decoding_requests_do_not_shut_out_a_new_one() -> None:
    """With as many streams as a step has rows, a new prompt still gets its block each step."""
    loop = Loop(CountingExecutor(), Limits(step_rows=4, max_running=16))
    loop.start()
    streams = [ask(loop, [n + 1], 9000) for n in range(6)]
    for ear, _ in streams:
        assert isinstance(ear.events.get(timeout=WAIT_S), Tokens)
    tokens, _ = ask(loop, [50, 51, 52, 53, 54, 55], 2)[0].all()
    assert tokens == expected([50, 51, 52, 53, 54, 55], 2)
    assert all(ear.events.qsize() < 8000 for ear, _ in streams), "the new one did not wait for the others' end"
    for _, running in streams:
        loop.cancel(running)
    loop.close()
    assert loop.join(WAIT_S)


@pytest.mark.parametrize("count", [1, 2, 5, 40, 41])
def test_the_best_are_those_of_a_full_sort(count: int) -> None:
    """Picking the top few without sorting the vocabulary changes no choice, ties included."""
    logits = np.random.default_rng(count).integers(0, 6, 40).astype(np.float32)
    full = np.argsort(-logits.astype(np.float64), kind="stable")[:count]
    assert [token for token, _ in logprobs_of(logits, 0, count).top] == full.tolist()
    seen = {draw(logits, Sampling(top_k=count, seed=seed, temperature=100.0), NOTHING_SEEN, 0) for seed in range(400)}
    assert seen <= set(full.tolist()) and (count > 5 or seen == set(full.tolist()))
