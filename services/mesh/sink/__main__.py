"""`python -m services.mesh.sink`: receives the mesh's traces and answers questions about them."""

from __future__ import annotations

import logging

import uvloop
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from services.chassis.serving import Member
from services.chassis.settings import read
from services.mesh.sink import logs
from services.mesh.sink.forward import Forwarder
from services.mesh.sink.logs import LogSink, LogStore
from services.mesh.sink.query import QueryPage
from services.mesh.sink.server import SERVICE, TraceSink
from services.mesh.sink.settings import SinkSettings
from services.mesh.sink.store import Bounds, TraceStore


async def main() -> None:
    settings = read(SinkSettings)
    member = Member("trace-sink", settings, [SERVICE, logs.SERVICE])
    store = TraceStore(Bounds(settings.sink_spans, settings.sink_bytes, settings.sink_trace_spans))
    forwarder = Forwarder(settings.otlp_forward, settings.sink_forward_queue) if settings.otlp_forward else None
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]  # generated without types
        TraceSink(store, forwarder), member.server
    )
    records = LogStore(settings.sink_log_records)
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(  # type: ignore[no-untyped-call]  # generated without types
        LogSink(records, forwarder), member.server
    )
    page = QueryPage(store, records, settings.bind, settings.query_port)
    logging.getLogger("autoglm.sink").info("listening", extra={"facts": {"query_port": page.port}})
    await member.start()
    await member.ready()
    await member.run()
    page.close()
    if forwarder is not None:
        await forwarder.close()


if __name__ == "__main__":
    uvloop.run(main())
