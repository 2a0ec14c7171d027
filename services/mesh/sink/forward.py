"""Passes what the sink receives on to another collector, as it came."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeAlias

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs_pb
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc as logs_rpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_rpc

from services.chassis.telemetry import fallback

FORWARD_TIMEOUT_S = 5.0

Batch: TypeAlias = trace_pb.ExportTraceServiceRequest | logs_pb.ExportLogsServiceRequest


class Forwarder:
    """Sends batches on to another collector. Its slowness costs batches, never the mesh's own traces."""

    def __init__(self, target: str, queue: int) -> None:
        self._queue: asyncio.Queue[Batch] = asyncio.Queue(queue)
        self._channel = grpc.aio.insecure_channel(target)
        self._traces = trace_rpc.TraceServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated without types
        self._logs = logs_rpc.LogsServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated without types
        self._task = asyncio.create_task(self._run())

    def offer(self, batch: Batch) -> None:
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
                await (self._traces if isinstance(batch, trace_pb.ExportTraceServiceRequest) else self._logs).Export(
                    batch, timeout=FORWARD_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                fallback("sink.forward_failed", code=error.code().name)
            finally:
                self._queue.task_done()
