"""What the step thread has for the callers and does not hand over yet, and when it must: fewer messages, same tokens.

Every message costs the whole mesh some two milliseconds of processor time on its way, which a worker on the same
processors lacks. So tokens that follow soon after others of their stream share a message: at low load those within
`interval_s`, under more streams as many as keep all messages of the worker within `messages_per_s`, but none waits
longer than `longest_s`. First tokens and ends never wait. Pure: time is passed in; belongs to the step thread.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from engine.runtime.sequences import Event, Tokens

Queue = asyncio.Queue[Event]
Heard = list[tuple[Queue, list[Event]]]


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a worker speaks. The three settings of this name."""

    interval_s: float
    messages_per_s: float
    longest_s: float

    def pause_s(self, messages: int) -> float:
        """Time to wait after so many messages were sent at once."""
        return max(self.interval_s, min(self.longest_s, messages / self.messages_per_s))


class Outbox:
    """Events by stream, in order."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._waiting: dict[Queue, list[Event]] = {}
        self._urgent: set[Queue] = set()
        self._next = float("-inf")

    def add(self, queue: Queue, event: Event, *, is_first: bool) -> None:
        """`is_first`: nothing of this stream was heard before."""
        self._waiting.setdefault(queue, []).append(event)
        if is_first or not isinstance(event, Tokens):
            self._urgent.add(queue)

    def due(self, now: float) -> Heard:
        """What is to be handed over after this turn; those who cannot wait go without the others."""
        if not self._waiting:
            return []
        if now >= self._next:
            heard = list(self._waiting.items())
            self._waiting.clear()
            self._next = now + self._pace.pause_s(len(heard))
        else:
            heard = [(queue, self._waiting.pop(queue)) for queue in self._urgent]
        self._urgent.clear()
        return heard
