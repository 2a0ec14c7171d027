"""Every field of every request has a declared bound; what breaks it is refused before any service code runs."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from autoglm.cache.v1 import cache_pb2
from autoglm.gateway.v1 import gateway_pb2
from autoglm.scheduler.v1 import scheduler_pb2
from autoglm.sparse_inference.v1 import sparse_inference_pb2
from autoglm.tokenizer.v1 import tokenizer_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from services.chassis.bounds import bounds_of, violations
from services.chassis.errors import NotFound
from services.chassis.interceptors import EdgeInterceptor

MODULES = (gateway_pb2, tokenizer_pb2, scheduler_pb2, sparse_inference_pb2, cache_pb2)
SERVICES: tuple[ServiceDescriptor, ...] = tuple(
    service for module in MODULES for service in module.DESCRIPTOR.services_by_name.values()
)
METHODS: tuple[MethodDescriptor, ...] = tuple(method for service in SERVICES for method in service.methods)
FREE = {FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM, FieldDescriptor.TYPE_MESSAGE}
INTEGERS = {
    FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64,
}  # fmt: skip
FLOATS = {FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE}


@dataclass(frozen=True)
class Case:
    """One field of one request, reached over `path` from the request's root."""

    method: MethodDescriptor
    path: tuple[FieldDescriptor, ...]

    def __str__(self) -> str:
        return f"{self.method.name}:{'.'.join(field.name for field in self.path)}"


def fields(descriptor: Descriptor, above: tuple[FieldDescriptor, ...] = ()) -> Iterator[tuple[FieldDescriptor, ...]]:
    for field in descriptor.fields:
        yield (*above, field)
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from fields(field.message_type, (*above, field))


CASES = [Case(method, path) for method in METHODS for path in fields(method.input_type)]


def valid(descriptor: Descriptor) -> Message:
    """A message that keeps every bound with the smallest content."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        bounds = bounds_of(field)
        if bounds is None or field.containing_oneof is not None:
            continue
        if field.is_repeated:
            for _ in range(bounds.min_items):
                if field.message_type is not None:
                    getattr(message, field.name).add().CopyFrom(valid(field.message_type))
                else:
                    getattr(message, field.name).append(_smallest(field))
        elif field.message_type is not None:
            if bounds.required:
                getattr(message, field.name).CopyFrom(valid(field.message_type))
        elif bounds.min_bytes or bounds.min:
            setattr(message, field.name, _smallest(field))
    return message


def _smallest(field: FieldDescriptor) -> Any:
    bounds = bounds_of(field)
    assert bounds is not None
    if field.type == FieldDescriptor.TYPE_BYTES:
        return b"x" * bounds.min_bytes
    if field.type == FieldDescriptor.TYPE_STRING:
        return "x" * bounds.min_bytes
    return bounds.min


def holder(case: Case) -> tuple[Message, Message]:
    """(request, innermost message that has the field), everything around it valid."""
    request = inner = valid(case.method.input_type)
    for field in case.path[:-1]:
        assert field.message_type is not None
        child = valid(field.message_type)
        if field.is_repeated:
            repeated = getattr(inner, field.name)
            del repeated[:]
            repeated.add().CopyFrom(child)
            inner = repeated[0]
        else:
            getattr(inner, field.name).CopyFrom(child)
            inner = getattr(inner, field.name)
    return request, inner


def put(message: Message, field: FieldDescriptor, value: Any) -> bool:
    """Sets the field to `value`; False when the type itself cannot hold it."""
    try:
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    except (ValueError, TypeError):
        return False
    return True


def bad_values(field: FieldDescriptor) -> Iterator[Any]:
    bounds = bounds_of(field)
    assert bounds is not None
    if field.type in INTEGERS:
        yield from (value for value in (bounds.max + 1, -1, 2**31, 2**63) if not bounds.min <= value <= bounds.max)
    elif field.type in FLOATS:
        yield from (math.nan, math.inf, -math.inf, bounds.float_max + 1, bounds.float_min - 1)
    elif field.type == FieldDescriptor.TYPE_STRING:
        yield "x" * (bounds.max_bytes + 1)
        yield "é" * (bounds.max_bytes // 2 + 1)
        if bounds.min_bytes:
            yield "x" * (bounds.min_bytes - 1)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        yield b"x" * (bounds.max_bytes + 1)
        if bounds.min_bytes:
            yield b"x" * (bounds.min_bytes - 1)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.DESCRIPTOR.name)
def test_every_field_declares_its_bounds(module: Any) -> None:
    """No number, text or list without a limit, in requests and responses alike."""
    missing = []
    for message in module.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            bounds = bounds_of(field)
            if bounds is None:
                if field.type not in FREE or field.is_repeated:
                    missing.append(field.full_name)
                continue
            wanted = ["max_items"] if field.is_repeated else []
            wanted += ["max"] if field.type in INTEGERS else []
            wanted += ["float_min", "float_max"] if field.type in FLOATS else []
            wanted += ["max_bytes"] if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES) else []
            missing += [f"{field.full_name}: {name}" for name in wanted if not bounds.HasField(name)]
    assert missing == []


@pytest.fixture(scope="module")
def reached() -> list[Message]:
    """Requests that came through to the services."""
    return []


@pytest.fixture
async def channel(reached: list[Message]) -> AsyncIterator[grpc.aio.Channel]:
    """A server with every method of every service behind the chassis's interceptor."""
    server = grpc.aio.server(interceptors=[EdgeInterceptor()], options=[("grpc.max_receive_message_length", 64 << 20)])

    def handler(method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        async def one(request: Any, context: Any) -> Any:
            reached.append(request)
            raise NotFound("reached the service")

        async def each(requests: Any, context: Any) -> Any:
            async for request in requests:
                reached.append(request)
            raise NotFound("reached the service")

        async def many(request: Any, context: Any) -> Any:
            reached.append(request)
            raise NotFound("reached the service")
            yield

        async def each_many(requests: Any, context: Any) -> Any:
            async for request in requests:
                reached.append(request)
            raise NotFound("reached the service")
            yield

        make: Any = {
            (False, False): lambda **k: grpc.unary_unary_rpc_method_handler(one, **k),
            (False, True): lambda **k: grpc.unary_stream_rpc_method_handler(many, **k),
            (True, False): lambda **k: grpc.stream_unary_rpc_method_handler(each, **k),
            (True, True): lambda **k: grpc.stream_stream_rpc_method_handler(each_many, **k),
        }[(method.client_streaming, method.server_streaming)]
        kind = message_factory.GetMessageClass(method.input_type)
        made: grpc.RpcMethodHandler[Any, Any] = make(request_deserializer=kind.FromString)
        return made

    for service in SERVICES:
        handlers = {method.name: handler(method) for method in service.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = [("grpc.max_send_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as opened:
        yield opened
    await server.stop(None)


async def send(channel: grpc.aio.Channel, method: MethodDescriptor, data: bytes) -> tuple[grpc.StatusCode, str]:
    """The status of one call with `data` as its (first) request."""
    assert method.containing_service is not None
    path = f"/{method.containing_service.full_name}/{method.name}"
    call: Any = channel.stream_stream(path) if method.client_streaming else channel.unary_stream(path)
    stream = call(iter([data])) if method.client_streaming else call(data)
    try:
        async for _ in stream:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_the_smallest_valid_request_reaches_the_service(
    channel: grpc.aio.Channel, method: MethodDescriptor
) -> None:
    """The guard lets valid requests through: a guard that refuses everything would pass the other tests."""
    status, _ = await send(channel, method, valid(method.input_type).SerializeToString())
    assert status is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_broken_bounds_are_refused(
    channel: grpc.aio.Channel, reached: list[Message], method: MethodDescriptor
) -> None:
    """max+1, -1, NaN, infinities, 2^31, 2^63, one byte or element too many or too few: INVALID_ARGUMENT, and named."""
    tried = 0
    for case in (case for case in CASES if case.method is method):
        field = case.path[-1]
        bounds = bounds_of(field)
        if bounds is None:
            continue
        attempts: list[Message] = []
        if not (field.message_type is not None and field.message_type.GetOptions().map_entry):
            for value in bad_values(field):
                request, inner = holder(case)
                if put(inner, field, value):
                    attempts.append(request)
        if field.is_repeated and field.type in INTEGERS:
            request, inner = holder(case)
            getattr(inner, field.name).extend([1] * (bounds.max_items + 1))
            attempts.append(request)
        if field.is_repeated and bounds.min_items:
            request, inner = holder(case)
            inner.ClearField(field.name)
            attempts.append(request)
        reached.clear()
        for attempt in attempts:
            status, text = await send(channel, method, attempt.SerializeToString())
            assert status is grpc.StatusCode.INVALID_ARGUMENT, f"{case}: {status}"
            assert field.name in text, f"{case}: {text!r} does not name the field"
            tried += 1
        assert not reached, f"{case}: a refused request reached the service"
    assert (
        tried or not method.input_type.fields or all(bounds_of(c.path[-1]) is None for c in CASES if c.method is method)
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_numbers_the_type_cannot_hold_never_arrive_out_of_bounds(
    channel: grpc.aio.Channel, reached: list[Message], method: MethodDescriptor
) -> None:
    """-1, 2^31, 2^63 as raw varints in integer fields: refused, or cut by protobuf to a value inside the bounds."""
    reached.clear()
    for field in method.input_type.fields:
        if field.type not in INTEGERS or field.is_repeated:
            continue
        for number in (-1, 2**31, 2**63):
            data = valid(method.input_type).SerializeToString() + varint(field.number << 3) + varint(number % 2**64)
            status, _ = await send(channel, method, data)
            assert status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert all(not violations(message) for message in reached)


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x08", b"\x0f"], ids=repr)
async def test_malformed_bytes_are_the_callers_fault(channel: grpc.aio.Channel, data: bytes) -> None:
    """Truncated varints, absurd lengths and wrong wire types get INVALID_ARGUMENT; the connection lives on."""
    for method in METHODS:
        status, _ = await send(channel, method, data)
        assert status is grpc.StatusCode.INVALID_ARGUMENT, method.full_name
    status, _ = await send(channel, METHODS[0], valid(METHODS[0].input_type).SerializeToString())
    assert status is grpc.StatusCode.NOT_FOUND


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)
