"""The ext_proc protocol, message by message, without a proxy: what is answered, when, and what is not."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from autoglm.sparse_inference.v1 import sparse_inference_pb2 as inference
from autoglm.third_party import envoy_core_pb2 as core
from autoglm.third_party import ext_proc_mode_pb2 as modes
from autoglm.third_party import ext_proc_pb2 as ext_proc
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine import prefix
from services.chassis.telemetry import FALLBACKS
from services.scheduler.picker import Picker
from services.scheduler.policy import Policy
from services.scheduler.records import Recorder
from services.scheduler.replicas import Flight, Load, Registration, Replica, ReplicaTable
from services.scheduler.server_ext_proc import ASKED, DESTINATION, GENERATE, SCORE, SERVED, Exchange
from services.scheduler.server_ext_proc_parts import labels_from, labels_from_cluster
from services.scheduler.settings import SchedulerSettings

FULL_DUPLEX = modes.ProcessingMode.FULL_DUPLEX_STREAMED
BUFFERED = modes.ProcessingMode.BUFFERED
NONE = modes.ProcessingMode.NONE


class Desk:
    """A table with two workers and a picker that draws the same key each time."""

    def __init__(self, **settings: Any) -> None:
        self.settings = SchedulerSettings(**settings)
        self.table = ReplicaTable(10, 1000, lambda: 5)
        self.recorder = Recorder(10)
        self.picker = Picker(self.table, self.recorder, Policy(), 32768, 0.25, lambda: 5, lambda: 6, lambda: 7)
        self.flight = Flight()

    def add(self, name: str, port: int, **facts: Any) -> Replica:
        plain: dict[str, Any] = {"model": "m", "variant_digest": "v", "block_tokens": 16, "max_running": 2}
        replica = self.table.register(Registration(name, f"10.0.0.1:{port}", **(plain | facts)), lambda: None)
        self.table.report_load(replica, Load())
        return replica

    def exchange(self, labels: tuple[tuple[str, str], ...] = ()) -> Exchange:
        return Exchange(self.picker, self.settings, self.flight, labels)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    made.add("a", 1)
    made.add("b", 2)
    yield made


def headers(
    path: str = GENERATE, mode: int = FULL_DUPLEX, end_of_stream: bool = False, **more: str
) -> ext_proc.ProcessingRequest:
    pairs = {":path": path, "x-request-id": "from-header"} | {key.replace("_", "-"): v for key, v in more.items()}
    values = [core.HeaderValue(key=key, raw_value=value.encode()) for key, value in pairs.items()]
    message = ext_proc.ProcessingRequest(
        request_headers=ext_proc.HttpHeaders(headers=core.HeaderMap(headers=values), end_of_stream=end_of_stream)
    )
    message.protocol_config.request_body_mode = mode  # type: ignore[assignment]
    return message


def body(data: bytes, end_of_stream: bool = False) -> ext_proc.ProcessingRequest:
    return ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=data, end_of_stream=end_of_stream))


def frame(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4) + data


def generate(**facts: Any) -> inference.GenerateRequest:
    return inference.GenerateRequest(**({"request_id": "r", "token_ids": [1, 2], "tenant": "t"} | facts))


def destination(answer: ext_proc.ProcessingResponse) -> str:
    """The endpoints of an answer; header and metadata must agree."""
    common = (answer.request_headers if answer.HasField("request_headers") else answer.request_body).response
    (option,) = common.header_mutation.set_headers
    assert option.header.key == DESTINATION and not option.header.value and not common.clear_route_cache
    endpoints = option.header.raw_value.decode()
    assert answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields[DESTINATION].string_value == endpoints
    return endpoints


def test_the_headers_answer_waits_for_the_first_message(desk: Desk) -> None:
    """Byte by byte: nothing is answered until the message is whole; then headers first, then the whole body."""
    exchange, data = desk.exchange(), frame(generate(request_id="mine", max_tokens=9))
    assert list(exchange.answers(headers())) == []
    for index in range(len(data) - 1):
        assert list(exchange.answers(body(data[index : index + 1]))) == []
    first, echo = list(exchange.answers(body(data[-1:], end_of_stream=True)))
    assert set(destination(first).split(",")) == {"10.0.0.1:1", "10.0.0.1:2"}
    streamed = echo.request_body.response.body_mutation.streamed_response
    assert streamed.body == data and streamed.end_of_stream
    record = desk.recorder.newest(1)[0]
    assert (record.request_id, record.request.prompt_tokens, record.request.max_tokens) == ("mine", 2, 9)


@pytest.mark.parametrize("size", [0, 1, 61_999, 62_000, 62_001, 200_000])
def test_the_body_comes_back_in_parts_envoy_takes(desk: Desk, size: int) -> None:
    """Whatever follows the first message is echoed unchanged, in parts of at most 62,000 bytes, with its end kept."""
    exchange, data, rest = desk.exchange(), frame(generate()), bytes(size)
    parts = [*exchange.answers(headers()), *exchange.answers(body(data)), *exchange.answers(body(rest, True))]
    streamed = [part.request_body.response.body_mutation.streamed_response for part in parts[1:]]
    assert b"".join(part.body for part in streamed) == data + rest
    assert all(len(part.body) <= 62_000 for part in streamed)
    assert [part.end_of_stream for part in streamed] == [False] * (len(streamed) - 1) + [True]


def test_buffered_mode_answers_with_the_body(desk: Desk) -> None:
    """Envoy keeps the body: the headers are waved through, the endpoints come with the body, nothing is echoed."""
    exchange = desk.exchange()
    (first,) = exchange.answers(headers(mode=BUFFERED))
    assert first == ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
    (second,) = exchange.answers(body(frame(generate()), True))
    assert destination(second) and not second.request_body.response.HasField("body_mutation")


def test_where_no_body_comes_it_is_asked_for(desk: Desk) -> None:
    """Body mode NONE: mode_override asks for BUFFERED; with the setting off, the load alone decides at once."""
    exchange = desk.exchange()
    (first,) = exchange.answers(headers(mode=NONE))
    assert first.mode_override.request_body_mode == BUFFERED and not first.HasField("dynamic_metadata")
    (second,) = exchange.answers(body(frame(generate()), True))
    assert destination(second)
    (at_once,) = Exchange(desk.picker, SchedulerSettings(asks_for_body=False), Flight(), ()).answers(headers(mode=NONE))
    assert destination(at_once) and not at_once.HasField("mode_override")


def asked(**facts: Any) -> str:
    """The header as it is on the wire."""
    return base64.b64encode(generate(**facts).SerializeToString()).rstrip(b"=").decode()


@pytest.mark.parametrize("mode", [FULL_DUPLEX, BUFFERED, NONE])
def test_what_a_header_says_needs_no_body(desk: Desk, mode: int) -> None:
    """The headers are answered at once, as the body would have decided; the header ends here and the body goes on."""
    exchange, data = desk.exchange(), frame(generate())
    (first,) = exchange.answers(headers(mode=mode, **{ASKED: asked(request_id="mine", max_tokens=9)}))
    assert destination(first) and list(first.request_headers.response.header_mutation.remove_headers) == [ASKED]
    assert first.mode_override.response_trailer_mode == (modes.ProcessingMode.SEND if mode == NONE else 0)
    record = desk.recorder.newest(1)[0]
    assert (record.request_id, record.request.prompt_tokens, record.request.max_tokens) == ("mine", 2, 9)
    (second,) = exchange.answers(body(data, True))
    echoed = second.request_body.response.body_mutation.streamed_response.body
    assert echoed == (data if mode == FULL_DUPLEX else b"") and len(desk.recorder.newest(2)) == 1


@pytest.mark.parametrize("text", ["not base64", "/////w"])
def test_a_header_that_says_nothing_is_counted_and_the_body_decides(desk: Desk, text: str) -> None:
    """Neither refused nor silently passed over."""
    before = FALLBACKS.labels("asked_header_unread")._value.get()
    exchange = desk.exchange()
    assert list(exchange.answers(headers(**{ASKED: text}))) == []
    assert destination(next(exchange.answers(body(frame(generate()), True))))
    assert FALLBACKS.labels("asked_header_unread")._value.get() == before + 1


@pytest.mark.parametrize("message", [headers(path="/grpc.health.v1.Health/Check"), headers(end_of_stream=True)])
def test_other_requests_go_by_load_at_once(desk: Desk, message: ext_proc.ProcessingRequest) -> None:
    """Another method, or no body at all: placed on the headers, and a body that follows is echoed."""
    exchange = desk.exchange()
    (first,) = exchange.answers(message)
    assert destination(first)
    (echo,) = exchange.answers(body(b"abc", True))
    assert echo.request_body.response.body_mutation.streamed_response.body == b"abc"


@pytest.mark.parametrize(
    "data", [b"\1" + (9).to_bytes(4) + b"x" * 9, b"\0" + (4096).to_bytes(4) + b"x"], ids=["compressed", "long"]
)
def test_an_unreadable_first_message_goes_by_load(data: bytes) -> None:
    """Compressed, or longer than the bound: placed without its tokens, as soon as that is known; nothing is lost."""
    desk = Desk(max_first_frame_bytes=1024)
    desk.add("a", 1)
    exchange = desk.exchange()
    list(exchange.answers(headers()))
    first, echo = exchange.answers(body(data))
    assert destination(first) == "10.0.0.1:1"
    assert echo.request_body.response.body_mutation.streamed_response.body == data
    assert desk.recorder.newest(1)[0].request.prompt_tokens == 0


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0", b"\0" + (9).to_bytes(4) + b"\x0a\x05", b"\2" + bytes(8), b"\0" + (2).to_bytes(4) + b"\xff\xff"],
    ids=["empty", "half a prefix", "half a message", "not gRPC", "not protobuf"],
)
@pytest.mark.parametrize("mode", [FULL_DUPLEX, BUFFERED])
def test_a_malformed_first_message_is_refused(desk: Desk, data: bytes, mode: int) -> None:
    """INVALID_ARGUMENT as a local reply; the stream is over; no worker sees it."""
    exchange = desk.exchange()
    list(exchange.answers(headers(mode=mode)))
    (reply,) = exchange.answers(body(data, True))
    assert reply.immediate_response.grpc_status.status == 3 and reply.immediate_response.status.code == 400
    assert exchange.is_over and not desk.recorder.newest(1)


def test_refusals_carry_status_and_reason() -> None:
    """None allowed: 14/503. All full: 8/429, when to come back, and google.rpc.Status as any service sends it."""
    desk = Desk()
    replica = desk.add("a", 1)
    message = headers(end_of_stream=True)
    hint = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    hint["x-gateway-destination-endpoint-subset"] = ["10.0.0.9:9"]
    (reply,) = desk.exchange().answers(message)
    assert (reply.immediate_response.grpc_status.status, reply.immediate_response.status.code) == (14, 503)
    desk.table.report_load(replica, Load(running=2))
    (reply,) = desk.exchange().answers(headers(end_of_stream=True))
    local = reply.immediate_response
    assert (local.grpc_status.status, local.status.code) == (8, 429) and b"full" in local.body
    sent = {option.header.key: option.header.raw_value for option in local.headers.set_headers}
    assert sent["retry-after-ms"] == b"250" and sent["autoglm-reason"] == b"TOO_BUSY"
    raw = sent["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(raw + b"=" * (-len(raw) % 4)))
    info = error_details_pb2.ErrorInfo()
    assert status.code == 8 and status.details[0].Unpack(info) and info.metadata["refusal"] == "saturated"


@pytest.mark.parametrize("mode", [FULL_DUPLEX, BUFFERED])
def test_what_the_picker_does_not_know_is_left_to_the_proxy(mode: int) -> None:
    """Without any lease the request passes unchanged and unplaced: the proxy knows its endpoints; counted."""
    desk = Desk()
    before = FALLBACKS.labels("left_to_proxy")._value.get()
    exchange = desk.exchange()
    answers = [*exchange.answers(headers(mode=mode)), *exchange.answers(body(frame(generate()), True))]
    assert not exchange.is_over and not any(answer.HasField("immediate_response") for answer in answers)
    assert not any(answer.HasField("dynamic_metadata") for answer in answers)
    assert FALLBACKS.labels("left_to_proxy")._value.get() == before + 1
    assert desk.recorder.newest(1)[0].decision.refusal == "no_replica"


def test_a_worker_that_drains_is_no_worker_and_the_proxy_may_know_another() -> None:
    """With none but draining ones the request passes unplaced, counted: another cloud may take it."""
    desk = Desk()
    desk.add("a", 1).draining = True
    before = FALLBACKS.labels("left_to_proxy")._value.get()
    answers = [*desk.exchange().answers(headers(end_of_stream=True))]
    assert not any(answer.HasField("immediate_response") for answer in answers)
    assert FALLBACKS.labels("left_to_proxy")._value.get() == before + 1
    assert desk.recorder.newest(1)[0].decision.refusal == "draining"


def test_a_prompt_goes_where_its_prefix_is(desk: Desk) -> None:
    """The worker that reported the prompt's blocks gets it; another tenant's equal prompt matches nothing."""
    ids = list(range(16 * 200))
    hashes = prefix.block_hashes(prefix.scope_key("v", "t", 16), ids, 16)
    holder = desk.table.get("b")
    assert holder is not None
    desk.table.report_prefixes(holder, True, hashes[:150], ())
    exchange = desk.exchange()
    list(exchange.answers(headers()))
    first, *_ = exchange.answers(body(frame(generate(token_ids=ids)), True))
    assert destination(first).split(",")[0] == "10.0.0.1:2"
    record = desk.recorder.newest(1)[0]
    assert [candidate.matched_blocks for candidate in record.candidates] == [0, 150]
    assert record.prefix_hash == hashes[63]
    other = desk.exchange()
    list(other.answers(headers()))
    list(other.answers(body(frame(generate(token_ids=ids, tenant="another")), True)))
    assert [candidate.matched_blocks for candidate in desk.recorder.newest(1)[0].candidates] == [0, 0]


def test_a_score_request_is_placed_by_its_variant(desk: Desk) -> None:
    """Score names a variant as Generate does."""
    desk.add("sparse", 3, variant_digest="s")
    exchange = desk.exchange()
    list(exchange.answers(headers(path=SCORE)))
    request = inference.ScoreRequest(request_id="r", variant_digest="s", token_ids=[1, 2])
    first, *_ = exchange.answers(body(frame(request), True))
    assert destination(first) == "10.0.0.1:3"


def test_a_request_counts_where_it_is_served(desk: Desk) -> None:
    """In flight at the first choice; at the other one when the proxy says that it served; nowhere after the end."""
    exchange = desk.exchange()
    (first,) = exchange.answers(headers(end_of_stream=True))
    chosen, other = destination(first).split(",")
    counts = lambda: {r.registration.endpoint: r.in_flight for r in desk.table.replicas()}  # noqa: E731
    assert counts() == {chosen: 1, other: 0} and not exchange.may_leave
    answer = ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders())
    answer.metadata_context.filter_metadata["envoy.lb"][SERVED] = other
    (reply,) = exchange.answers(answer)
    assert reply == ext_proc.ProcessingResponse(response_headers=ext_proc.HeadersResponse()) and exchange.may_leave
    assert counts() == {chosen: 0, other: 1} and desk.recorder.newest(1)[0].served_endpoint == other
    (reply,) = exchange.answers(ext_proc.ProcessingRequest(response_trailers=ext_proc.HttpTrailers()))
    assert reply == ext_proc.ProcessingResponse(response_trailers=ext_proc.TrailersResponse())
    desk.flight.end()
    assert counts() == {chosen: 0, other: 0}


def test_the_route_and_the_proxy_narrow_the_choice(desk: Desk) -> None:
    """Labels from the call's metadata or from Istio's cluster name, endpoints from the subset hint."""
    desk.add("canary", 3, labels=(("version", "v2"),))
    assert labels_from((("x", "y"), ("x-autoglm-subset-labels", "b=2, a=1"))) == (("a", "1"), ("b", "2"))
    (by_metadata,) = desk.exchange((("version", "v2"),)).answers(headers(end_of_stream=True))
    assert destination(by_metadata) == "10.0.0.1:3"
    message = headers(end_of_stream=True)
    message.attributes["envoy.filters.http.ext_proc"]["xds.cluster_name"] = "outbound|50051|v2|sparse-inference.x"
    (by_cluster,) = desk.exchange().answers(message)
    assert destination(by_cluster) == "10.0.0.1:3"
    message.attributes["envoy.filters.http.ext_proc"]["xds.cluster_name"] = "outbound|50051||sparse-inference.x"
    assert labels_from_cluster(message.attributes) == ()
    message = headers(end_of_stream=True)
    hint = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    hint["x-gateway-destination-endpoint-subset"] = ["10.0.0.1:2", "10.0.0.9:9"]
    (by_hint,) = desk.exchange().answers(message)
    assert destination(by_hint) == "10.0.0.1:2"
    hint["x-gateway-destination-endpoint-subset"] = []
    (none,) = desk.exchange().answers(message)
    assert none.immediate_response.grpc_status.status == 14


def test_the_decision_is_a_span_of_the_callers_trace(desk: Desk) -> None:
    """The request's traceparent is continued by a span that says what was chosen and why it could be."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    desk.picker._tracer = provider.get_tracer("test")
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    exchange = desk.exchange()
    list(exchange.answers(headers(traceparent=parent)))
    first, *_ = exchange.answers(body(frame(generate()), True))
    (span,) = exporter.get_finished_spans()
    facts = span.attributes or {}
    assert span.parent is not None and f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert span.context is not None and f"{span.context.trace_id:032x}" == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert span.name == "schedule" and facts["autoglm.schedule.endpoint"] == destination(first).split(",")[0]
    assert (facts["autoglm.schedule.candidates"], facts["autoglm.schedule.policy_version"]) == (2, "1")


def test_the_deadline_is_read_in_every_unit(desk: Desk) -> None:
    """grpc-timeout in hours down to nanoseconds, at least one millisecond; anything else means none."""
    for text, expected in (
        ("2H", 7_200_000),
        ("3S", 3000),
        ("40m", 40),
        ("1500u", 1),
        ("9n", 1),
        ("12", 0),
        ("-1S", 0),
    ):
        list(desk.exchange().answers(headers(end_of_stream=True, grpc_timeout=text)))
        assert desk.recorder.newest(1)[0].request.deadline_ms == expected
        desk.flight.end()
