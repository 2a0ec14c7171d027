"""OTLP/gRPC in: converts protobuf spans to the store's own, bounded, and passes batches on if asked to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from prometheus_client import Counter

from services.chassis.telemetry import fallback
from services.mesh.sink.store import TraceStore
from services.mesh.spans import Span

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
MAX_ATTRIBUTES = 64
MAX_EVENTS = 64
MAX_TEXT = 1024
FORWARD_TIMEOUT_S = 5.0

RECEIVED = Counter("autoglm_sink_spans_total", "Spans received")
LOST = Counter("autoglm_sink_lost_spans_total", "Spans dropped, or forgotten to make room")


class Forwarder:
    """Sends batches on to another collector. Its slowness costs batches, never the mesh's own traces."""

    def __init__(self, target: str, queue: int) -> None:
        self._queue: asyncio.Queue[service.ExportTraceServiceRequest] = asyncio.Queue(queue)
        self._channel = grpc.aio.insecure_channel(target)
        self._stub = service_grpc.TraceServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated without types
        self._task = asyncio.create_task(self._run())

    def offer(self, batch: service.ExportTraceServiceRequest) -> None:
        """Queues the batch, or drops it with a word."""
        try:
            self._queue.put_nowait(batch)
        except asyncio.QueueFull:
            fallback("sink.forward_dropped", reason="queue is full")

    async def close(self) -> None:
        """Gives the queue a short time to empty."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), FORWARD_TIMEOUT_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close(None)

    async def _run(self) -> None:
        while True:
            batch = await self._queue.get()
            try:
                await self._stub.Export(batch, timeout=FORWARD_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                fallback("sink.forward_failed", code=error.code().name)
            finally:
                self._queue.task_done()


class TraceSink(service_grpc.TraceServiceServicer):
    """The OTLP trace service."""

    def __init__(self, store: TraceStore, forwarder: Forwarder | None = None) -> None:
        self._store, self._forwarder = store, forwarder

    async def Export(
        self, request: service.ExportTraceServiceRequest, context: Any
    ) -> service.ExportTraceServiceResponse:
        """Keeps every span that has ids; the others are reported as rejected, as OTLP wants it."""
        spans = list(_spans(request))
        total = sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        RECEIVED.inc(len(spans))
        LOST.inc(self._store.add(spans))
        if self._forwarder is not None:
            self._forwarder.offer(request)
        answer = service.ExportTraceServiceResponse()
        if total > len(spans):
            answer.partial_success.rejected_spans = total - len(spans)
            answer.partial_success.error_message = "a trace id has 16 bytes and a span id 8, not all zero"
        return answer


def _spans(request: service.ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        about = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                if len(span.trace_id) == 16 and any(span.trace_id) and len(span.span_id) == 8 and any(span.span_id):
                    yield _span(span, about)


def _span(span: trace_pb2.Span, about: Mapping[str, str]) -> Span:
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() if any(span.parent_span_id) else "",
        service=about.get("service.name", "unknown"),
        name=span.name[:MAX_TEXT],
        start_ns=span.start_time_unix_nano,
        end_ns=max(span.end_time_unix_nano, span.start_time_unix_nano),
        instance=about.get("service.instance.id", ""),
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower() if 0 <= span.kind <= 5 else "",
        is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        attributes=_attributes(span.attributes),
        events=tuple(event.name[:MAX_TEXT] for event in span.events[:MAX_EVENTS]),
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        if len(found) >= MAX_ATTRIBUTES:
            break
        found[pair.key[:MAX_TEXT]] = _text(pair.value)[:MAX_TEXT]
    return found


def _text(value: AnyValue) -> str:
    kind = value.WhichOneof("value")
    if kind is None:
        return ""
    if kind == "array_value":
        return ",".join(
            _text(item) for item in value.array_value.values[:MAX_ATTRIBUTES] if not item.HasField("array_value")
        )
    if kind == "bool_value":
        return "true" if value.bool_value else "false"
    if kind == "bytes_value":
        return value.bytes_value[:MAX_TEXT].hex()
    return "{…}" if kind == "kvlist_value" else str(getattr(value, kind))
