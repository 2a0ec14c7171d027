"""What the next step computes: a pure decision about rows, made from what each sequence needs and what a step costs.

Decoding goes first, one row each. Prefill, oldest first, fills up as long as the predicted step stays within a factor
of a step without it, so a long prompt slows the other streams by that factor at most; some prefill always goes, but for
a rare step that shows what decoding alone takes by now. Draft tokens come last: they are a gamble, and take only rows
that nobody needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.runtime.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class Need:
    """One running sequence: tokens not yet computed (1 when it decodes), and draft tokens it would add."""

    pending: int
    drafts: int = 0
    all_logits: bool = False
    """Every row wants logits (scoring), which costs memory."""

    @property
    def is_decode(self) -> bool:
        return self.pending == 1 and not self.all_logits


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of one step."""

    max_rows: int
    logit_rows: int
    slowdown: float
    """A step with prefill may take this many times a step without, while someone decodes."""
    least_prefill_rows: int


def plan(needs: Sequence[Need], cost: StepCost, budget: Budget, turn: int = 0) -> list[int]:
    """Rows for each of `needs`, in order; 0 when it must wait. Oldest sequences come first.

    Prefill keeps a few rows even when decoding alone could fill the step, else new prompts would be shut out; when not
    all can decode, they take turns (`turn` counts steps).
    """
    rows = [0] * len(needs)
    decoders = [index for index, need in enumerate(needs) if need.is_decode]
    kept = min(budget.least_prefill_rows, budget.max_rows // 2) if len(decoders) < len(needs) else 0
    decoding = min(len(decoders), budget.max_rows - kept)
    first = turn % len(decoders) if decoding < len(decoders) else 0
    for number in range(decoding):
        rows[decoders[(first + number) % len(decoders)]] = 1
    left, logits_left = budget.max_rows - decoding, budget.logit_rows - decoding
    prefill = _prefill_rows(decoding, cost, budget)
    for index, need in enumerate(needs):
        if need.is_decode or prefill <= 0 or left <= 0:
            continue
        granted = min(need.pending, prefill, left)
        if need.all_logits:
            granted = min(granted, max(logits_left, 1))
            logits_left -= granted
        rows[index] = granted
        prefill -= granted
        left -= granted
    for index, need in enumerate(needs):
        if need.is_decode and rows[index] and need.drafts and left > 0 and logits_left > 0:
            granted = min(need.drafts, left, logits_left)
            rows[index] += granted
            left -= granted
            logits_left -= granted
    return rows


def _prefill_rows(decoding: int, cost: StepCost, budget: Budget) -> int:
    """Rows of prefill that may join `decoding` rows."""
    if not decoding:
        return budget.max_rows
    if cost.is_stale:
        return 0  # once in a while: the next step has prefill again
    allowed_s = (budget.slowdown - 1.0) * cost.predict(decoding, 0)
    return max(budget.least_prefill_rows, int(allowed_s / cost.prefill_row_s))
