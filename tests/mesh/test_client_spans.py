"""The span of an outgoing call ends with the call, however the call ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.propagate import inject
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from services.chassis.tracing import client_interceptors, untraced
from tests.fakes.processes import running


class Ended(SpanExporter):
    """Remembers spans that have ended, and lets a test wait for them."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self.come = asyncio.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        self.come.set()
        return SpanExportResult.SUCCESS


@pytest.fixture
async def traced() -> AsyncIterator[tuple[health_pb2_grpc.HealthStub, Ended]]:
    """A health stub whose client spans go to `Ended`."""
    ended, provider = Ended(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ended))
    interceptors = client_interceptors()
    for interceptor in interceptors:
        interceptor._tracer = provider.get_tracer("test")
    with running("tests.fakes.member") as member:
        async with grpc.aio.insecure_channel(member.address, interceptors=interceptors) as channel:
            yield health_pb2_grpc.HealthStub(channel), ended


async def test_a_stream_that_is_left_early_still_ends_its_span(
    traced: tuple[health_pb2_grpc.HealthStub, Ended],
) -> None:
    """Cancelled after its first message: one span, ended once, without an error that did not happen."""
    stub, ended = traced
    call = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await anext(aiter(call))).status == health_pb2.HealthCheckResponse.SERVING
    assert not ended.spans
    call.cancel()
    await asyncio.wait_for(ended.come.wait(), 20)
    (span,) = ended.spans
    assert span.name == "/grpc.health.v1.Health/Watch" and span.end_time is not None
    assert span.status.is_unset


async def test_a_stream_that_fails_says_so_on_its_span(traced: tuple[health_pb2_grpc.HealthStub, Ended]) -> None:
    """The reader gets the error, and the span has its status."""
    stub, ended = traced
    call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    await asyncio.wait_for(ended.come.wait(), 20)
    (span,) = ended.spans
    assert span.attributes is not None
    assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


async def test_untraced_work_leaves_no_span_and_says_so_to_the_next_hop(
    traced: tuple[health_pb2_grpc.HealthStub, Ended],
) -> None:
    """A call in the block makes no span, not even within a trace; the call after it makes one again."""
    stub, ended = traced
    with untraced():
        await stub.Check(health_pb2.HealthCheckRequest())
        carrier: dict[str, str] = {}
        inject(carrier)
    assert carrier["traceparent"].endswith("-00")
    await stub.Check(health_pb2.HealthCheckRequest())
    await asyncio.wait_for(ended.come.wait(), 20)
    assert [span.name for span in ended.spans] == ["/grpc.health.v1.Health/Check"]
