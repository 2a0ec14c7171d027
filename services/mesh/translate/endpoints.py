"""Who answers: endpoints of a port, narrowed to a subset by label, ordered by distance where ejection can use it."""

from collections.abc import Mapping

from services.mesh.policy.destination_rule import TrafficPolicy
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
    """Istio orders localities by distance only where outlier detection can tell that a locality is gone."""
    places = sorted({member.endpoint.locality for member in members})
    prefers_near = traffic.outlier_detection is not None and node.locality != ""
    distances = {place: _distance(place, node.locality) if prefers_near else 0 for place in places}
    priorities = {distance: rank for rank, distance in enumerate(sorted(set(distances.values())))}
    groups = []
    for place in sorted(places, key=lambda item: (distances[item], item)):
        here = sorted((m for m in members if m.endpoint.locality == place), key=_address)
        groups.append(
            {
                "locality": locality(place),
                "lb_endpoints": [
                    {
                        "endpoint": {"address": socket_address(m.endpoint.address, m.endpoint.port)},
                        "load_balancing_weight": m.weight,
                        **(_MESHED if m.endpoint.has_sidecar else {}),
                    }
                    for m in here
                ],
                "load_balancing_weight": sum(m.weight for m in here),
                "priority": priorities[distances[place]],
            }
        )
    return {"cluster_name": name, "endpoints": groups}


def _address(member: Member) -> tuple[str, int]:
    return (member.endpoint.address, member.endpoint.port)


def _distance(theirs: str, ours: str) -> int:
    """0 same subzone, 1 same zone, 2 same region, 3 elsewhere."""
    there, here = (locality(text) for text in (theirs, ours))
    for distance, name in enumerate(("region", "zone", "sub_zone")):
        if there.get(name, "") != here.get(name, ""):
            return 3 - distance
    return 0
