"""What is drawn: speculation changes no token, constraints and minimum lengths hold, in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.runtime.constraints import Compiler, CompilerLimits, Constraint
from engine.runtime.loop import Limits, Loop
from engine.runtime.sampling import Sampling
from engine.runtime.sequences import Failure, Finished, FinishReason, Request, Tokens
from tests.fakes.counting_executor import VOCABULARY, CountingExecutor
from tests.fakes.ear import WAIT_S, Ear
from tests.fakes.small_tokenizer import END, text_of, tokenizer_json, tokens_of

GREEDY = Sampling(temperature=0)
SEEDED = Sampling(temperature=25.0, seed=11, presence_penalty=0.3, frequency_penalty=0.2, repetition_penalty=1.2)


def repeats(value: int, token: int) -> int:
    """A text that goes round in a circle of nine."""
    return (token + 1) % 9


def sometimes(value: int, token: int) -> int:
    """A text that repeats itself most of the time."""
    return value % VOCABULARY if value % 7 == 0 else (token + 1) % 9


class Tick:
    """A clock on which a step takes as long as its rows say."""

    def __init__(self, executor: CountingExecutor, base: float, row: float) -> None:
        self._executor, self._base, self._row = executor, base, row

    def __call__(self) -> float:
        return self._base * len(self._executor.steps) + self._row * sum(self._executor.steps)


def run(
    requests: list[Request],
    follow: Callable[[int, int], int],
    limits: Limits,
    base: float = 0.03,
    row: float = 0.0001,
) -> tuple[list[tuple[list[Tokens], Finished | Failure]], CountingExecutor, Loop]:
    executor = CountingExecutor(follow=follow)
    loop = Loop(executor, limits, clock=Tick(executor, base, row))
    ears = [Ear() for _ in requests]
    for request, ear in zip(requests, ears, strict=True):
        loop.submit(request, ear)
    loop.start()
    heard = []
    for ear in ears:
        tokens: list[Tokens] = []
        while isinstance(event := ear.events.get(timeout=WAIT_S), Tokens):
            tokens.append(event)
        heard.append((tokens, event))
    loop.close()
    assert loop.join(WAIT_S)
    assert loop.pages.available == executor.page_count, "a page was lost"
    return heard, executor, loop


def flat(tokens: list[Tokens]) -> tuple[list[int], list[object]]:
    return [token for each in tokens for token in each.token_ids], [score for each in tokens for score in each.logprobs]


@pytest.mark.parametrize(
    "follow", [repeats, sometimes, lambda value, _: value % VOCABULARY], ids=["repeat", "mix", "not"]
)
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "sampled"])
def test_speculation_changes_no_token(sampling: Sampling, follow: Callable[[int, int], int]) -> None:
    """Tokens, log-probabilities, ends and counts are the same with and without drafts."""
    requests = [
        Request([n, 1, 2, 3], 60, sampling, logprobs=True, top_logprobs=2, min_tokens=20 if n == 2 else 0,
                stop_token_ids=frozenset({8} if n == 2 else ()))
        for n in range(4)
    ]  # fmt: skip
    plain, _, _ = run(requests, follow, Limits())
    drafted, _, loop = run(requests, follow, Limits(max_draft=8, draft_match=2))
    for (tokens, end), (other, other_end) in zip(plain, drafted, strict=True):
        assert flat(tokens) == flat(other) and end == other_end
    if follow is repeats and sampling is GREEDY:
        load = loop.load()
        assert load.accepted_tokens > 100 and load.draft_tokens < 2 * load.accepted_tokens


def test_speculation_saves_steps_where_it_pays_and_rows_where_it_does_not() -> None:
    """A text that repeats itself takes less than half the steps; where rows cost as much as steps, few are drafted."""
    request = [Request([1, 2], 200, GREEDY)]
    _, plain, _ = run(request, repeats, Limits())
    _, drafted, _ = run(request, repeats, Limits(max_draft=8))
    assert len(drafted.steps) < len(plain.steps) / 2
    _, _, cheap = run(request, sometimes, Limits(max_draft=8, draft_match=2))
    _, _, dear = run(request, sometimes, Limits(max_draft=8, draft_match=2), base=0.0001, row=0.03)
    assert cheap.load().accepted_tokens > 30 and dear.load().draft_tokens < cheap.load().draft_tokens / 3


def test_no_end_is_drawn_before_the_least_length() -> None:
    """min_tokens keeps the end and stop tokens out until then; a resumed stream counts what was sent."""
    ends = frozenset({4})
    [(tokens, end)], _, _ = run([Request([1, 2], 40, GREEDY, end_token_ids=ends)], repeats, Limits())
    assert flat(tokens)[0] == [3] and isinstance(end, Finished) and end.stop_token_id == 4
    long = Request([1, 2], 40, GREEDY, end_token_ids=ends, min_tokens=5)
    [(tokens, end)], _, _ = run([long], repeats, Limits())
    whole, _ = flat(tokens)
    assert len(whole) >= 5 and 4 not in whole and isinstance(end, Finished) and end.reason is FinishReason.STOP
    resumed = Request([1, 2, *whole[:3]], 37, GREEDY, end_token_ids=ends, min_tokens=5, resumed_tokens=3)
    [(tokens, _)], _, _ = run([resumed], repeats, Limits())
    assert whole[:3] + flat(tokens)[0] == whole


def source() -> Compiler:
    return Compiler(tokenizer_json, VOCABULARY, [END], CompilerLimits())


@pytest.mark.parametrize("draft", [0, 6])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "sampled"])
def test_an_answer_keeps_to_its_constraint(sampling: Sampling, draft: int) -> None:
    """Whatever the model prefers, the text is in the language and ends by itself; with drafts it is the same text."""
    compiler = source()
    constraint = Constraint("regex", "(ab){3}-[0-9]{4}(, (ab){3}-[0-9]{4}){3}")

    def request(**more: object) -> Request:
        matcher = compiler.compile(constraint, more.pop("emitted", ()))  # type: ignore[arg-type]
        values: dict[str, object] = {"token_ids": [1, 2], "max_tokens": 100} | more
        ends = frozenset({END})
        return Request(sampling=sampling, matcher=matcher, end_token_ids=ends, **values)  # type: ignore[arg-type]

    [(tokens, end)], _, _ = run([request()], sometimes, Limits(max_draft=draft, draft_match=2))
    whole, _ = flat(tokens)
    assert isinstance(end, Finished) and end.reason is FinishReason.STOP
    assert compiler.compile(constraint).allowed(whole) == len(whole) == 4 * 11 + 3 * 2 and text_of(whole)[6] == "-"
    [(plain, _)], _, _ = run([request()], sometimes, Limits())
    assert flat(plain)[0] == whole
    for cut in (1, 9, 30):
        rest = request(emitted=whole[:cut], token_ids=[1, 2, *whole[:cut]], resumed_tokens=cut)
        [(tokens, _)], _, _ = run([rest], sometimes, Limits(max_draft=draft, draft_match=2))
        assert whole[:cut] + flat(tokens)[0] == whole, "resumed"


def test_a_constraint_that_is_fulfilled_ends_even_before_the_least_length() -> None:
    """Nothing but the end is allowed any more, so the end it is."""
    matcher = source().compile(Constraint("regex", "ab?"), tokens_of("a"))
    request = Request([5, *tokens_of("a")], 9, GREEDY, matcher=matcher, resumed_tokens=1, min_tokens=8)
    [(tokens, end)], _, _ = run([request], repeats, Limits())
    assert text_of(flat(tokens)[0]) == "b" and isinstance(end, Finished) and end.reason is FinishReason.STOP


def test_constrained_and_free_streams_share_steps() -> None:
    """A mask belongs to its own request only."""
    matcher = source().compile(Constraint("regex", "[x-z]{12}"))
    free, held = Request([1, 2], 12, GREEDY), Request([1, 2], 12, GREEDY, matcher=matcher)
    [(one, _), (two, _)], executor, _ = run([free, held], repeats, Limits())
    assert flat(one)[0] == [(3 + n) % 9 for n in range(12)]
    assert set(text_of(flat(two)[0])) <= set("xyz") and len(flat(two)[0]) == 12 and 2 in executor.steps
