"""Picks a worker for a request: gathers what placement needs, asks it, remembers the decision, counts the request.

`server.py` calls it with plain values and turns its answers into ext_proc messages. This module knows no protobuf.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter, Gauge, Histogram

from engine import prefix
from services.chassis import telemetry
from services.chassis.errors import InvalidRequest, ServiceError, TooBusy, Unavailable
from services.scheduler.placement import Candidate, Request, choose
from services.scheduler.policy import Policy
from services.scheduler.records import Record, Recorder
from services.scheduler.replicas import Flight, Replica, ReplicaTable

DECISIONS = Counter("autoglm_scheduler_decisions_total", "Placement decisions", ["outcome"])
DECISION_SECONDS = Histogram(
    "autoglm_scheduler_decision_seconds",
    "Time to hash the prompt, place the request and note the decision",
    buckets=(0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05),
)
REPLICAS = Gauge("autoglm_scheduler_replicas", "Replicas that hold a lease")
IN_FLIGHT = Gauge("autoglm_scheduler_in_flight", "Requests placed and not finished")
PROMPT_TOKENS = Counter("autoglm_scheduler_prompt_tokens_total", "Prompt tokens of placed requests")
PREDICTED_CACHED_TOKENS = Counter(
    "autoglm_scheduler_predicted_cached_tokens_total",
    "Prompt tokens the chosen replica was believed to hold; compare with the cached tokens that workers report",
)
SERVED = Counter("autoglm_scheduler_served_total", "Requests by who served them", ["by"])

LEFT_TO_PROXY = frozenset({"no_replica", "subset", "draining"})
"""Refusals that say that no worker is left here, rather than what one cannot do: the proxy may know others, such as
those of another cloud, which this process never hears of."""

STEP_BLOCKS = 64
"""Blocks hashed at a time (~0.1 ms): a prompt that nobody holds costs one step, however long it is."""

_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class Asked:
    """What the proxy and the first message of the body say of a request. Empty and 0 mean unknown."""

    request_id: str
    token_ids: Sequence[int] = ()
    max_tokens: int = 0
    model: str = ""
    variant_digest: str = ""
    tenant: str = ""
    subset_labels: tuple[tuple[str, str], ...] = ()
    subset_hint: tuple[str, ...] | None = None
    deadline_ms: int = 0
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    """A decision with endpoints, and the number of its record."""

    sequence: int
    endpoints: tuple[str, ...]


class Picker:
    """Places requests on the replicas of a table. Everything random or timed comes in through the constructor."""

    def __init__(
        self,
        table: ReplicaTable,
        recorder: Recorder,
        policy: Policy,
        max_hashed_tokens: int,
        retry_after_s: float,
        clock_ns: Callable[[], int],
        unix_ns: Callable[[], int],
        draw: Callable[[], int],
    ) -> None:
        """`draw` gives tie-break keys, 0 to 2^63-1; `clock_ns` is the clock of the table's load reports."""
        self._table, self._recorder, self._policy = table, recorder, policy
        self._max_hashed_tokens, self._retry_after_s = max_hashed_tokens, retry_after_s
        self._clock_ns, self._unix_ns, self._draw = clock_ns, unix_ns, draw
        self._tracer = trace.get_tracer("autoglm.scheduler")

    def pick(self, asked: Asked, flight: Flight) -> Placed:
        """Places a request and counts it in `flight`. Raises TooBusy, Unavailable or InvalidRequest when it cannot.

        With no fitting lease in the table (this process has just begun, say) the endpoints are empty: the proxy knows
        its endpoints without us and balances by itself.
        """
        started = time.perf_counter()
        carrier = {"traceparent": asked.traceparent, "tracestate": asked.tracestate}
        parent = _PROPAGATOR.extract(carrier) if asked.traceparent else None
        with self._tracer.start_as_current_span("schedule", parent, record_exception=False) as span:
            record = self._decide(asked)
            decision = record.decision
            outcome = decision.refusal or "placed"
            if span.is_recording():
                span.set_attributes(_attributes(record, outcome))
            DECISIONS.labels(outcome).inc()
            DECISION_SECONDS.observe(time.perf_counter() - started)
            if decision.refusal in LEFT_TO_PROXY:
                telemetry.fallback("left_to_proxy", reason=decision.refusal, replicas=len(record.candidates))
                return Placed(record.sequence, ())
            if decision.refusal:
                raise self._refusal(record)
            flight.board(self._table.get(decision.replica_ids[0]))
            return Placed(record.sequence, decision.endpoints)

    def served(self, placed: Placed, endpoint: str, flight: Flight) -> None:
        """The proxy says which endpoint it used; the request counts there from now on."""
        is_first = endpoint in placed.endpoints[:1]
        SERVED.labels("first_choice" if is_first else "another").inc()
        self._recorder.served(placed.sequence, endpoint)
        if not is_first:
            flight.board(self._table.by_endpoint(endpoint))

    def _decide(self, asked: Asked) -> Record:
        replicas = self._table.replicas()
        candidates, last_hash = self._candidates(asked, replicas)
        request = Request(
            prompt_tokens=len(asked.token_ids),
            max_tokens=asked.max_tokens,
            model=asked.model,
            variant_digest=asked.variant_digest,
            subset_labels=asked.subset_labels,
            subset_hint=asked.subset_hint,
            deadline_ms=asked.deadline_ms,
        )
        clock_ns, key = self._clock_ns(), self._draw()
        decision = choose(request, candidates, self._policy, clock_ns, key)
        sequence = self._recorder.next_sequence()
        record = Record(
            sequence=sequence,
            request_id=asked.request_id or f"decision-{sequence}",
            unix_ns=self._unix_ns(),
            clock_ns=clock_ns,
            tie_break_key=key,
            prefix_hash=last_hash,
            policy=self._policy,
            request=request,
            candidates=candidates,
            decision=decision,
        )
        self._recorder.add(record)
        if decision.replica_ids and asked.token_ids:
            chosen = next(entry for entry in candidates if entry.replica_id == decision.replica_ids[0])
            PROMPT_TOKENS.inc(len(asked.token_ids))
            PREDICTED_CACHED_TOKENS.inc(chosen.matched_blocks * chosen.block_tokens)
        return record

    def _candidates(self, asked: Asked, replicas: Sequence[Replica]) -> tuple[tuple[Candidate, ...], bytes]:
        """All replicas with the prefix each holds, and the hash that says which prompts begin alike."""
        chains: dict[tuple[str, int], _Chain] = {}
        candidates = []
        for replica in replicas:
            who = replica.registration
            matched = 0
            if asked.token_ids and asked.tenant and asked.variant_digest in ("", who.variant_digest):
                fence = (who.variant_digest, who.block_tokens)
                chain = chains.get(fence)
                if chain is None:
                    scope = prefix.scope_key(who.variant_digest, asked.tenant, who.block_tokens)
                    chain = chains[fence] = _Chain(scope, asked.token_ids, who.block_tokens, self._max_hashed_tokens)
                matched = chain.matched_by(replica)
            candidates.append(replica.candidate(matched))
        beginning = next((chain.beginning for chain in chains.values()), b"")
        return tuple(candidates), beginning

    def _refusal(self, record: Record) -> ServiceError:
        reason, count = record.decision.refusal, len(record.candidates)
        facts = {"refusal": reason, "replicas": count, "decision": record.sequence}
        if reason == "saturated":
            text = f"all workers that could take the request are full ({count} known)"
            return TooBusy(text, self._retry_after_s, **facts)
        if reason == "context":
            longest = max(candidate.context_tokens for candidate in record.candidates)
            request = record.request
            wanted = f"{request.prompt_tokens} prompt tokens and {request.max_tokens} more"
            return InvalidRequest(f"{wanted} do not fit the context of {longest} tokens", **facts)
        return Unavailable(f"no worker can take the request: {_EXPLAINED[reason]} ({count} known)", **facts)


class _Chain:
    """The prompt's block hashes in one scope, made step by step as long as some replica holds them all."""

    def __init__(self, scope: bytes, token_ids: Sequence[int], block_tokens: int, max_tokens: int) -> None:
        self._scope, self._block_tokens = scope, block_tokens
        self._token_ids = token_ids
        self._limit = min(len(token_ids), max_tokens) // block_tokens
        self._hashes: list[bytes] = []
        self._extend()
        self.beginning = self._hashes[-1] if self._hashes else b""
        """Hash of the first blocks, at most STEP_BLOCKS: the same for prompts that begin alike, whoever holds them."""

    def matched_by(self, replica: Replica) -> int:
        """How many leading blocks the replica is believed to hold."""
        matched = replica.matched_blocks(self._hashes)
        while matched == len(self._hashes) < self._limit:
            self._extend()
            matched = replica.matched_blocks(self._hashes, matched)
        return matched

    def _extend(self) -> None:
        start = len(self._hashes)
        end = min(start + STEP_BLOCKS, self._limit)
        parent = self._hashes[-1] if self._hashes else self._scope
        ids = self._token_ids[start * self._block_tokens : end * self._block_tokens]
        self._hashes += prefix.block_hashes(parent, ids, self._block_tokens)


_EXPLAINED = {
    "hint": "none is among the endpoints that the proxy allows",
    "model": "none serves the model",
    "variant": "none runs the variant",
}


def _attributes(record: Record, outcome: str) -> dict[str, str | int | float | bool]:
    decision = record.decision
    chosen = decision.replica_ids[0] if decision.replica_ids else ""
    matched = next((entry.matched_blocks for entry in record.candidates if entry.replica_id == chosen), 0)
    return {
        "gen_ai.request.model": record.request.model,
        "autoglm.request.id": record.request_id,
        "autoglm.schedule.sequence": record.sequence,
        "autoglm.schedule.outcome": outcome,
        "autoglm.schedule.endpoint": decision.endpoints[0] if decision.endpoints else "",
        "autoglm.schedule.replica": chosen,
        "autoglm.schedule.fallbacks": ",".join(decision.endpoints[1:]),
        "autoglm.schedule.candidates": len(record.candidates),
        "autoglm.schedule.rejected": sum(bool(verdict.rejection) for verdict in decision.verdicts),
        "autoglm.schedule.matched_blocks": matched,
        "autoglm.schedule.policy_version": record.policy.version,
        "autoglm.request.prompt_tokens": record.request.prompt_tokens,
    }
