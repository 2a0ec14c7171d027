"""Client spans that end when their call ends, and work that is in no trace.

OpenTelemetry's gRPC interceptors end the span of a streaming call only once its last message has been read, so the span
of a call that is cancelled, or left after its last useful message, would never be sent and its children would hang in
the air. Here the end of the call ends the span as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.instrumentation.grpc import aio_client_interceptors
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags


@contextmanager
def untraced() -> Iterator[None]:
    """Calls made in the block are in no trace, here and in whatever they cause elsewhere.

    For background work that belongs to no request: with every trace recorded, each such call would be a trace of its
    own that nobody looks for. The decision travels as the caller's (`traceparent` with flag 00), so Envoy keeps it.
    """
    ids = RandomIdGenerator()
    decided = SpanContext(ids.generate_trace_id(), ids.generate_span_id(), False, TraceFlags(TraceFlags.DEFAULT))
    with trace.use_span(NonRecordingSpan(decided)):
        yield


def client_interceptors() -> list[Any]:
    """OpenTelemetry's interceptors for the four kinds of call, the two with streamed answers amended."""
    interceptors: list[Any] = list(aio_client_interceptors())  # type: ignore[no-untyped-call]  # carries no types
    for interceptor in interceptors:
        if hasattr(interceptor, "intercept_unary_stream") or hasattr(interceptor, "intercept_stream_stream"):
            _amend(interceptor)
    return interceptors


def _amend(interceptor: Any) -> None:
    """Replaces the method that follows the answers. A new OpenTelemetry without it keeps its own behaviour."""

    def follow(span: Span, call: Any) -> AsyncIterator[Any]:
        loop = asyncio.get_running_loop()
        # A reader that is waiting comes first: it knows the error.
        call.add_done_callback(lambda _: loop.call_soon(_end, span))
        return _answers(interceptor, span, call)

    interceptor._wrap_stream_response = follow


async def _answers(interceptor: Any, span: Span, call: Any) -> AsyncIterator[Any]:
    try:
        async for answer in call:
            yield answer
    except Exception as error:
        if span.is_recording():
            interceptor.add_error_details_to_span(span, error)
        raise
    finally:
        _end(span)


def _end(span: Span) -> None:
    if span.is_recording():
        span.end()
