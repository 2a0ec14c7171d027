"""Runs a gRPC service as a good member of the mesh: health, reflection, the edge interceptor, drain on SIGTERM.

A program's `__main__` makes a `Member`, adds its servicers and awaits `run()`. Readiness tells the truth: services are
NOT_SERVING until `ready()` is called and again from the moment a drain begins; the empty name only says alive.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from opentelemetry.instrumentation.grpc import aio_server_interceptor

from services.chassis import telemetry
from services.chassis.interceptors import EdgeInterceptor
from services.chassis.settings import ServiceSettings

log = logging.getLogger("autoglm.serving")

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
"""Same messages and method as v1alpha, which is what the Python package implements; served under both names."""


class Member:
    """One gRPC server with its health. Not reusable: make, add servicers, `run`, gone."""

    def __init__(self, name: str, settings: ServiceSettings, services: Iterable[str]) -> None:
        """`services` are the full names of the gRPC services that will be added, for health and reflection."""
        self.name, self.settings = name, settings
        self.services = tuple(services)
        self.metrics_port = telemetry.start(name, settings)
        self.server = grpc.aio.server(
            interceptors=[aio_server_interceptor(), EdgeInterceptor()],
            options=[
                ("grpc.max_send_message_length", settings.max_message_bytes),
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs,
        )
        self.health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # chosen at import
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        _add_reflection(self.server, (*self.services, health.SERVICE_NAME))
        self.port = self.server.add_insecure_port(f"{settings.bind}:{settings.grpc_port}")
        self.stopping = asyncio.Event()
        self._before_drain: list[Callable[[], Awaitable[None]]] = []

    def before_drain(self, action: Callable[[], Awaitable[None]]) -> None:
        """`action` runs once when a drain begins: health says NOT_SERVING already, calls are still taken."""
        self._before_drain.append(action)

    async def ready(self) -> None:
        """Says SERVING for every service. Call when the model is loaded and the queue is open."""
        for service in ("", *self.services):
            await self.health.set(service, health_pb2.HealthCheckResponse.SERVING)
        log.info("ready", extra={"facts": {"grpc_port": self.port, "metrics_port": self.metrics_port}})

    async def not_ready(self) -> None:
        """Says NOT_SERVING for every named service; the process itself is still alive."""
        for service in self.services:
            await self.health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)

    async def start(self) -> None:
        """Listens; health is NOT_SERVING until `ready`."""
        await self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.not_ready()
        await self.server.start()

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains: unready, stop accepting, finish, close. Call after `start`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        await self.stopping.wait()
        log.info("draining", extra={"facts": {"grace_s": self.settings.drain_grace_s}})
        await self.not_ready()
        for action in self._before_drain:
            await action()
        await self.server.stop(self.settings.drain_grace_s)
        telemetry.stop()
        log.info("stopped")


def _add_reflection(server: grpc.aio.Server, names: tuple[str, ...]) -> None:
    reflection.enable_server_reflection((*names, REFLECTION_V1, reflection.SERVICE_NAME), server)
    servicer = reflection.aio.ReflectionServicer(  # type: ignore[attr-defined]  # chosen at import
        (*names, REFLECTION_V1, reflection.SERVICE_NAME)
    )
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((generic,))
