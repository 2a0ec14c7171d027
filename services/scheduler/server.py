"""The scheduler's own service: leases of workers, and the answers to "who is there" and "why".

Turns messages into the plain values of `replicas` and `records`, and back.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from autoglm.scheduler.v1 import scheduler_pb2 as api
from autoglm.scheduler.v1 import scheduler_pb2_grpc

from services.chassis import telemetry
from services.chassis.errors import Interrupted, InvalidRequest, NotFound, TooBusy, Unavailable
from services.scheduler.picker import REPLICAS
from services.scheduler.placement import Candidate, Verdict
from services.scheduler.policy import SCORERS
from services.scheduler.records import Record, Recorder
from services.scheduler.replicas import Load, Registration, Replica, ReplicaTable, TableFull
from services.scheduler.settings import SchedulerSettings

SERVICE = api.DESCRIPTOR.services_by_name["SchedulerService"].full_name
DEFAULT_LIMIT = 100
MAX_OF_REQUEST = 64

_ENDPOINT = re.compile(r"(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-fA-F:.]+\]):\d{1,5}")


class SchedulerService(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Leases and look-ups. `draining` is set when this process is about to end."""

    def __init__(
        self, table: ReplicaTable, recorder: Recorder, settings: SchedulerSettings, draining: asyncio.Event
    ) -> None:
        self._table, self._recorder, self._settings, self._draining = table, recorder, settings, draining

    async def Lease(
        self,
        request_iterator: AsyncIterator[api.LeaseRequest],
        context: grpc.aio.ServicerContext[api.LeaseRequest, api.LeaseResponse],
    ) -> AsyncIterator[api.LeaseResponse]:
        """The replica is in the table from its registration to the end of this stream, however it ends."""
        superseded = asyncio.Event()
        ends = [asyncio.create_task(_set(event)) for event in (superseded, self._draining)]
        replica: Replica | None = None
        try:
            # A draining worker has nothing left to report and keeps its lease until it ends.
            is_draining = lambda: replica is not None and replica.draining  # noqa: E731
            async for message in self._reports(aiter(request_iterator), ends, is_draining):
                if replica is None:
                    replica = self._register(message, superseded)
                    yield api.LeaseResponse(epoch=replica.epoch, report_interval_ms=self._settings.report_interval_ms)
                else:
                    self._apply(replica, message)
            if superseded.is_set():
                raise Interrupted("a newer lease of this replica_id took over", reason="superseded")
        finally:
            for end in ends:
                end.cancel()
            if replica is not None and self._table.remove(replica):
                REPLICAS.set(len(self._table))

    async def _reports(
        self,
        requests: AsyncIterator[api.LeaseRequest],
        ends: list[asyncio.Task[bool]],
        may_be_silent: Callable[[], bool],
    ) -> AsyncIterator[api.LeaseRequest]:
        """Messages until the stream or one of `ends` ends. Raises Unavailable when the peer falls silent unasked."""
        while True:
            timeout_s = None if may_be_silent() else self._settings.lease_timeout_ms / 1000
            read = asyncio.create_task(_read(requests))
            try:
                waits: list[asyncio.Task[Any]] = [read, *ends]
                done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise Unavailable("the lease had no report for too long", limit_ms=self._settings.lease_timeout_ms)
                if any(end.done() for end in ends):
                    return
                message = read.result()
            finally:
                read.cancel()
            if message is None:
                return
            yield message

    def _register(self, message: api.LeaseRequest, superseded: asyncio.Event) -> Replica:
        if message.WhichOneof("event") != "registration":
            raise InvalidRequest("the first message of a lease must be a registration", field="registration")
        if not _ENDPOINT.fullmatch(message.registration.endpoint):
            raise InvalidRequest("endpoint must be ip:port", field="registration.endpoint")
        try:
            replica = self._table.register(_registration_from(message.registration), superseded.set)
        except TableFull as error:
            raise TooBusy(f"{error}", retry_after_s=5, setting="AUTOGLM_MAX_REPLICAS") from None
        REPLICAS.set(len(self._table))
        return replica

    def _apply(self, replica: Replica, message: api.LeaseRequest) -> None:
        event = message.WhichOneof("event")
        if event == "load":
            load = message.load
            self._table.report_load(
                replica, Load(load.running, load.waiting, load.kv_used_bytes, load.pending_prefill_tokens)
            )
        elif event == "prefixes":
            change = message.prefixes
            forgotten = self._table.report_prefixes(replica, change.reset, change.added, change.removed)
            if forgotten:
                telemetry.fallback("prefixes_forgotten", replica=replica.registration.replica_id, blocks=forgotten)
        elif event == "drain":
            replica.draining = True
        else:
            raise InvalidRequest("a lease registers once; later messages report", field=event or "event")

    async def ListReplicas(self, request: api.ListReplicasRequest, context: object) -> api.ListReplicasResponse:
        """Everyone who holds a lease."""
        return api.ListReplicasResponse(replicas=[_replica_to(replica) for replica in self._table.replicas()])

    async def GetDecision(self, request: api.GetDecisionRequest, context: object) -> api.GetDecisionResponse:
        """Why a request went where it went."""
        records = self._recorder.of_request(request.request_id)
        if not records:
            raise NotFound("no decision of that request is remembered", max_decisions=self._settings.max_decisions)
        return api.GetDecisionResponse(decisions=[decision_to(record) for record in records[-MAX_OF_REQUEST:]])

    async def ListDecisions(self, request: api.ListDecisionsRequest, context: object) -> api.ListDecisionsResponse:
        """The newest decisions."""
        newest = self._recorder.newest(request.limit or DEFAULT_LIMIT)
        return api.ListDecisionsResponse(decisions=[decision_to(record) for record in newest])


async def _set(event: asyncio.Event) -> bool:
    return await event.wait()


async def _read(requests: AsyncIterator[api.LeaseRequest]) -> api.LeaseRequest | None:
    return await anext(requests, None)


def _registration_from(message: api.Registration) -> Registration:
    return Registration(
        replica_id=message.replica_id,
        endpoint=message.endpoint,
        model=message.model,
        variant_digest=message.variant_digest,
        block_tokens=message.block_tokens,
        max_running=message.max_running,
        max_waiting=message.max_waiting,
        kv_capacity_bytes=message.kv_capacity_bytes,
        labels=tuple(sorted(message.labels.items())),
        weight_bytes=message.weight_bytes,
        kv_bytes_per_token=message.kv_bytes_per_token,
        context_tokens=message.context_tokens,
    )


def _replica_to(replica: Replica) -> api.Replica:
    who, load = replica.registration, replica.load
    return api.Replica(
        registration=api.Registration(
            replica_id=who.replica_id,
            endpoint=who.endpoint,
            model=who.model,
            variant_digest=who.variant_digest,
            block_tokens=who.block_tokens,
            max_running=who.max_running,
            max_waiting=who.max_waiting,
            kv_capacity_bytes=who.kv_capacity_bytes,
            labels=dict(who.labels),
            weight_bytes=who.weight_bytes,
            kv_bytes_per_token=who.kv_bytes_per_token,
            context_tokens=who.context_tokens,
        ),
        load=api.LoadReport(
            running=load.running,
            waiting=load.waiting,
            kv_used_bytes=load.kv_used_bytes,
            pending_prefill_tokens=load.pending_prefill_tokens,
        ),
        draining=replica.draining,
        epoch=replica.epoch,
        in_flight=replica.in_flight,
        prefix_blocks=len(replica.prefixes),
    )


def decision_to(record: Record) -> api.Decision:
    """The record as the API shows it."""
    request, decision = record.request, record.decision
    pairs = zip(record.candidates, decision.verdicts, strict=True)
    return api.Decision(
        sequence=record.sequence,
        request_id=record.request_id,
        policy_version=record.policy.version,
        unix_ns=record.unix_ns,
        clock_ns=record.clock_ns,
        prompt_tokens=request.prompt_tokens,
        max_tokens=request.max_tokens,
        prefix_hash=record.prefix_hash,
        deadline_ms=request.deadline_ms,
        subset_labels=dict(request.subset_labels),
        candidates=[_candidate_to(candidate, verdict) for candidate, verdict in pairs],
        endpoints=decision.endpoints,
        refusal=decision.refusal,
        served_endpoint=record.served_endpoint,
        tie_break_key=record.tie_break_key,
        model=request.model,
        variant_digest=request.variant_digest,
        has_subset_hint=request.subset_hint is not None,
        subset_hint=request.subset_hint or (),
    )


def _candidate_to(candidate: Candidate, verdict: Verdict) -> api.Candidate:
    return api.Candidate(
        replica_id=candidate.replica_id,
        endpoint=candidate.endpoint,
        rejection=verdict.rejection,
        load=api.LoadReport(
            running=candidate.running,
            waiting=candidate.waiting,
            kv_used_bytes=candidate.kv_used_bytes,
            pending_prefill_tokens=candidate.pending_prefill_tokens,
        ),
        in_flight=candidate.in_flight,
        matched_blocks=candidate.matched_blocks,
        scores=dict(zip(SCORERS, verdict.scores, strict=True)) if verdict.scores else {},
        total=verdict.total,
        max_running=candidate.max_running,
        max_waiting=candidate.max_waiting,
        variant_digest=candidate.variant_digest,
        draining=candidate.draining,
        labels=dict(candidate.labels),
        model=candidate.model,
        block_tokens=candidate.block_tokens,
        context_tokens=candidate.context_tokens,
        kv_capacity_bytes=candidate.kv_capacity_bytes,
        kv_bytes_per_token=candidate.kv_bytes_per_token,
        in_flight_at_report=candidate.in_flight_at_report,
        reported_ns=candidate.reported_ns,
    )
