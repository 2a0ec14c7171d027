"""Outgoing calls: one channel per host, all through Envoy, each spending what is left of the incoming deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from services.chassis import deadlines, residency
from services.chassis.errors import OutOfTime
from services.chassis.settings import ServiceSettings
from services.chassis.tracing import client_interceptors

KEEPALIVE_MS = 20_000
"""Finds a silently dead peer; gRPC servers accept no more than one ping per 10 s from an idle client."""


def connect(settings: ServiceSettings, service: str) -> grpc.aio.Channel:
    """A channel to `service` through Envoy (outbound listener or sidecar), which routes by the :authority header."""
    options: list[tuple[str, Any]] = [
        ("grpc.default_authority", settings.host(service)),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_retries", 0),  # retries are the mesh's business, stated once in istio/base
    ]
    margin_s = settings.hop_margin_ms / 1000
    interceptors: list[Any] = [*deadline_interceptors(margin_s), *client_interceptors()]
    return grpc.aio.insecure_channel(settings.target(service), options=options, interceptors=interceptors)


def deadline_interceptors(margin_s: float) -> list[Any]:
    """Interceptors for the four kinds of call that set the timeout from the incoming call's deadline."""
    return [_UnaryUnary(margin_s), _UnaryStream(margin_s), _StreamUnary(margin_s), _StreamStream(margin_s)]


class _Deadline:
    def __init__(self, margin_s: float) -> None:
        self._margin_s = margin_s

    async def _go(
        self, continuation: Callable[[Any, Any], Any], details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        timeout = deadlines.for_next_hop(self._margin_s, details.timeout)
        if timeout is not None and timeout <= 0:
            raise OutOfTime("no time was left for the next service", hop=details.method)
        return await continuation(
            grpc.aio.ClientCallDetails(
                details.method, timeout, _with_region(details.metadata), details.credentials, details.wait_for_ready
            ),
            request,
        )


def _with_region(metadata: grpc.aio.Metadata | None) -> grpc.aio.Metadata | None:
    region = residency.current()
    if not region:
        return metadata
    return grpc.aio.Metadata(*(metadata or ()), (residency.HEADER, region))


class _UnaryUnary(_Deadline, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._go(continuation, client_call_details, request)


class _UnaryStream(_Deadline, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._go(continuation, client_call_details, request)


class _StreamUnary(_Deadline, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._go(continuation, client_call_details, request_iterator)


class _StreamStream(_Deadline, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._go(continuation, client_call_details, request_iterator)
