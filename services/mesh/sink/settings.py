"""Settings of the trace sink."""

from __future__ import annotations

from pydantic import Field

from services.chassis.settings import Port, ServiceSettings


class SinkSettings(ServiceSettings):
    """How much is kept, and who else gets it."""

    query_port: Port = Field(0, description="port of the JSON query page; 0 takes a free one and prints it")
    sink_spans: int = Field(50_000, ge=1, le=10_000_000, description="most spans kept; the oldest traces go first")
    sink_bytes: int = Field(64 << 20, ge=4096, le=1 << 34, description="about the most memory the spans may take")
    sink_trace_spans: int = Field(5_000, ge=1, le=1_000_000, description="most spans of one trace; more are dropped")
    sink_log_records: int = Field(10_000, ge=1, le=1_000_000, description="most access log records kept")
    otlp_forward: str = Field("", description="host:port of another OTLP/gRPC collector that gets every batch too")
    sink_forward_queue: int = Field(64, ge=1, le=10_000, description="batches that may wait for the other collector")
