"""Envoy's face of the scheduler: `envoy.service.ext_proc.v3.ExternalProcessor`, one stream per HTTP request.

The answer to the request's headers is withheld until the first gRPC message of the body is there, so that placement
sees the prompt; then the headers are answered with the endpoints and the body is sent back unchanged. Envoy keeps no
copy in full-duplex mode: what we do not send back, the worker never gets. With the body mode NONE we ask for BUFFERED
by `mode_override`: then Envoy keeps the body and serves on when this process dies, which full-duplex cannot.

A caller may say in a header what placement reads of its first message (the gateway does, for prompts that fit): then
the headers are answered at once, and a message each way is saved before the worker hears of the request.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import grpc
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as inference
from autoglm.third_party import ext_proc_mode_pb2 as modes
from autoglm.third_party import ext_proc_pb2 as ext_proc
from autoglm.third_party import ext_proc_pb2_grpc
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from services.chassis import telemetry
from services.chassis.errors import InvalidRequest, ServiceError
from services.scheduler.picker import IN_FLIGHT, Asked, Picker, Placed
from services.scheduler.replicas import Flight
from services.scheduler.server_ext_proc_parts import (
    header,
    hint_from,
    labels_from,
    labels_from_cluster,
    local_reply,
    streamed,
    timeout_ms,
)
from services.scheduler.settings import SchedulerSettings

SERVICE = ext_proc.DESCRIPTOR.services_by_name["ExternalProcessor"].full_name
DESTINATION = "x-gateway-destination-endpoint"
SERVED = "x-gateway-destination-endpoint-served"
LB_NAMESPACE = "envoy.lb"

ASKED = "x-autoglm-asked-bin"
"""A GenerateRequest with what placement reads of one: request_id, model, variant, token ids, max_tokens, tenant."""

GENERATE = "/autoglm.sparse_inference.v1.SparseInferenceService/Generate"
SCORE = "/autoglm.sparse_inference.v1.SparseInferenceService/Score"

_WANTED = frozenset((":path", "x-request-id", "grpc-timeout", "traceparent", "tracestate", ASKED))
_DUPLEX = (modes.ProcessingMode.FULL_DUPLEX_STREAMED, modes.ProcessingMode.GRPC)
_WHOLE = (modes.ProcessingMode.BUFFERED, modes.ProcessingMode.BUFFERED_PARTIAL)
_FRAME_PREFIX = 5
"""gRPC's own header: one byte that says whether the message is compressed, four bytes of length."""

_OVERRIDE = modes.ProcessingMode(
    request_body_mode=modes.ProcessingMode.BUFFERED,
    response_header_mode=modes.ProcessingMode.SEND,
    response_trailer_mode=modes.ProcessingMode.SEND,
)
"""Asked for where the proxy would send headers only. The response's trailers keep the stream open to its end."""
_OVERRIDE_UNREAD = modes.ProcessingMode(
    response_header_mode=modes.ProcessingMode.SEND, response_trailer_mode=modes.ProcessingMode.SEND
)
"""The same where the headers said it all."""


class ExternalProcessor(ext_proc_pb2_grpc.ExternalProcessorServicer):
    """Answers Envoy. `draining` is set when this process is about to end."""

    def __init__(self, picker: Picker, settings: SchedulerSettings, draining: asyncio.Event) -> None:
        self._picker, self._settings, self._draining = picker, settings, draining

    async def Process(
        self,
        request_iterator: AsyncIterator[ext_proc.ProcessingRequest],
        context: grpc.aio.ServicerContext[ext_proc.ProcessingRequest, ext_proc.ProcessingResponse],
    ) -> AsyncIterator[ext_proc.ProcessingResponse]:
        """One HTTP request. It counts as in flight at its worker until this stream ends."""
        with IN_FLIGHT.track_inprogress(), Flight() as flight:
            labels = labels_from(context.invocation_metadata())
            exchange = Exchange(self._picker, self._settings, flight, labels)
            requests = aiter(request_iterator)
            while (message := await self._next(requests, exchange.may_leave)) is not None:
                for answer in exchange.answers(message):
                    yield answer
                if exchange.is_over:
                    return

    async def _next(
        self, requests: AsyncIterator[ext_proc.ProcessingRequest], may_leave: bool
    ) -> ext_proc.ProcessingRequest | None:
        """The next message; None at the end, or on a drain when Envoy can go on without us (a clean end says so)."""
        if not may_leave:
            return await anext(requests, None)
        read = asyncio.ensure_future(_read(requests))
        drained = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait((read, drained), return_when=asyncio.FIRST_COMPLETED)
            return read.result() if read.done() else None
        finally:
            read.cancel()
            drained.cancel()


class Exchange:
    """One HTTP request: what was received so far and what to answer. Does no I/O."""

    def __init__(
        self, picker: Picker, settings: SchedulerSettings, flight: Flight, labels: tuple[tuple[str, str], ...]
    ) -> None:
        self._picker, self._settings, self._flight, self._labels = picker, settings, flight, labels
        self._headers: dict[str, str] = {}
        self._hint: tuple[str, ...] | None = None
        self._mode: int = modes.ProcessingMode.FULL_DUPLEX_STREAMED
        self._held = bytearray()
        self._placed: Placed | None = None
        self.is_over = False
        """The stream should end: a local reply was given."""
        self.may_leave = False
        """Nothing that follows needs us: the worker has answered."""

    def answers(self, message: ext_proc.ProcessingRequest) -> Iterator[ext_proc.ProcessingResponse]:
        """What to send for `message`; nothing while more is needed."""
        try:
            kind = message.WhichOneof("request")
            if kind == "request_headers":
                yield from self._on_request_headers(message)
            elif kind == "request_body":
                yield from self._on_request_body(message.request_body)
            elif kind == "request_trailers":
                if self._placed is None:
                    yield from self._place_by_body(has_ended=True)
                    yield from self._echo(bytes(self._held), has_ended=False)
                yield ext_proc.ProcessingResponse(request_trailers=ext_proc.TrailersResponse())
            elif kind == "response_headers":
                self._on_response_headers(message)
                yield ext_proc.ProcessingResponse(response_headers=ext_proc.HeadersResponse())
            elif kind == "response_body":  # never asked for: tokens shall not be copied through here
                telemetry.fallback("response_body_echoed")
                part = message.response_body
                yield ext_proc.ProcessingResponse(response_body=streamed(part.body, part.end_of_stream))
            elif kind == "response_trailers":
                yield ext_proc.ProcessingResponse(response_trailers=ext_proc.TrailersResponse())
        except ServiceError as error:
            self.is_over = True
            yield local_reply(error)

    def _on_request_headers(self, message: ext_proc.ProcessingRequest) -> Iterator[ext_proc.ProcessingResponse]:
        for entry in message.request_headers.headers.headers:
            if entry.key in _WANTED:
                self._headers[entry.key] = entry.raw_value.decode("utf-8", "replace") or entry.value
        if message.HasField("protocol_config"):
            self._mode = message.protocol_config.request_body_mode
        self._hint = hint_from(message.metadata_context.filter_metadata)
        self._labels = self._labels or labels_from_cluster(message.attributes)
        has_body = not message.request_headers.end_of_stream
        reads_body = has_body and self._headers.get(":path") in (GENERATE, SCORE)
        if reads_body and (asked := self._asked_by_header()) is not None:
            answer = self._place(asked)
            if self._mode == modes.ProcessingMode.NONE and self._settings.asks_for_body:
                answer.mode_override.CopyFrom(_OVERRIDE_UNREAD)
            yield answer
        elif self._mode == modes.ProcessingMode.NONE and reads_body and self._settings.asks_for_body:
            self._mode = modes.ProcessingMode.BUFFERED
            yield ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse(), mode_override=_OVERRIDE)
        elif self._mode in _WHOLE and reads_body:
            yield ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
        elif not (self._mode in _DUPLEX and reads_body):
            yield self._place(self._asked())

    def _on_request_body(self, part: ext_proc.HttpBody) -> Iterator[ext_proc.ProcessingResponse]:
        if self._mode not in _DUPLEX:
            self._held += part.body
            if self._placed is None:
                yield from self._place_by_body(has_ended=True)
            else:
                yield ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse())
            self._held.clear()
            return
        if self._placed is not None:
            yield from self._echo(part.body, part.end_of_stream)
            return
        self._held += part.body
        yield from self._place_by_body(part.end_of_stream)
        if self._placed is not None:
            yield from self._echo(bytes(self._held), part.end_of_stream)
            self._held.clear()

    def _place_by_body(self, has_ended: bool) -> Iterator[ext_proc.ProcessingResponse]:
        """Places the request as soon as its first message is there; yields nothing before."""
        held = self._held
        asked: Asked | None = None
        if len(held) >= _FRAME_PREFIX:
            compressed, length = held[0], int.from_bytes(held[1:_FRAME_PREFIX])
            if compressed > 1:
                raise InvalidRequest("the body is not gRPC: a message must start with 0 or 1", first_byte=compressed)
            if compressed or length > self._settings.max_first_frame_bytes:
                telemetry.fallback("first_message_unread", compressed=bool(compressed), length=length)
                asked = self._asked()
            elif len(held) >= _FRAME_PREFIX + length:
                asked = self._asked_by(bytes(memoryview(held)[_FRAME_PREFIX : _FRAME_PREFIX + length]))
        if asked is not None:
            yield self._place(asked)
        elif has_ended:
            raise InvalidRequest("the body ended before its first gRPC message was complete", received_bytes=len(held))

    def _asked(self) -> Asked:
        """What is known without the body."""
        headers = self._headers
        return Asked(
            request_id=headers.get("x-request-id", "")[:64],
            subset_labels=self._labels,
            subset_hint=self._hint,
            deadline_ms=timeout_ms(headers.get("grpc-timeout", "")),
            traceparent=headers.get("traceparent", ""),
            tracestate=headers.get("tracestate", ""),
        )

    def _asked_by_header(self) -> Asked | None:
        """What the caller's header says; None without one, or when it cannot be read: the body says it as well."""
        text = self._headers.pop(ASKED, "")
        if not text or self._headers.get(":path") != GENERATE:
            return None
        try:
            return self._asked_by(base64.b64decode(text + "=" * (-len(text) % 4), validate=True))
        except (ValueError, InvalidRequest):
            telemetry.fallback("asked_header_unread", length=len(text))
            return None

    def _asked_by(self, body: bytes) -> Asked:
        """What is known with the first message. Ranges are the worker's to check; only lengths are used here."""
        kind = inference.GenerateRequest if self._headers[":path"] == GENERATE else inference.ScoreRequest
        try:
            request = kind.FromString(body)
        except DecodeError:
            raise InvalidRequest("the first gRPC message is not a valid request", length=len(body)) from None
        known = self._asked()
        known = replace(
            known,
            request_id=request.request_id[:64] or known.request_id,
            token_ids=request.token_ids,
            variant_digest=request.variant_digest,
        )
        if isinstance(request, inference.ScoreRequest):
            return known  # scoring reads no cached prefix and generates nothing
        return replace(known, max_tokens=request.max_tokens, model=request.model, tenant=request.tenant)

    def _place(self, asked: Asked) -> ext_proc.ProcessingResponse:
        self._placed = self._picker.pick(asked, self._flight)
        endpoints = ",".join(self._placed.endpoints)
        if not endpoints:
            return self._unchanged()
        mutation = ext_proc.HeaderMutation(
            set_headers=[header(DESTINATION, endpoints.encode())], remove_headers=[ASKED]
        )
        # The route is settled: choosing it anew would draw the canary weights a second time.
        common = ext_proc.CommonResponse(header_mutation=mutation, clear_route_cache=False)
        metadata = Struct()
        metadata.get_or_create_struct(LB_NAMESPACE)[DESTINATION] = endpoints
        if self._mode in _WHOLE and self._held:
            return ext_proc.ProcessingResponse(
                request_body=ext_proc.BodyResponse(response=common), dynamic_metadata=metadata
            )
        return ext_proc.ProcessingResponse(
            request_headers=ext_proc.HeadersResponse(response=common), dynamic_metadata=metadata
        )

    def _unchanged(self) -> ext_proc.ProcessingResponse:
        """Lets the request pass without a word about where to."""
        if self._mode in _WHOLE and self._held:
            return ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse())
        return ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())

    def _echo(self, body: bytes, has_ended: bool) -> Iterator[ext_proc.ProcessingResponse]:
        """The body for the worker, in parts Envoy takes; the last one carries the end."""
        step = self._settings.body_chunk_bytes
        for start in range(0, max(1, len(body)), step):
            is_last = start + step >= len(body)
            part = streamed(body[start : start + step], has_ended and is_last)
            if part.response.body_mutation.streamed_response.ByteSize():
                yield ext_proc.ProcessingResponse(request_body=part)

    def _on_response_headers(self, message: ext_proc.ProcessingRequest) -> None:
        self.may_leave = True
        if self._placed is None:
            telemetry.fallback("body_not_sent", remedy="allow_mode_override in Envoy, or AUTOGLM_ASKS_FOR_BODY=false")
            return
        facts = message.metadata_context.filter_metadata.get(LB_NAMESPACE)
        if facts is not None and (served := facts.fields[SERVED].string_value):
            self._picker.served(self._placed, served[:64], self._flight)


async def _read(requests: AsyncIterator[ext_proc.ProcessingRequest]) -> ext_proc.ProcessingRequest | None:
    return await anext(requests, None)
