"""Access log records that come over OTLP: the newest are kept by trace, so that a trace can show what Envoy logged."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as service
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc as service_grpc
from prometheus_client import Counter

from services.mesh.sink.attributes import MAX_TEXT, attributes, text
from services.mesh.sink.forward import Forwarder

SERVICE = "opentelemetry.proto.collector.logs.v1.LogsService"
TRACE_RECORDS = 200
"""Most records kept of one trace."""

RECEIVED = Counter("autoglm_sink_log_records_total", "Access log records received")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a log."""

    trace_id: str
    service: str
    time_ns: int
    body: str
    attributes: Mapping[str, str] = field(default_factory=dict)


class LogStore:
    """The newest records, at most `limit` of them. Thread-safe: gRPC writes, the query page reads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._traces: OrderedDict[str, list[Record]] = OrderedDict()
        self._count = 0

    def add(self, record: Record) -> None:
        """Keeps it; the records of the oldest traces make room."""
        with self._lock:
            kept = self._traces.setdefault(record.trace_id, [])
            self._traces.move_to_end(record.trace_id)
            if len(kept) >= TRACE_RECORDS:
                return
            kept.append(record)
            self._count += 1
            while self._count > self._limit:
                self._count -= len(self._traces.popitem(last=False)[1])

    def of(self, trace_id: str) -> list[dict[str, Any]]:
        """The records of a trace, earliest first, as JSON."""
        with self._lock:
            kept = list(self._traces.get(trace_id, ()))
        return [asdict(record) for record in sorted(kept, key=lambda record: record.time_ns)]


class LogSink(service_grpc.LogsServiceServicer):
    """The OTLP log service."""

    def __init__(self, store: LogStore, forwarder: Forwarder | None = None) -> None:
        self._store, self._forwarder = store, forwarder

    async def Export(
        self, request: service.ExportLogsServiceRequest, context: Any
    ) -> service.ExportLogsServiceResponse:
        """Takes every record; one without a trace is counted and passed on, but not kept."""
        for record in _records(request):
            RECEIVED.inc()
            if record.trace_id:
                self._store.add(record)
        if self._forwarder is not None:
            self._forwarder.offer(request)
        return service.ExportLogsServiceResponse()


def _records(request: service.ExportLogsServiceRequest) -> Iterator[Record]:
    for resource in request.resource_logs:
        about = attributes(resource.resource.attributes)
        for scope in resource.scope_logs:
            for record in scope.log_records:
                yield Record(
                    trace_id=record.trace_id.hex() if len(record.trace_id) == 16 and any(record.trace_id) else "",
                    service=about.get("service.name", "unknown"),
                    time_ns=record.time_unix_nano,
                    body=text(record.body)[:MAX_TEXT],
                    attributes=attributes(record.attributes),
                )
