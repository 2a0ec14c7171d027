"""Guesses the next tokens of a sequence from its own text, and decides whether guessing pays.

Prompt lookup (arXiv 2304.04487 verifies drafts; here the draft is what followed the same few tokens earlier in prompt
or output). A draft costs rows of the next step and never changes a token: the loop accepts exactly what it would have
drawn anyway. Decisions are made from numbers passed in; the loop owns the clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

INDEXED_TOKENS = 32_768
"""Of a longer prompt only the last this many tokens are searched: about 100 bytes of index per token."""

TOKENS_PER_STEP = 1024
"""Indexed at once: about a millisecond."""


class PromptLookup:
    """Index of a growing token list: O(1) per token. Reads the list it was made for; call `advance` as that grows."""

    def __init__(self, tokens: Sequence[int], match: int) -> None:
        self._tokens, self._match = tokens, match
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = max(0, len(tokens) - INDEXED_TOKENS)
        self._found: int | None = None

    def advance(self) -> None:
        """Takes note of the tokens added since the last call, of at most so many: a long prompt takes several steps."""
        tokens, match = self._tokens, self._match
        until = min(len(tokens), self._seen + TOKENS_PER_STEP)
        for end in range(max(self._seen + 1, match), until + 1):
            key = tuple(tokens[end - match : end])
            self._found = self._ends.get(key)
            if len(self._ends) < 2 * INDEXED_TOKENS or key in self._ends:
                self._ends[key] = end
        self._seen = until

    @property
    def has_match(self) -> bool:
        """The last tokens occurred before."""
        return self._found is not None and self._seen == len(self._tokens)

    def draft(self, count: int) -> list[int]:
        """At most `count` tokens that may come next; empty when the last tokens never occurred before."""
        start = self._found
        if start is None or not self.has_match or count < 1:
            return []
        tokens, length = self._tokens, len(self._tokens)
        period = length - start  # past the end of the list the guess repeats itself
        return [tokens[start + offset % period] for offset in range(count)]


@dataclass(slots=True)
class DraftController:
    """Of one sequence: how many tokens to draft. Follows how often drafts were right and what a row costs."""

    most: int
    right: float = 2.0
    """Decayed counts of accepted drafts and of drafts that ended a run; these are the guess before any was tried."""
    wrong: float = 1.0
    rest: int = 0
    """Tokens to generate before the next probe, while drafting does not pay."""
    pause: int = 8

    def wanted(self, step_s: float, row_s: float, decoding: int) -> int:
        """Draft length for the next step of `decoding` sequences that takes `step_s`, each further row `row_s`.

        The i-th draft token is accepted with probability q^i and then saves its share of a step, so it pays while
        q^i · step_s / decoding exceeds row_s.
        """
        chance = self.right / (self.right + self.wrong)
        threshold = row_s * decoding / step_s
        if threshold < chance:
            self.pause = 8
            return max(1, min(self.most, int(math.log(max(threshold, 1e-9)) / math.log(min(chance, 0.999)))))
        if self.rest > 0:
            self.rest -= 1
            return 0
        self.pause = min(2 * self.pause, 512)
        self.rest = self.pause
        return min(2, self.most)

    def learn(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right."""
        if drafted:
            self.right = 0.9 * self.right + accepted
            self.wrong = 0.9 * self.wrong + (1.0 if accepted < drafted else 0.0)
