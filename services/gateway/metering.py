"""What a request has used so far, in tokens: its prompts once each, and what each choice has brought.

A prompt counts as soon as one of its choices has been answered. The caller also pays for the prompts it had asked a
worker for when it goes away; what the mesh fails to do before the first token costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


class Meter:
    """Choice k of prompt p is p × `choices` + k, as in `Request`."""

    def __init__(self, prompts: Sequence[int], choices: int) -> None:
        """`prompts` are their lengths in tokens."""
        self._prompts, self._choices = tuple(prompts), choices
        self._asked: set[int] = set()
        self._received: dict[int, int] = {}

    def asked(self, choice: int) -> None:
        """A worker is about to be asked for this choice."""
        self._asked.add(choice)

    def received(self, choice: int, tokens: int) -> None:
        """This choice has brought `tokens` in all, so far or at its end."""
        self._received[choice] = tokens

    def used(self, *, has_left: bool) -> int:
        """Tokens used. `has_left`: the caller went away."""
        counted = self._received.keys() | self._asked if has_left else self._received.keys()
        return sum(self._received.values()) + sum(
            self._prompts[p] for p in {choice // self._choices for choice in counted}
        )
