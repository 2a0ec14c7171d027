"""Speculative decoding as the step loop uses it: who drafts how much in the next step, and what became of it.

Which tokens and whether it pays are `speculation`'s; this joins them to requests, their constraints and the cost of a
step. Belongs to the step thread.
"""

from __future__ import annotations

from engine.runtime.constraints import ConstraintError
from engine.runtime.sequences import Running
from engine.runtime.speculation import DraftController, PromptLookup
from engine.runtime.step_cost import StepCost


class Drafting:
    """At most `max_draft` tokens a request and step, 0 turns it off; `match` tokens must repeat before one is tried."""

    def __init__(self, max_draft: int, match: int) -> None:
        self._max_draft, self._match = max_draft, match
        self.drafts = self.tokens = self.accepted = 0
        """Drafts tried, tokens in them, and those of them that were right, since the start."""

    def begin(self, sequence: Running) -> None:
        """A request begins."""
        if self._max_draft and not sequence.is_scoring:
            sequence.lookup = PromptLookup(sequence.tokens, self._match)
            sequence.drafts = DraftController(self._max_draft)

    def propose(self, sequence: Running, decoding: int, cost: StepCost) -> list[int]:
        """Tokens that may follow; `decoding` requests decode in the same step."""
        lookup, control = sequence.lookup, sequence.drafts
        if lookup is None or control is None or sequence.pending != 1 or not lookup.has_match:
            return []
        most = min(
            control.wanted(cost.predict(decoding, 0), cost.decode_row_s, decoding),
            sequence.request.max_tokens - sequence.produced - 1,
        )
        draft = lookup.draft(most)
        if draft and sequence.request.matcher is not None:
            try:
                draft = draft[: sequence.request.matcher.allowed(draft)]
            except ConstraintError:  # told when a token is drawn; until then it drafts no more
                sequence.lookup, draft = None, []
        return draft

    def learn(self, sequence: Running, drafted: int, accepted: int) -> None:
        """After a step of a decoding request: what it drafted, and how much of that was right."""
        if drafted and sequence.drafts is not None:
            sequence.drafts.learn(drafted, accepted)
            self.drafts += 1
            self.tokens += drafted
            self.accepted += accepted
        if sequence.lookup is not None:
            sequence.lookup.advance()
