"""What Envoy is started with: who it is, where its files are, limits, and how its statistics are named."""

from services.mesh.policy.base import ISTIO_VERSION
from services.mesh.translate.inbound import inbound_name
from services.mesh.translate.names import TYPE_URL, Json, locality, owned, socket_address
from services.mesh.translate.node import Caller, NodeSettings
from services.mesh.translate.telemetry import OTLP_CLUSTER, STATS_TAGS
from services.mesh.translate.views import INGRESS, OUTBOUND

_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def bootstrap(node: NodeSettings) -> Json:
    """The bootstrap. Nothing in it depends on policy, so no change of policy needs a restart."""
    names = [*(inbound_name(item, port) for item in node.sidecars for port in item.ports)]
    names += [INGRESS, *(owned(OUTBOUND, item.service_account) for item in node.callers or (Caller("", 0),))]
    limits = {f"envoy.resource_limits.listener.{name}.connection_limit": node.max_connections for name in names}
    return {
        "node": {
            "id": f"{node.service_name}~{node.listen_address}~{node.ingress_port}",
            "cluster": node.service_name,
            "locality": locality(node.locality),
            "metadata": {"ISTIO_SEMANTICS": ISTIO_VERSION},
        },
        "admin": {"address": socket_address(node.admin_address or node.upstream_address, node.admin_port)},
        "dynamic_resources": {"cds_config": _source(node, "cds"), "lds_config": _source(node, "lds")},
        "static_resources": {"clusters": [_otlp(node.otlp_endpoint)] if node.otlp_endpoint else []},
        "layered_runtime": {
            "layers": [
                {
                    "name": "local",
                    "static_layer": {
                        # Batches of 200 ms, or of 256 spans: a flush per span costs the receiver a call per span.
                        "tracing.opentelemetry.flush_interval_ms": 200,
                        "tracing.opentelemetry.min_flush_spans": 256,
                        **limits,
                    },
                }
            ]
        },
        "stats_config": {
            "use_all_default_tags": False,
            "stats_tags": [
                # gateway~outbound|50051||cache.autoglm.svc.cluster.local; → Istio's cluster name, and who calls.
                # The dot behind it goes with it: `cluster..grpc` would be another metric than `cluster.grpc`.
                {"tag_name": "cluster_name", "regex": r"^cluster\.(?:[-a-z0-9]+~)?((.+);\.)"},
                {"tag_name": "source_workload", "regex": r"^cluster\.(([-a-z0-9]+)~)"},
                {
                    "tag_name": "http_conn_manager_prefix",
                    "regex": r"^http\.(((?:[-a-z0-9]+~)?(?:outbound|inbound\|\d+\|\||ingress))\.)",
                },
                {"tag_name": "response_code_class", "regex": r"_rq(_(\dxx))$"},
                {"tag_name": "response_code", "regex": r"_rq(_(\d{3}))$"},
                *STATS_TAGS,
            ],
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": TYPE_URL
                        + "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        # A connection from outside may need one of Envoy's own to each sidecar on its way.
                        "max_active_downstream_connections": 4 * node.max_connections,
                    },
                }
            ]
        },
    }


def _source(node: NodeSettings, kind: str) -> Json:
    directory = node.run_directory / kind
    return {
        "path_config_source": {"path": str(directory / f"{kind}.json"), "watched_directory": {"path": str(directory)}},
        "resource_api_version": "V3",
    }


def _otlp(endpoint: str) -> Json:
    host, _, port = endpoint.rpartition(":")
    target = {"endpoint": {"address": socket_address(host.strip("[]"), int(port))}}
    return {
        "name": OTLP_CLUSTER,
        "alt_stat_name": f"{OTLP_CLUSTER};",  # so that it is a label, like the others
        "type": "STRICT_DNS",
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": {"cluster_name": OTLP_CLUSTER, "endpoints": [{"lb_endpoints": [target]}]},
        "typed_extension_protocol_options": {
            _OPTIONS: {"@type": TYPE_URL + _OPTIONS, "explicit_http_config": {"http2_protocol_options": {}}},
        },
    }
