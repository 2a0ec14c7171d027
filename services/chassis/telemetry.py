"""Logs, metrics and traces of a mesh member: one JSON line per event, a Prometheus page, OTLP spans.

`start` is called once from `__main__`. Nothing here ever sees a prompt or an answer.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import Counter, Gauge, Histogram

from services.chassis import metrics_page
from services.chassis.settings import ServiceSettings

SPAN_DELAY_MS = 200
"""Spans leave in batches this old; short, so that a trace can be shown right after its request."""

RPC_SECONDS = Histogram(
    "autoglm_rpc_duration_seconds",
    "Time from the arrival of a call to its status",
    ["method", "code"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
RPC_IN_FLIGHT = Gauge("autoglm_rpc_in_flight", "Calls being served", ["method"])
FALLBACKS = Counter(
    "autoglm_fallback_total", "Times the service did something other than it was asked to, by kind", ["kind"]
)


def start(service: str, settings: ServiceSettings, **attributes: str) -> int:
    """Sets up logs, traces and the metrics page. Returns the page's port. Call once per process."""
    start_logging(service, settings)
    resource = Resource.create(
        {"service.name": service, "service.namespace": settings.namespace, "service.instance.id": settings.instance}
        | attributes
    )
    provider = TracerProvider(resource=resource)
    if settings.otlp_endpoint:
        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=True, timeout=5)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=SPAN_DELAY_MS))
    trace.set_tracer_provider(provider)
    return metrics_page.serve(settings.bind, settings.metrics_port)


def stop() -> None:
    """Sends the last spans."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


def fallback(kind: str, **facts: object) -> None:
    """Counts a fallback, notes it on the current span and logs it: no fallback is silent."""
    FALLBACKS.labels(kind=kind).inc()
    attributes = {key: str(value) for key, value in facts.items()}
    trace.get_current_span().add_event(f"fallback.{kind}", attributes)
    logging.getLogger("autoglm.fallback").warning(kind, extra={"facts": attributes})


class JsonFormatter(logging.Formatter):
    """One JSON object per line; `extra={"facts": {...}}` adds fields."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._fixed = {"service": service, "instance": instance}

    def format(self, record: logging.LogRecord) -> str:
        context = trace.get_current_span().get_span_context()
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            **self._fixed,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if context.is_valid:
            entry["trace_id"] = f"{context.trace_id:032x}"
        entry |= getattr(record, "facts", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def start_logging(service: str, settings: ServiceSettings) -> None:
    """Only the log lines, for a program that serves nothing itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service, settings.instance))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    # Its only message says that a context was left from another task than entered it: so it is with every cancelled
    # stream, whose generator is closed by the server. Nothing is lost; an ERROR with a traceback per cancel would be.
    logging.getLogger("opentelemetry.context").setLevel(logging.CRITICAL)
