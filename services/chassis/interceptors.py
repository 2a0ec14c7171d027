"""The server's edge: what happens around every call before and after the service's own code.

In order: refuse malformed bytes and broken bounds, note the deadline, run the method, turn exceptions into statuses
from the one table, measure and log. Nobody else aborts a call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError, Message
from opentelemetry import trace

from services.chassis import bounds, deadlines, residency
from services.chassis.errors import Internal, InvalidRequest, OutOfTime, ServiceError, status_of
from services.chassis.telemetry import RPC_IN_FLIGHT, RPC_SECONDS

log = logging.getLogger("autoglm.rpc")

TRACE_ID = "x-trace-id"
"""Trailing metadata of every failed call: which trace to look at."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class _Malformed:
    """Stands for a request whose bytes are no message of the expected type."""


class EdgeInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Wraps every method of every service on the server."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        return handler if handler is None else _wrap(handler_call_details.method, handler)


def _wrap(method: str, handler: Handler) -> Handler:
    inner = (
        (handler.stream_stream if handler.response_streaming else handler.stream_unary)
        if handler.request_streaming
        else (handler.unary_stream if handler.response_streaming else handler.unary_unary)
    )
    call = cast("Callable[[Any, Context], Any]", inner)

    def checked(request: Any) -> Any:
        if handler.request_streaming:
            return _each_checked(request)
        _check(request)
        return request

    async def unary(request: Any, context: Context) -> Any:
        async with _Call(method, context):
            return await call(checked(request), context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        async with _Call(method, context):
            answer = call(checked(request), context)
            if not hasattr(answer, "__aiter__"):  # a servicer that writes to the context instead of yielding
                await answer
                return
            async for message in answer:
                yield message

    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(handler.request_streaming, handler.response_streaming)]
    wrapped: Handler = make(
        stream if handler.response_streaming else unary,
        request_deserializer=_lenient(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )
    return wrapped


class _Call:
    """One call: deadline, in-flight gauge, exception → status, duration, log line."""

    def __init__(self, method: str, context: Context) -> None:
        self.method, self.context = method, context
        self.started = time.monotonic()

    async def __aenter__(self) -> None:
        remaining = self.context.time_remaining()
        # Without a deadline gRPC reports a time far in the future.
        deadlines.start(remaining if remaining is not None and remaining < 10 * 365 * 86400 else None)
        residency.start(residency.of(self.context.invocation_metadata()))
        RPC_IN_FLIGHT.labels(self.method).inc()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        RPC_IN_FLIGHT.labels(self.method).dec()
        if error is None or isinstance(error, GeneratorExit):
            self._done("OK" if error is None else "CANCELLED")
        elif isinstance(error, asyncio.CancelledError):
            self._done("CANCELLED")
        elif isinstance(error, ServiceError):
            await self._abort(error)
        elif isinstance(error, TimeoutError):
            await self._abort(OutOfTime("the deadline passed before the answer was ready"))
        elif isinstance(error, grpc.aio.AbortError):
            self._done("ABORTED")
        elif isinstance(error, Exception):
            log.exception("unexpected failure in %s", self.method, exc_info=error)
            await self._abort(Internal("internal error; the service's log has the details"))

    async def _abort(self, error: ServiceError) -> NoReturn:
        code, text, trailers = status_of(error)
        self._done(code.name, reason=text)
        earlier = tuple(self.context.trailing_metadata() or ())
        if not any(key == TRACE_ID for key, _ in earlier):  # refused before the service could say it
            trailers = (*trailers, (TRACE_ID, f"{trace.get_current_span().get_span_context().trace_id:032x}"))
        await self.context.abort(code, text, (*earlier, *trailers))
        raise AssertionError("abort returned")

    def _done(self, code: str, **facts: object) -> None:
        elapsed = time.monotonic() - self.started
        RPC_SECONDS.labels(self.method, code).observe(elapsed)
        level = logging.DEBUG if code in ("OK", "CANCELLED") else logging.INFO
        log.log(
            level, "rpc", extra={"facts": {"method": self.method, "code": code, "ms": round(elapsed * 1e3, 1)} | facts}
        )


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """gRPC answers INTERNAL when a deserializer raises; a malformed request is the caller's fault, not ours."""
    if deserialize is None:
        return None

    def attempt(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return attempt


def _check(request: Any) -> None:
    if isinstance(request, _Malformed):
        raise InvalidRequest("the request is not a valid protobuf message of the expected type")
    if isinstance(request, Message) and (broken := bounds.violations(request)):
        raise InvalidRequest("; ".join(str(violation) for violation in broken), field=broken[0].path)


async def _each_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        _check(request)
        yield request
