"""The two listeners: `outbound` between services, `ingress` from outside; and what the outside may not say.

Whatever changes often is not here: a changed listener is drained, and draining ends long streams.
"""

from collections.abc import Mapping

from services.mesh.policy import Policy
from services.mesh.translate.names import DESTINATION_HEADER, LISTENER, TYPE_URL, Json, seconds, socket_address
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.picker import picker_filter
from services.mesh.translate.routes import FAULT, INGRESS, OUTBOUND
from services.mesh.translate.telemetry import access_logs, grpc_stats, tracing
from services.mesh.translate.world import World

NOT_FROM_OUTSIDE = (
    "x-autoglm-",  # ours: tenant, variant, resume position
    "x-gateway-",  # endpoint picker protocol: destination, subset hint, fairness, objective
    "x-llm-d-",  # the same in llm-d's newer spelling
    "x-slo-",
    "x-prefiller-",
    "x-encoder-hosts-",
    "x-envoy-",  # timeouts, retries, tracing decisions
    "test-epp-",  # conformance aid that names the endpoint to use
)
"""Prefixes of request headers removed at the ingress before anything reads them."""
_HTTP = TYPE_URL + "envoy.extensions.filters.http."


def listeners(policy: Policy, world: World, node: NodeSettings) -> list[Json]:
    """`outbound` always, `ingress` where a Gateway is defined."""
    picker = picker_filter(world, node)
    outbound = _manager(policy, OUTBOUND, "envoy-mesh", [picker] if picker is not None else [], {}, node)
    # Only the picker says where a request goes; what a caller wrote there must not survive a picker that is down.
    outbound["early_header_mutation_extensions"] = [_removal((DESTINATION_HEADER,))]
    result = [_listener(OUTBOUND, node.outbound_port, outbound, node)]
    if policy.gateways:
        ingress = _manager(policy, INGRESS, "envoy-ingress", [], policy.gateways[0].spec.selector, node)
        ingress |= {
            "use_remote_address": True,
            "request_headers_timeout": seconds(node.request_headers_timeout_s),
            "early_header_mutation_extensions": [_removal(NOT_FROM_OUTSIDE)],
        }
        result.append(_listener(INGRESS, node.ingress_port, ingress, node))
    return result


def _listener(name: str, port: int, manager: Json, node: NodeSettings) -> Json:
    network = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {
        "@type": LISTENER,
        "name": name,
        "address": socket_address(node.listen_address, port),
        "per_connection_buffer_limit_bytes": node.buffer_limit_bytes,
        "traffic_direction": "OUTBOUND",
        "filter_chains": [{"filters": [network]}],
    }


def _manager(
    policy: Policy, name: str, span_service: str, extra: list[Json], labels: Mapping[str, str], node: NodeSettings
) -> Json:
    directory = node.run_directory / "rds"
    manager: Json = {
        "@type": TYPE_URL + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "AUTO",
        "rds": {
            "route_config_name": name,
            "config_source": {
                "path_config_source": {
                    "path": str(directory / f"{name}.json"),
                    "watched_directory": {"path": str(directory)},
                },
                "resource_api_version": "V3",
            },
        },
        "http_filters": [*extra, *_FILTERS],
        "access_log": access_logs(policy, node, name, labels),
        "stream_idle_timeout": "0s",
        "request_timeout": "0s",
        "common_http_protocol_options": {
            "idle_timeout": seconds(node.connection_idle_timeout_s),
            "max_headers_count": node.max_request_headers,
        },
        "http2_protocol_options": {"max_concurrent_streams": node.max_concurrent_streams},
        "max_request_headers_kb": node.max_request_headers_kb,
        "normalize_path": True,
        "merge_slashes": False,
        "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
        "use_remote_address": False,
        "generate_request_id": True,
    }
    return manager | tracing(policy, node, span_service, labels)


_FILTERS: tuple[Json, ...] = (
    grpc_stats(),
    {"name": FAULT, "typed_config": {"@type": _HTTP + "fault.v3.HTTPFault"}},
    {"name": "envoy.filters.http.router", "typed_config": {"@type": _HTTP + "router.v3.Router"}},
)


def _removal(prefixes: tuple[str, ...]) -> Json:
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": TYPE_URL + "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [{"remove_on_match": {"key_matcher": {"prefix": prefix}}} for prefix in prefixes],
        },
    }
