"""The way in for other networks: Istio's AUTO_PASSTHROUGH. Connections are told apart by the name in their handshake
and passed on unopened to the local endpoints of the cluster so named; mutual TLS is between caller and called.

One chain per name rather than the name itself as the cluster's: a stranger could name a cluster of ours that carries
our certificate. A new subset changes the listener, which drains it; that is rare.
"""

from collections.abc import Iterable

from services.mesh.policy import Policy
from services.mesh.registry import CLUSTER_DOMAIN
from services.mesh.translate.clusters import CONNECT_TIMEOUT
from services.mesh.translate.endpoints import is_remote, load_assignment, selected
from services.mesh.translate.listeners import listener
from services.mesh.translate.names import (
    CLUSTER,
    ENDPOINTS,
    TYPE_URL,
    UNLIMITED,
    Json,
    eds_config,
    seconds,
    sni,
)
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.tls import inspector
from services.mesh.translate.world import Host, Port, World

EASTWEST = "eastwest"


def eastwest(policy: Policy, world: World, node: NodeSettings) -> tuple[list[Json], list[Json], list[Json]]:
    """Listeners, clusters, endpoints; none where the policy has no Gateway for other networks."""
    if not policy.eastwest or not node.eastwest_port:
        return [], [], []
    ends = list(_ends(world, node))
    chains = [_chain(sni(host.name, port.number, subset), node) for host, port, subset in ends]
    sides = {"listener_filters": [inspector()], "filter_chains": chains}
    way = listener(EASTWEST, node.listen_address, node.eastwest_port, "INBOUND", sides, node)
    return (
        [way],
        [_cluster(sni(host.name, port.number, subset), node) for host, port, subset in ends],
        [_local(host, port, subset, node) for host, port, subset in ends],
    )


def _ends(world: World, node: NodeSettings) -> Iterable[tuple[Host, Port, str]]:
    for service in sorted(node.eastwest_services):
        host = world.hosts.get(f"{service}.{node.namespace}.{CLUSTER_DOMAIN}")
        if host is None:
            continue
        for port in host.ports:
            for subset in ("", *(subset.name for subset in host.subsets)):
                yield host, port, subset


def _chain(name: str, node: NodeSettings) -> Json:
    proxy = {
        "@type": TYPE_URL + "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": name,
        "cluster": name,
        "idle_timeout": seconds(node.connection_idle_timeout_s),
    }
    return {
        "name": name,
        "filter_chain_match": {"transport_protocol": "tls", "server_names": [name]},
        "filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}],
    }


def _cluster(name: str, node: NodeSettings) -> Json:
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), UNLIMITED)
    return {
        "@type": CLUSTER,
        "name": name,
        "alt_stat_name": name + ";",
        "type": "EDS",
        "eds_cluster_config": {"eds_config": eds_config(node.run_directory, name), "service_name": name},
        "connect_timeout": CONNECT_TIMEOUT,
        "per_connection_buffer_limit_bytes": node.buffer_limit_bytes,
        "circuit_breakers": {"thresholds": [{**limits, "track_remaining": False}]},
        "lb_policy": "ROUND_ROBIN",
    }


def _local(host: Host, port: Port, subset: str, node: NodeSettings) -> Json:
    """Only endpoints of this network: what came from another one must not be sent on to a third."""
    here = tuple(m for m in selected(host, port, subset) if not is_remote(m.endpoint, node))
    name = sni(host.name, port.number, subset)
    found = load_assignment(name, here, host.policy(port.number, subset), node)
    for group in found["endpoints"]:
        for end in group["lb_endpoints"]:
            end.pop("metadata", None)
    return {"@type": ENDPOINTS, **found}
