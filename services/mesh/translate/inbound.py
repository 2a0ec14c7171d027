"""The inbound side of a sidecar: a listener per process and port, which lets callers in and passes on to the loopback.

Istio's semantics: no timeout, no retries; the process learns who called from x-forwarded-client-cert. What a caller
wrote there does not survive the outbound side, so what arrives is what the TLS connections proved.
"""

from services.mesh.policy import Policy
from services.mesh.registry import CLUSTER_DOMAIN
from services.mesh.translate.access import access_filters, peer_mode
from services.mesh.translate.clusters import CONNECT_TIMEOUT, HTTP_OPTIONS
from services.mesh.translate.listeners import connection_manager, http_filter, listener
from services.mesh.translate.names import CLUSTER, TYPE_URL, UNLIMITED, Json, owned, socket_address
from services.mesh.translate.node import InboundPort, NodeSettings, Sidecar
from services.mesh.translate.refusals import refusals_in_front_of
from services.mesh.translate.tls import server_side


def inbound_listeners(policy: Policy, node: NodeSettings) -> list[Json]:
    """One per process and port. They do not depend on readiness: endpoints do."""
    return [_listener(policy, sidecar, port, node) for sidecar in node.sidecars for port in sidecar.ports]


def inbound_clusters(node: NodeSettings) -> list[Json]:
    """The processes behind them."""
    return [_cluster(sidecar, port, node) for sidecar in node.sidecars for port in sidecar.ports]


def inbound_name(sidecar: Sidecar, port: InboundPort) -> str:
    """Istio's name, and whose it is."""
    return owned(f"inbound|{port.number}||", sidecar.workload.name)


def _listener(policy: Policy, sidecar: Sidecar, port: InboundPort, node: NodeSettings) -> Json:
    assert node.identities is not None  # NodeSettings refuses sidecars without
    workload = sidecar.workload
    filters = [*access_filters(policy, workload, port.number), http_filter("router", "router.v3.Router")]
    name = inbound_name(sidecar, port)
    manager = connection_manager(policy, name, "envoy-inbound", filters, workload.labels, node)
    if "tracing" in manager:
        # One span per sidecar, as in Istio; what follows is the process's own.
        manager["tracing"]["spawn_upstream_span"] = False
    manager |= {
        "route_config": {"name": name, "virtual_hosts": [_everything(sidecar, port)], "validate_clusters": False},
        "forward_client_cert_details": "APPEND_FORWARD",
        "set_current_client_cert_details": {"uri": True},
        **refusals_in_front_of(policy, workload),
    }
    mode = peer_mode(policy, workload, port.number)
    network = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    sides = server_side(mode, node.identities, workload.service_account, [network])
    return listener(name, node.listen_address, port.listens, "INBOUND", sides, node)


def _everything(sidecar: Sidecar, port: InboundPort) -> Json:
    host = f"{sidecar.service}.{sidecar.workload.namespace}.{CLUSTER_DOMAIN}:{port.number}"
    return {
        "name": f"inbound|http|{port.number}",
        "domains": ["*"],
        "routes": [
            {
                "name": "default",
                "match": {"prefix": "/"},
                "decorator": {"operation": f"{host}/*"},
                "route": {
                    "cluster": inbound_name(sidecar, port),
                    "timeout": "0s",
                    "max_stream_duration": {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"},
                },
            }
        ],
    }


def _cluster(sidecar: Sidecar, port: InboundPort, node: NodeSettings) -> Json:
    name = inbound_name(sidecar, port)
    target = {"endpoint": {"address": socket_address(node.upstream_address, port.forwards_to)}}
    spoken: Json = {"http2_protocol_options": {}} if port.protocol == "grpc" else {"http_protocol_options": {}}
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), UNLIMITED)
    return {
        "@type": CLUSTER,
        "name": name,
        "alt_stat_name": name + ";",
        "type": "STATIC",
        "connect_timeout": CONNECT_TIMEOUT,
        "per_connection_buffer_limit_bytes": node.buffer_limit_bytes,
        "circuit_breakers": {"thresholds": [{**limits, "track_remaining": False}]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [target]}]},
        "typed_extension_protocol_options": {
            HTTP_OPTIONS: {"@type": TYPE_URL + HTTP_OPTIONS, "explicit_http_config": spoken}
        },
    }
