"""Who answers: endpoints of a port, narrowed to a subset by label, grouped by place, each at an address we can reach.

An endpoint in another network stands behind that network's east-west gateway: its address is replaced by the gateway's,
which finds the way by the name in the TLS handshake.
"""

from collections.abc import Mapping

from services.mesh.policy.destination_rule import TrafficPolicy
from services.mesh.registry import Endpoint
from services.mesh.translate.localities import groups
from services.mesh.translate.names import ENDPOINTS, Json, cluster_name, locality, socket_address
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.tls import IS_MESHED
from services.mesh.translate.world import Host, Member, Port

_MESHED: Json = {"metadata": {"filter_metadata": {"envoy.transport_socket_match": IS_MESHED}}}


def assignments(hosts: Mapping[str, Host], node: NodeSettings) -> list[Json]:
    """The endpoints of every cluster that Envoy does not resolve by itself."""
    return [
        {
            "@type": ENDPOINTS,
            **load_assignment(
                cluster_name(host.name, port.number, subset),
                selected(host, port, subset),
                host.policy(port.number, subset),
                node,
            ),
        }
        for _, host in sorted(hosts.items())
        if not host.resolves_by_dns
        for port in host.ports
        for subset in ("", *(subset.name for subset in host.subsets))
    ]


def selected(host: Host, port: Port, subset: str) -> tuple[Member, ...]:
    """The members carrying all labels of the subset."""
    chosen = host.subset(subset) if subset else None
    wanted = chosen.labels.items() if chosen is not None else {}.items()
    return tuple(member for member in port.members if wanted <= dict(member.endpoint.labels).items())


def load_assignment(name: str, members: tuple[Member, ...], traffic: TrafficPolicy, node: NodeSettings) -> Json:
    """Envoy's form of the groups. A place that cannot be reached at all is left out."""
    found = []
    for group in groups(members, traffic, node):
        addresses = _reachable(group.members, node)
        if addresses:
            found.append(
                {
                    "locality": locality(group.place),
                    "lb_endpoints": [
                        {
                            "endpoint": {"address": socket_address(address, port)},
                            "load_balancing_weight": weight,
                            **(_MESHED if is_meshed else {}),
                        }
                        for (address, port), (weight, is_meshed) in sorted(addresses.items())
                    ],
                    "load_balancing_weight": group.weight,
                    "priority": group.priority,
                }
            )
    return {"cluster_name": name, "endpoints": _compact(found)}


def is_remote(endpoint: Endpoint, node: NodeSettings) -> bool:
    """Whether the way leads through a gateway. A proxy that names no network of its own reaches everything directly."""
    return node.network != "" and endpoint.network not in ("", node.network)


def _reachable(members: tuple[Member, ...], node: NodeSettings) -> dict[tuple[str, int], tuple[int, bool]]:
    """Addresses with their weights, and whether they take mutual TLS.

    The endpoints of another network share the weights of its gateways. As in Istio, only those that take mutual TLS can
    be reached there: the way is told in the handshake.
    """
    found: dict[tuple[str, int], tuple[int, bool]] = {}
    for member in members:
        there = member.endpoint
        ways: tuple[tuple[str, int], ...] = ((there.address, there.port),)
        if is_remote(there, node):
            ways = node.network_gateways.get(there.network, ()) if there.has_sidecar else ()
        for way in ways:
            found[way] = (found.get(way, (0, False))[0] + member.weight, there.has_sidecar)
    return found


def _compact(found: list[Json]) -> list[Json]:
    """Envoy wants priorities without gaps."""
    ranks = {rank: number for number, rank in enumerate(sorted({group["priority"] for group in found}))}
    return [group | {"priority": ranks[group["priority"]]} for group in found]
