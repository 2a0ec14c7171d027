"""When a worker hands tokens over: firsts and ends at once, the rest within its pace, nothing lost or out of order."""

from __future__ import annotations

import asyncio

import pytest

from engine.runtime.sequences import Event, Failure, Finished, FinishReason, Tokens
from services.sparse_inference.handing import Outbox, Pace
from services.sparse_inference.settings import WorkerSettings

PACE = Pace(interval_s=0.03, messages_per_s=50, longest_s=0.25)
END = Finished(FinishReason.LENGTH, None, 1, 0, 1)


def token(number: int) -> Tokens:
    return Tokens((number,))


def streams(count: int) -> list[asyncio.Queue[Event]]:
    return [asyncio.Queue() for _ in range(count)]


def begun(count: int) -> tuple[Outbox, list[asyncio.Queue[Event]]]:
    """`count` streams whose first tokens went out at time 0."""
    outbox, queues = Outbox(PACE), streams(count)
    for queue in queues:
        outbox.add(queue, token(0), is_first=True)
    assert outbox.due(0.0) == [(queue, [token(0)]) for queue in queues]
    return outbox, queues


def test_a_first_token_never_waits_and_takes_nobody_along() -> None:
    """A new stream's first token goes out at once; tokens of the others wait for their time and lose nothing."""
    outbox, (old,) = begun(1)
    (new,) = streams(1)
    outbox.add(old, token(1), is_first=False)
    outbox.add(new, token(9), is_first=True)
    assert outbox.due(0.001) == [(new, [token(9)])]
    outbox.add(old, token(2), is_first=False)
    assert outbox.due(0.002) == []
    assert outbox.due(0.05) == [(old, [token(1), token(2)])]


@pytest.mark.parametrize("end", [END, Failure.CANCELLED, Failure.INTERNAL])
def test_an_end_goes_out_at_once_behind_its_tokens(end: Event) -> None:
    """Whatever ends a stream is handed over in the same turn, after what was still waiting of it."""
    outbox, (queue, other) = begun(2)
    outbox.add(queue, token(1), is_first=False)
    outbox.add(other, token(1), is_first=False)
    outbox.add(queue, end, is_first=False)
    assert outbox.due(0.001) == [(queue, [token(1), end])]


@pytest.mark.parametrize(
    ("count", "pause_s"), [(1, 0.03), (8, 0.16), (1000, 0.25)], ids=["interval", "rate", "longest"]
)
def test_the_pause_follows_the_number_of_streams_within_its_bounds(count: int, pause_s: float) -> None:
    """Few streams wait the interval, many as long as their messages' rate wants, none longer than the longest time."""
    outbox, queues = begun(count)
    for queue in queues:
        outbox.add(queue, token(1), is_first=False)
    assert outbox.due(pause_s - 0.001) == []
    assert len(outbox.due(pause_s + 0.001)) == count


def test_a_pace_of_nothing_hands_over_every_turn() -> None:
    """With both times set to 0 every turn's tokens are a message of their own."""
    outbox, (queue,) = Outbox(WorkerSettings(stream_interval_ms=0, stream_longest_ms=0).pace), streams(1)
    for number in range(3):
        outbox.add(queue, token(number), is_first=number == 0)
        assert outbox.due(0.0) == [(queue, [token(number)])]
