"""The trace sink as a real process, fed by OpenTelemetry's own exporter over gRPC."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from autoglm.cli import spans
from autoglm.cli.spans import Span
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from services.mesh import demo
from tests.fakes.processes import Service, running

DEADLINE_S = 10.0


def query_port(service: Service) -> int:
    return next(int(line["query_port"]) for line in list(service.lines) if "query_port" in line)


@pytest.fixture
def sink() -> Iterator[Service]:
    with running("services.mesh.sink", AUTOGLM_SINK_SPANS="100") as service:
        yield service


def provider(address: str, name: str) -> TracerProvider:
    made = TracerProvider(resource=Resource.create({"service.name": name, "service.instance.id": f"{name}-0"}))
    made.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=address, insecure=True, timeout=5)))
    return made


def get(port: int, path: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def fetched(port: int, trace_id: str, count: int) -> list[Span]:
    deadline = time.monotonic() + DEADLINE_S
    while len(found := demo.fetch(f"127.0.0.1:{port}", trace_id)) < count:
        assert time.monotonic() < deadline, f"only {len(found)} of {count} spans came"
        time.sleep(0.02)
    return found


def send(address: str, *, spans_in_trace: int = 2) -> str:
    made = provider(address, "gateway")
    tracer = made.get_tracer("test")
    with tracer.start_as_current_span("root", kind=SpanKind.SERVER) as root:
        for number in range(spans_in_trace - 1):
            with tracer.start_as_current_span(f"child {number}") as child:
                child.set_attribute("gen_ai.usage.output_tokens", 12)
                child.set_attribute("list", ["a", "b"])
                child.add_event("fallback.cache_unavailable")
                child.set_status(Status(StatusCode.ERROR, "broken"))
    made.shutdown()
    return f"{root.get_span_context().trace_id:032x}"


def test_what_an_exporter_sends_is_what_the_page_tells(sink: Service) -> None:
    """Service, instance, parents, kinds, attributes, events and errors survive the way through OTLP."""
    trace_id = send(sink.address)
    tree = spans.build(fetched(query_port(sink), trace_id, 2))
    (root,) = tree.roots
    (child,) = root.children
    assert (root.span.service, root.span.instance, root.span.kind) == ("gateway", "gateway-0", "server")
    assert child.span.attributes["gen_ai.usage.output_tokens"] == "12"
    assert child.span.attributes["list"] == "a,b"
    assert child.span.events[0] == "fallback.cache_unavailable"
    assert child.span.is_error and not root.span.is_error


def test_the_newest_traces_come_first_and_the_oldest_are_forgotten(sink: Service) -> None:
    """The bound on spans holds (100 here): whole traces go, the oldest first."""
    first = send(sink.address, spans_in_trace=60)
    fetched(query_port(sink), first, 60)
    second = send(sink.address, spans_in_trace=60)
    fetched(query_port(sink), second, 60)
    status, answer = get(query_port(sink), "/traces?limit=5")
    assert status == 200
    assert [item["trace_id"] for item in answer["traces"]] == [second]
    assert answer["traces"][0]["services"] == ["gateway"]
    assert get(query_port(sink), f"/traces/{first}")[0] == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [("/", 404), ("/traces/none", 404), ("/traces?limit=0", 400), ("/traces?limit=x", 400), ("/traces/a/b", 404)],
)
def test_wrong_questions_get_an_answer(sink: Service, path: str, status: int) -> None:
    """A wrong path or limit is said as JSON with a fitting status."""
    code, answer = get(query_port(sink), path)
    assert code == status and answer["error"]


def test_spans_without_ids_are_rejected_and_counted_in_the_answer(sink: Service) -> None:
    """OTLP's partial success tells the exporter how many were useless."""
    request = trace_service_pb2.ExportTraceServiceRequest()
    scope = request.resource_spans.add().scope_spans.add()
    scope.spans.add(name="no ids")
    scope.spans.add(name="good", trace_id=b"t" * 16, span_id=b"s" * 8)
    with grpc.insecure_channel(sink.address) as channel:
        answer = trace_service_pb2_grpc.TraceServiceStub(channel).Export(request, timeout=5)
    assert answer.partial_success.rejected_spans == 1
    assert len(fetched(query_port(sink), (b"t" * 16).hex(), 1)) == 1


def test_batches_are_passed_on_to_another_collector(sink: Service) -> None:
    """With AUTOGLM_OTLP_FORWARD both collectors have the trace."""
    with running("services.mesh.sink", AUTOGLM_OTLP_FORWARD=sink.address) as near:
        trace_id = send(near.address)
        assert len(fetched(query_port(near), trace_id, 2)) == 2
        assert len(fetched(query_port(sink), trace_id, 2)) == 2


def test_a_dead_collector_behind_costs_nothing_here() -> None:
    """A forwarding target that is away neither slows nor loses what the sink itself keeps."""
    with running("services.mesh.sink", AUTOGLM_OTLP_FORWARD="127.0.0.1:1") as near:
        trace_id = send(near.address)
        assert len(fetched(query_port(near), trace_id, 2)) == 2


def test_log_records_are_told_with_their_trace(sink: Service) -> None:
    """An access log record comes back with the trace it belongs to; one without a trace does no harm."""
    trace_id = send(sink.address)
    request = logs_service_pb2.ExportLogsServiceRequest()
    resource = request.resource_logs.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "envoy-ingress"
    records = resource.scope_logs.add().log_records
    for number, (trace, body) in enumerate(((trace_id, "second"), (trace_id, "first"), ("", "stray"))):
        record = records.add(trace_id=bytes.fromhex(trace), time_unix_nano=10 - number)
        record.body.string_value = body
        record.attributes.add(key="status").value.string_value = "404"
    with grpc.insecure_channel(sink.address) as channel:
        logs_service_pb2_grpc.LogsServiceStub(channel).Export(request, timeout=5)
    status, found = get(query_port(sink), f"/traces/{trace_id}")
    assert status == 200
    assert [(log["service"], log["body"], log["attributes"]) for log in found["logs"]] == [
        ("envoy-ingress", "first", {"status": "404"}),
        ("envoy-ingress", "second", {"status": "404"}),
    ]


def test_a_trace_is_found_by_the_id_of_its_request(sink: Service) -> None:
    """The id that clients are told leads to the trace; an unknown one to an empty list."""
    made = provider(sink.address, "gateway")
    with made.get_tracer("test").start_as_current_span("chat", attributes={"gen_ai.response.id": "req-7"}) as span:
        pass
    made.shutdown()
    _, found = get(query_port(sink), "/traces?request_id=req-7")
    assert [trace["trace_id"] for trace in found["traces"]] == [f"{span.get_span_context().trace_id:032x}"]
    assert get(query_port(sink), "/traces?request_id=req-8") == (200, {"traces": []})
