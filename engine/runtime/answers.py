"""From a step's logits to what a request is told: tokens drawn, with their scores, or the scores of tokens given.

The step loop calls it for each request of a step. It changes the request's text and counts and nothing else: pages,
drafting's figures and listeners are the loop's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.checkpoints.known_tokens import KnownTokens
from engine.executors.interface import F32
from engine.runtime.sampling import Logprobs, draw, logprobs_of, without
from engine.runtime.sequences import FinishReason, Running, Tokens


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one step gave a generation."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    accepted: int
    """Drafted tokens that were what was drawn."""
    end: tuple[FinishReason, int | None] | None
    """Why the answer is complete, and the stop token if one was drawn."""


class Answers:
    """Draws and scores among the ids that are tokens."""

    def __init__(self, known: KnownTokens) -> None:
        self._known = known
        self._allowed = without(known.holes, known.size) if known.holes else None

    def draw(self, sequence: Running, drafts: list[int], logits: F32) -> Drawn:
        """Draws a token from each row as long as the row's draft was what was drawn.

        Raises ConstraintError, ValueError or FloatingPointError.
        """
        logits = logits[:, : self._known.size]
        request, matcher = sequence.request, sequence.request.matcher
        made: list[int] = []
        scores: list[Logprobs] = []
        end: tuple[FinishReason, int | None] | None = None
        accepted = 0
        for row in range(1 + len(drafts)):
            if sequence.produced >= request.max_tokens:
                end = (FinishReason.LENGTH, None)
                break
            row_logits, position = logits[row], sequence.position
            token = draw(
                row_logits,
                request.sampling,
                sequence.seen,
                position,
                self._allowed if matcher is None else matcher.mask(),
                sequence.endings if position < request.min_tokens else (),
            )
            if token in sequence.endings:
                end = (FinishReason.STOP, token)
                break
            if matcher is not None:
                matcher.advance(token)
            if request.logprobs:
                scores.append(self._logprobs(row_logits, token, request.top_logprobs))
            made.append(token)
            sequence.tokens.append(token)
            if request.sampling.has_penalties:
                sequence.seen.add(token)
            if matcher is not None and matcher.is_complete:
                end = (FinishReason.STOP, None)
                break
            if row == len(drafts) or token != drafts[row]:
                break
            accepted += 1
            sequence.computed += 1  # the draft's keys and values are this token's
        if end is None and sequence.produced >= request.max_tokens:
            end = (FinishReason.LENGTH, None)
        return Drawn(tuple(made), tuple(scores), accepted, end)

    def score(self, sequence: Running, start: int, logits: F32) -> Tokens | None:
        """Row i of `logits` predicts the token at start + i + 1; None when none of those is to be told."""
        logits = logits[:, : self._known.size]
        tokens = sequence.tokens
        ids: list[int] = []
        scores: list[Logprobs] = []
        for row in range(len(logits)):
            position = start + row + 1
            if sequence.scored <= position < len(tokens):
                ids.append(tokens[position])
                scores.append(self._logprobs(logits[row], tokens[position], sequence.request.top_logprobs))
                sequence.scored = position + 1
        return Tokens(tuple(ids), tuple(scores)) if ids else None

    def _logprobs(self, logits: F32, token: int, top: int) -> Logprobs:
        found, holes = logprobs_of(logits, token, top), self._known.holes
        return replace(found, top=tuple(each for each in found.top if each[0] not in holes)) if holes else found
