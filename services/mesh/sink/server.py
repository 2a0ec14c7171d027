"""Spans in over OTLP/gRPC: converts them to the store's own, bounded, and passes batches on if asked to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autoglm.cli.spans import Span
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from prometheus_client import Counter

from services.mesh.sink.attributes import MAX_TEXT, attributes
from services.mesh.sink.forward import Forwarder
from services.mesh.sink.store import TraceStore

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
MAX_EVENTS = 64

RECEIVED = Counter("autoglm_sink_spans_total", "Spans received")
LOST = Counter("autoglm_sink_lost_spans_total", "Spans dropped, or forgotten to make room")


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
        about = attributes(resource.resource.attributes)
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
        attributes=attributes(span.attributes),
        events=tuple(event.name[:MAX_TEXT] for event in span.events[:MAX_EVENTS]),
    )
