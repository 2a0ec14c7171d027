"""Telemetry → what a listener's connection manager says of its requests: spans, access logs, gRPC statistics.

`listeners` asks once per listener, with the labels of the workload that it stands in front of. The file access log is
this machine's and on unless the policy switches the provider `envoy` off; everything else is the policy's.
"""

from collections.abc import Iterable, Mapping

from autoglm.cache.v1 import cache_pb2
from autoglm.gateway.v1 import gateway_pb2
from autoglm.scheduler.v1 import scheduler_pb2
from autoglm.sparse_inference.v1 import sparse_inference_pb2
from autoglm.tokenizer.v1 import tokenizer_pb2
from google.protobuf.descriptor import FileDescriptor

from services.mesh.policy import Policy
from services.mesh.policy.telemetry import AccessLogging, CustomTag, Effective, effective
from services.mesh.translate.names import TYPE_URL, Json
from services.mesh.translate.node import NodeSettings

OTLP_CLUSTER = "otlp"
ACCESS_LOG = "access.log"
FILE, OTEL = "envoy", "otel"
_LOGGERS = TYPE_URL + "envoy.extensions.access_loggers."
_FIELDS = {
    "start": "%START_TIME%",
    "trace_id": "%TRACE_ID%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "method": "%REQ(:METHOD)%",
    "authority": "%REQ(:AUTHORITY)%",
    "path": "%REQ(:PATH):256%",
    "status": "%RESPONSE_CODE%",
    "grpc_status": "%GRPC_STATUS%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "duration_ms": "%DURATION%",
    "bytes_in": "%BYTES_RECEIVED%",
    "bytes_out": "%BYTES_SENT%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "cluster": "%UPSTREAM_CLUSTER_RAW%",
    "upstream": "%UPSTREAM_HOST%",
    "peer": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "peer_identity": "%DOWNSTREAM_PEER_URI_SAN%",
}
_COUNTED: tuple[FileDescriptor, ...] = (
    cache_pb2.DESCRIPTOR,
    gateway_pb2.DESCRIPTOR,
    scheduler_pb2.DESCRIPTOR,
    sparse_inference_pb2.DESCRIPTOR,
    tokenizer_pb2.DESCRIPTOR,
)
STATS_TAGS: tuple[Json, ...] = (
    {"tag_name": "grpc_status", "regex": r"\.grpc(?:\..+)?(\.(\d+))$"},
    {
        "tag_name": "grpc_method",
        "regex": r"\.grpc(\.(.+))\.(?:\d+|success|failure|total|request_message_count|response_message_count)$",
    },
    {"tag_name": "listener_address", "regex": r"^listener\.(([0-9_.]+|\[[0-9a-fA-F_:]+\]_[0-9]+)\.)"},
    {"tag_name": "certificate", "regex": r"\.ssl\.certificate(\.(.+))\.expiration_unix_time_seconds$"},
    {
        "tag_name": "route_config",
        "regex": r"\.rds(\.(.+))\.(?:config_reload|config_reload_time_ms|update_.+|version|init_fetch_timeout)$",
    },
)
"""Make `envoy_cluster_grpc{cluster_name,grpc_method,grpc_status}` of `cluster.<name>;.grpc.<service>.<method>.<code>`.

What is not on the list of counted methods has no `grpc_method`. Likewise when certificates expire, by name, and whether
routes were taken, by route configuration.
"""


def tracing(policy: Policy, node: NodeSettings, span_service: str, labels: Mapping[str, str]) -> Json:
    """The `tracing` block, or nothing: no collector, or the policy switches the reports off."""
    said = effective(policy.telemetries, labels).tracing
    if not node.otlp_endpoint or said.disable_span_reporting:
        return {}
    sampling = said.random_sampling_percentage
    block: Json = {
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": {
                "@type": TYPE_URL + "envoy.config.trace.v3.OpenTelemetryConfig",
                "grpc_service": _collector(),
                "service_name": span_service,
            },
        },
        "client_sampling": {"value": 100},
        "random_sampling": {"value": node.tracing_sampling_percent if sampling is None else sampling},
        "overall_sampling": {"value": 100},
        "spawn_upstream_span": True,
    }
    if said.custom_tags:
        block["custom_tags"] = [_tag(name, tag) for name, tag in sorted(said.custom_tags.items())]
    return {"tracing": block}


def access_logs(policy: Policy, node: NodeSettings, listener: str, labels: Mapping[str, str]) -> list[Json]:
    """The access loggers of one listener."""
    said = effective(policy.telemetries, labels)
    logs = [_file_log(node, listener) | _filter(entry) for entry in _entries(said, FILE, default=True)]
    if node.otlp_endpoint:
        logs += [_otel_log(listener) | _filter(entry) for entry in _entries(said, OTEL, default=False)]
    return logs


def grpc_stats() -> Json:
    """The filter that counts gRPC statuses: by method for the methods of our own services, whose names are bounded."""
    services = [
        {"name": service.full_name, "method_names": sorted(method.name for method in service.methods)}
        for file in _COUNTED
        for service in file.services_by_name.values()
    ]
    return {
        "name": "envoy.filters.http.grpc_stats",
        "typed_config": {
            "@type": TYPE_URL + "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
            "emit_filter_state": True,
            "individual_method_stats_allowlist": {"services": services},
        },
    }


def _entries(said: Effective, provider: str, *, default: bool) -> Iterable[AccessLogging]:
    """Those that speak of `provider`; an entry without providers means the file, Envoy's own log."""
    mine = [
        entry
        for entry in said.access_logging
        if any(item.name == provider for item in entry.providers) or (not entry.providers and provider == FILE)
    ]
    if not mine:
        return [AccessLogging()] if default else []
    return [] if any(entry.disabled for entry in mine) else mine


def _file_log(node: NodeSettings, listener: str) -> Json:
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": _LOGGERS + "file.v3.FileAccessLog",
            "path": str(node.run_directory / ACCESS_LOG),
            "log_format": {"json_format": {"listener": listener, **_FIELDS}},
        },
    }


def _otel_log(listener: str) -> Json:
    """A log record per request, in the trace of the request: Envoy fills in trace and span ids itself."""
    attributes = {"listener": listener} | {name: form for name, form in _FIELDS.items() if name != "trace_id"}
    return {
        "name": "envoy.access_loggers.open_telemetry",
        "typed_config": {
            "@type": _LOGGERS + "open_telemetry.v3.OpenTelemetryAccessLogConfig",
            "grpc_service": _collector(),
            "log_name": f"envoy-{listener}",
            "resource_attributes": {"values": [_text("service.name", f"envoy-{listener}")]},
            "body": {"string_value": "%REQ(:METHOD)% %REQ(:PATH):256% %RESPONSE_CODE%"},
            "attributes": {"values": [_text(name, form) for name, form in attributes.items()]},
        },
    }


def _filter(entry: AccessLogging) -> Json:
    if entry.filter is None:
        return {}
    typed = {"@type": _LOGGERS + "filters.cel.v3.ExpressionFilter", "expression": entry.filter.expression}
    return {
        "filter": {"extension_filter": {"name": "envoy.access_loggers.extension_filters.cel", "typed_config": typed}}
    }


def _tag(name: str, tag: CustomTag) -> Json:
    if tag.literal is not None:
        return {"tag": name, "literal": {"value": tag.literal.value}}
    if tag.formatter is not None:
        return {"tag": name, "value": tag.formatter.value}
    source, kind = (tag.header, "request_header") if tag.header is not None else (tag.environment, "environment")
    assert source is not None  # the model admits exactly one of four
    named: Json = {"name": source.name}
    if source.default_value is not None:
        named["default_value"] = source.default_value
    return {"tag": name, kind: named}


def _collector() -> Json:
    return {"envoy_grpc": {"cluster_name": OTLP_CLUSTER}, "timeout": "0.250s"}


def _text(key: str, value: str) -> Json:
    return {"key": key, "value": {"string_value": value}}
