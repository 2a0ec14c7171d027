"""The listeners of callers: `outbound` for each account's calls, `ingress` from outside; what the outside may not say.

Whatever changes often is not here: a changed listener is drained, and draining ends long streams.
"""

from collections.abc import Iterable, Mapping

from services.mesh.policy import Policy
from services.mesh.translate.access import access_filters
from services.mesh.translate.edge_filters import CORS_FILTER, edge_filters
from services.mesh.translate.names import (
    DESTINATION_HEADER,
    LISTENER,
    TYPE_URL,
    Json,
    file_name,
    seconds,
    socket_address,
)
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.picker import picker_filter
from services.mesh.translate.rate_limits import rate_limit_filters
from services.mesh.translate.refusals import refusals_at_the_door
from services.mesh.translate.telemetry import access_logs, grpc_stats, tracing
from services.mesh.translate.views import INGRESS_LABELS, View, ingress_workload

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


def outbound_listeners(policy: Policy, views: Iterable[View], node: NodeSettings) -> list[Json]:
    """One per calling account; the picker where it can reach a host that is picked for."""
    result = []
    for view in views:
        picker = picker_filter(view.world, node)
        extra = [picker] if picker is not None else []
        manager = connection_manager(policy, view.name, "envoy-mesh", [*extra, *_FILTERS], _labels(view), node)
        # Only the picker says where a request goes; what a caller wrote there must not survive a picker that is down.
        manager |= {"early_header_mutation_extensions": [_removal((DESTINATION_HEADER,))], **_rds(view.name, node)}
        result.append(listener(view.name, node.upstream_address, view.port, "OUTBOUND", _plain(manager), node))
    return result


def ingress_listener(policy: Policy, view: View, node: NodeSettings) -> Json:
    """The door."""
    access = access_filters(policy, ingress_workload(node), chooses_routes=True)
    before = [*access, *edge_filters(policy, node), *_FILTERS[:-1]]
    filters = [*before, *rate_limit_filters(policy), *_FILTERS[-1:]]  # before the router, as their patch says
    manager = connection_manager(policy, view.name, "envoy-ingress", filters, INGRESS_LABELS, node)
    manager |= {
        "use_remote_address": True,
        "request_headers_timeout": seconds(node.request_headers_timeout_s),
        "early_header_mutation_extensions": [_removal(NOT_FROM_OUTSIDE)],
        **refusals_at_the_door(policy),
        **_rds(view.name, node),
    }
    return listener(view.name, node.listen_address, view.port, "OUTBOUND", _plain(manager), node)


def listener(name: str, address: str, port: int, direction: str, sides: Json, node: NodeSettings) -> Json:
    """A listener; `sides` are its filter chains and what chooses among them."""
    return {
        "@type": LISTENER,
        "name": name,
        "address": socket_address(address, port),
        "per_connection_buffer_limit_bytes": node.buffer_limit_bytes,
        "traffic_direction": direction,
        **sides,
    }


def http_filter(name: str, message: str) -> Json:
    """A filter of Envoy's without settings."""
    return {"name": f"envoy.filters.http.{name}", "typed_config": {"@type": _HTTP + message}}


def connection_manager(
    policy: Policy, name: str, span_service: str, filters: list[Json], labels: Mapping[str, str], node: NodeSettings
) -> Json:
    """What every listener has in common: bounds, access log, tracing. The caller adds the routes.

    `labels` are those of the workload that the listener stands in front of.
    """
    manager: Json = {
        "@type": TYPE_URL + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "AUTO",
        "http_filters": filters,
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


def _labels(view: View) -> Mapping[str, str]:
    """A caller stands for all replicas of its service; what only one of them carries cannot select it."""
    return {"app": view.account} if view.account else {}


def _plain(manager: Json) -> Json:
    network = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {"filter_chains": [{"filters": [network]}]}


def _rds(name: str, node: NodeSettings) -> Json:
    directory = node.run_directory / "rds"
    source = {"path": str(directory / file_name(name)), "watched_directory": {"path": str(directory)}}
    config = {"path_config_source": source, "resource_api_version": "V3"}
    return {"rds": {"route_config_name": name, "config_source": config}}


_FILTERS: tuple[Json, ...] = (
    grpc_stats(),
    http_filter("fault", "fault.v3.HTTPFault"),
    CORS_FILTER,
    http_filter("router", "router.v3.Router"),
)


def _removal(prefixes: tuple[str, ...]) -> Json:
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": TYPE_URL + "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [{"remove_on_match": {"key_matcher": {"prefix": prefix}}} for prefix in prefixes],
        },
    }
