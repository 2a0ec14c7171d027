"""DestinationRule → Envoy clusters: one per port and one more per subset, with Istio's defaults.

Every caller has its own, as each shows its own certificate and keeps its own pools; endpoints are shared.
"""

from collections.abc import Iterable

from services.mesh.policy.destination_rule import HttpSettings, OutlierDetection, TcpSettings, TrafficPolicy
from services.mesh.translate.balancing import balancing
from services.mesh.translate.endpoints import load_assignment, selected
from services.mesh.translate.localities import is_weighted
from services.mesh.translate.names import CLUSTER, TYPE_URL, UNLIMITED, Json, cluster_name, eds_config, seconds, sni
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.tls import client_side
from services.mesh.translate.views import View
from services.mesh.translate.world import Host, Port

CONNECT_TIMEOUT = "10s"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def clusters(views: Iterable[View], node: NodeSettings) -> list[Json]:
    """All clusters, in a stable order. The unsubsetted one always exists."""
    found = (
        _cluster(host, port, subset, node)
        for view in views
        for host in view.world.hosts.values()
        for port in host.ports
        for subset in ("", *(subset.name for subset in host.subsets))
    )
    # Without accounts the door and the services share their clusters.
    return list({cluster["name"]: cluster for cluster in found}.values())


def _cluster(host: Host, port: Port, subset: str, node: NodeSettings) -> Json:
    name = host.cluster(port.number, subset)
    traffic = host.policy(port.number, subset)
    istio: Json = {"services": [{"host": host.name}], "subset": subset or "default"}
    if host.rule:
        istio["config"] = host.rule
    pool = traffic.connection_pool
    tcp = pool.tcp if pool is not None else TcpSettings()
    http = pool.http if pool is not None else HttpSettings()
    cluster: Json = {
        "@type": CLUSTER,
        "name": name,
        "alt_stat_name": name + ";",
        "connect_timeout": seconds(tcp.connect_timeout) if tcp.connect_timeout is not None else CONNECT_TIMEOUT,
        "per_connection_buffer_limit_bytes": node.buffer_limit_bytes,
        "circuit_breakers": {"thresholds": [_thresholds(tcp, http, traffic)]},
        "common_lb_config": _common_lb(traffic, node, is_picked=host.picked_by is not None),
        "typed_extension_protocol_options": {
            HTTP_OPTIONS: _http_options(tcp, http, _pings(host, node), is_http2=_speaks_http2(http, port))
        },
        "metadata": {"filter_metadata": {"istio": istio}},
        **balancing(traffic.load_balancer, is_picked=host.picked_by is not None, weighs_places=is_weighted(traffic)),
        **_discovery(host, port, subset, traffic, node),
        **client_side(
            traffic.tls,
            node.identities,
            host.caller,
            host.identities,
            sni(host.name, port.number, subset),
            is_h2=_speaks_http2(http, port),
        ),
    }
    if traffic.outlier_detection is not None:
        cluster["outlier_detection"] = _outliers(traffic.outlier_detection)
    if tcp.tcp_keepalive is not None:
        alive = tcp.tcp_keepalive
        cluster["upstream_connection_options"] = {
            "tcp_keepalive": {
                key: value
                for key, value in (
                    ("keepalive_probes", alive.probes),
                    ("keepalive_time", int(alive.time.total_seconds()) if alive.time is not None else None),
                    ("keepalive_interval", int(alive.interval.total_seconds()) if alive.interval is not None else None),
                )
                if value is not None
            }
        }
    return cluster


def _discovery(host: Host, port: Port, subset: str, traffic: TrafficPolicy, node: NodeSettings) -> Json:
    name = cluster_name(host.name, port.number, subset)
    if host.resolves_by_dns:
        members = selected(host, port, subset)
        return {
            "type": "STRICT_DNS",
            "dns_refresh_rate": "60s",
            "respect_dns_ttl": True,
            "load_assignment": load_assignment(name, members, traffic, node),
        }
    config = eds_config(node.run_directory, name)
    return {"type": "EDS", "eds_cluster_config": {"eds_config": config, "service_name": name}}


def _thresholds(tcp: TcpSettings, http: HttpSettings, traffic: TrafficPolicy) -> Json:
    limits: Json = {
        "max_connections": tcp.max_connections or UNLIMITED,
        "max_pending_requests": http.http1_max_pending_requests or UNLIMITED,
        "max_requests": http.http2_max_requests or UNLIMITED,
        "max_retries": http.max_retries or UNLIMITED,
        "track_remaining": False,
    }
    if traffic.retry_budget is not None:
        percent, minimum = traffic.retry_budget.percent, traffic.retry_budget.min_retry_concurrency
        limits["retry_budget"] = {
            "budget_percent": {"value": 20 if percent is None else percent},
            "min_retry_concurrency": 3 if minimum is None else minimum,
        }
    return limits


def _common_lb(traffic: TrafficPolicy, node: NodeSettings, *, is_picked: bool) -> Json:
    config: Json = {}
    if traffic.outlier_detection is not None:
        config["healthy_panic_threshold"] = {"value": traffic.outlier_detection.min_health_percent}
    if is_weighted(traffic) and not is_picked:
        config["locality_weighted_lb_config"] = {}
    if node.update_merge_window_s is not None:
        config["update_merge_window"] = seconds(node.update_merge_window_s)
    return config


def _speaks_http2(http: HttpSettings, port: Port) -> bool:
    return port.is_http2 or http.h2_upgrade_policy == "UPGRADE"


def _pings(host: Host, node: NodeSettings) -> Json:
    """Only towards sidecars: other servers take frequent pings for an attack."""
    if not node.ping_interval_s or not host.identities or not node.sidecars:
        return {}
    alive = {"interval": seconds(node.ping_interval_s), "timeout": seconds(node.ping_timeout_s)}
    return {"connection_keepalive": alive}


def _http_options(tcp: TcpSettings, http: HttpSettings, pings: Json, *, is_http2: bool) -> Json:
    common: Json = {}
    idle = http.idle_timeout if http.idle_timeout is not None else tcp.idle_timeout
    if idle is not None:
        common["idle_timeout"] = seconds(idle)
    if tcp.max_connection_duration is not None:
        common["max_connection_duration"] = seconds(tcp.max_connection_duration)
    if http.max_requests_per_connection:
        common["max_requests_per_connection"] = http.max_requests_per_connection
    streams = {"max_concurrent_streams": http.max_concurrent_streams} if http.max_concurrent_streams else {}
    explicit: Json = {"http2_protocol_options": {**streams, **pings}} if is_http2 else {"http_protocol_options": {}}
    options: Json = {"@type": TYPE_URL + HTTP_OPTIONS, "explicit_http_config": explicit}
    if common:
        options["common_http_protocol_options"] = common
    return options


def _outliers(detection: OutlierDetection) -> Json:
    config: Json = {"enforcing_success_rate": 0}
    if detection.interval is not None:
        config["interval"] = seconds(detection.interval)
    if detection.base_ejection_time is not None:
        config["base_ejection_time"] = seconds(detection.base_ejection_time)
    if detection.max_ejection_percent is not None:
        config["max_ejection_percent"] = detection.max_ejection_percent
    for name, enforcing, count in (
        ("consecutive_5xx", "enforcing_consecutive_5xx", detection.consecutive_5xx_errors),
        ("consecutive_gateway_failure", "enforcing_consecutive_gateway_failure", detection.consecutive_gateway_errors),
    ):
        if count is not None:
            config |= {name: count, enforcing: 100} if count else {enforcing: 0}
    if detection.split_external_local_origin_errors:
        config["split_external_local_origin_errors"] = True
        failures = detection.consecutive_local_origin_failures
        if failures:
            config["consecutive_local_origin_failure"] = failures
        config["enforcing_consecutive_local_origin_failure"] = 0 if failures == 0 else 100
        config["enforcing_local_origin_success_rate"] = 0
    return config
