"""Chooses the worker for a request: filter, score, pick. A pure function of what it is given.

The picker calls it, the flight recorder keeps its inputs, the replay calls it again. No clock, no randomness, no ids,
no I/O in here: equal inputs give equal decisions, to the last bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.policy import Policy

FILTERS = ("hint", "subset", "model", "variant", "context", "draining", "saturated")
"""Reasons to reject a replica, in the order they are tried. The further a replica got, the more its reason says."""

NO_REPLICA = "no_replica"
"""The refusal when nothing was registered at all."""


@dataclass(frozen=True, slots=True)
class Request:
    """What placement may know of a request. No text, no token ids."""

    prompt_tokens: int = 0
    """0 when the body was not read (another method, a compressed message)."""
    max_tokens: int = 0
    """0 means what the context leaves."""
    model: str = ""
    """Empty accepts any."""
    variant_digest: str = ""
    """Empty accepts any."""
    subset_labels: tuple[tuple[str, str], ...] = ()
    """Labels the route demands, sorted."""
    subset_hint: tuple[str, ...] | None = None
    """Endpoints the proxy allows; None allows all, () allows none."""
    deadline_ms: int = 0
    """Time the caller has left; 0 when there is no deadline."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica as it stood at the moment of the decision."""

    replica_id: str
    endpoint: str
    model: str
    variant_digest: str
    labels: tuple[tuple[str, str], ...] = ()
    draining: bool = False
    max_running: int = 1
    max_waiting: int = 0
    running: int = 0
    waiting: int = 0
    in_flight: int = 0
    """Requests sent there by this scheduler and not finished."""
    in_flight_at_report: int = 0
    """The same, at the moment the load report came."""
    pending_prefill_tokens: int = 0
    kv_used_bytes: int = 0
    kv_capacity_bytes: int = 0
    kv_bytes_per_token: int = 0
    context_tokens: int = 0
    """0 when unknown."""
    block_tokens: int = 1
    matched_blocks: int = 0
    """Leading blocks of the prompt it is believed to hold."""
    reported_ns: int = 0
    """When the load report came; 0 when none came yet."""

    @property
    def occupancy(self) -> int:
        """Requests believed to be there: the report, corrected by what was sent and finished since it came.

        Adding `in_flight` to the report would count most requests twice. Never less than what this scheduler itself
        has there, since a report may have left the worker before the last request reached it.
        """
        return max(self.running + self.waiting + self.in_flight - self.in_flight_at_report, self.in_flight)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one candidate: rejected for a reason, or scored."""

    replica_id: str
    rejection: str = ""
    scores: tuple[float, ...] = ()
    """One per SCORERS, each from 0 to 1; empty when rejected."""
    total: float = 0.0
    """Weighted mean of the scores."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer: endpoints best first, or the reason there is none. Verdicts are in the order of the candidates."""

    endpoints: tuple[str, ...]
    replica_ids: tuple[str, ...]
    refusal: str
    verdicts: tuple[Verdict, ...]


def choose(
    request: Request, replicas: Sequence[Candidate], policy: Policy, clock_ns: int, tie_break_key: int
) -> Decision:
    """Places `request`. `clock_ns` is on the clock of `Candidate.reported_ns`; the key (0 to 2^63-1) orders equals."""
    verdicts: list[Verdict] = []
    ranked: list[tuple[float, bytes, Candidate]] = []
    furthest = -1
    key = tie_break_key.to_bytes(8, "little")
    weight_sum = sum(policy.weights)
    for replica in replicas:
        stage = _rejected_at(request, replica)
        if stage is not None:
            furthest = max(furthest, stage)
            verdicts.append(Verdict(replica.replica_id, FILTERS[stage]))
            continue
        scores = _scores(request, replica, policy, clock_ns)
        total = 0.0
        for weight, score in zip(policy.weights, scores, strict=True):
            total += weight * score
        total /= weight_sum
        verdicts.append(Verdict(replica.replica_id, "", scores, total))
        tie = hashlib.blake2b(replica.replica_id.encode(), digest_size=8, key=key).digest()
        ranked.append((-total, tie, replica))
    if not ranked:
        return Decision((), (), FILTERS[furthest] if furthest >= 0 else NO_REPLICA, tuple(verdicts))
    ranked.sort(key=lambda entry: (entry[0], entry[1], entry[2].replica_id))
    best = [replica for _, _, replica in ranked[: policy.max_endpoints]]
    return Decision(
        tuple(replica.endpoint for replica in best), tuple(replica.replica_id for replica in best), "", tuple(verdicts)
    )


def _rejected_at(request: Request, replica: Candidate) -> int | None:
    """Index into FILTERS of the first filter that rejects the replica, or None."""
    if request.subset_hint is not None and replica.endpoint not in request.subset_hint:
        return 0
    if request.subset_labels and not set(request.subset_labels) <= set(replica.labels):
        return 1
    if request.model and request.model != replica.model:
        return 2
    if request.variant_digest and request.variant_digest != replica.variant_digest:
        return 3
    if replica.context_tokens and request.prompt_tokens + request.max_tokens > replica.context_tokens:
        return 4
    if replica.draining:
        return 5
    if replica.occupancy >= replica.max_running + replica.max_waiting:
        return 6
    return None


def _scores(request: Request, replica: Candidate, policy: Policy, clock_ns: int) -> tuple[float, ...]:
    """One number from 0 (avoid) to 1 (best) per entry of SCORERS, in that order."""
    occupancy = replica.occupancy
    slots = 1.0 - min(1.0, occupancy / replica.max_running)
    queue = 1.0
    if occupancy > replica.max_running:
        queue = 1.0 - min(1.0, (occupancy - replica.max_running) / max(1, replica.max_waiting))
    kv = 1.0
    if replica.kv_capacity_bytes:
        wanted = (request.prompt_tokens + request.max_tokens) * replica.kv_bytes_per_token
        kv = 1.0 - min(1.0, (replica.kv_used_bytes + wanted) / replica.kv_capacity_bytes)
    prefix = 0.0
    if request.prompt_tokens:
        prefix = min(1.0, replica.matched_blocks * replica.block_tokens / request.prompt_tokens)
    prefill = policy.prefill_scale_tokens / (policy.prefill_scale_tokens + replica.pending_prefill_tokens)
    fresh = 0.0
    if replica.reported_ns:
        age_ns = max(0, clock_ns - replica.reported_ns)
        fresh = 1.0 - min(1.0, max(0, age_ns - policy.stale_after_ns) / policy.stale_after_ns)
    return (slots, queue, kv, prefix, prefill, fresh)
