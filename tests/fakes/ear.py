"""Hears what the step loop tells about one request."""

from __future__ import annotations

import queue

from engine.runtime.sequences import Event, Failure, Finished, Tokens

WAIT_S = 20


class Ear:
    """A listener. `first` and `all` wait for what they return."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def first(self) -> Tokens:
        """The next event, which must be tokens."""
        event = self.events.get(timeout=WAIT_S)
        assert isinstance(event, Tokens), event
        return event

    def all(self) -> tuple[list[int], Finished | Failure]:
        """Every token still to come, and the end."""
        tokens: list[int] = []
        while isinstance(event := self.events.get(timeout=WAIT_S), Tokens):
            tokens += event.token_ids
        return tokens, event
