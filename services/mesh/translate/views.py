"""Who calls whom: each calling account sees its own part of the world, and only that part is generated for it.

Istio configures every proxy by itself; here several share one Envoy, so each caller's clusters carry its name and its
certificate. What is on nobody's way costs memory and is left out, as an Istio Sidecar's egress hosts would.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from services.mesh.policy import Policy
from services.mesh.policy.objects import gateway_name, qualified
from services.mesh.policy.virtual_service import MESH, VirtualService
from services.mesh.registry import CLUSTER_DOMAIN, Workload
from services.mesh.translate.names import owned
from services.mesh.translate.node import Caller, NodeSettings
from services.mesh.translate.world import Host, World

OUTBOUND = "outbound"
INGRESS = "ingress"
INGRESS_LABELS = {"istio": "ingressgateway"}


@dataclass(frozen=True, slots=True)
class View:
    """One caller: the name of its listener and routes, its account (empty: nobody's), and what it can reach."""

    name: str
    account: str
    port: int
    world: World


def outbound_views(policy: Policy, world: World, node: NodeSettings) -> tuple[View, ...]:
    """The services' own calls."""
    callers = node.callers or (Caller("", node.outbound_port),)
    return tuple(
        View(owned(OUTBOUND, item.service_account), item.service_account, item.port, _seen(policy, world, item, node))
        for item in callers
    )


def ingress_view(policy: Policy, world: World, node: NodeSettings) -> View | None:
    """The door, where a Gateway is defined: it reaches what the VirtualServices of the Gateway lead to."""
    if not policy.gateways:
        return None
    doors = {f"{gateway.metadata.namespace}/{gateway.metadata.name}" for gateway in policy.gateways}
    behind: set[str] = set()
    for service in policy.virtual_services:
        if doors & {gateway_name(name, service.metadata.namespace) for name in service.spec.gateways}:
            behind |= _destinations(service)
    account = INGRESS if node.callers else ""
    return View(INGRESS, account, node.ingress_port, _narrowed(world, _with_pickers(world, behind), account))


def ingress_workload(node: NodeSettings) -> Workload:
    """The door as access policies name it."""
    return Workload(INGRESS, node.namespace, INGRESS, INGRESS_LABELS)


def bound(policy: Policy, host: str) -> VirtualService | None:
    """The VirtualService that routes the mesh's own calls to a host."""
    for service in policy.virtual_services:
        namespace = service.metadata.namespace
        gateways = {gateway_name(name, namespace) for name in service.spec.gateways}
        if MESH in gateways and host in {qualified(name, namespace) for name in service.spec.hosts}:
            return service
    return None


def _seen(policy: Policy, world: World, caller: Caller, node: NodeSettings) -> World:
    if caller.calls is None:
        return _narrowed(world, world.hosts, caller.service_account)
    names = {f"{name}.{node.namespace}.{CLUSTER_DOMAIN}" for name in caller.calls}
    # Hosts of a ServiceEntry belong to no service's list of calls: the entry itself says that they are meant.
    names |= {name for name in world.hosts if not name.endswith(f".{CLUSTER_DOMAIN}")}
    for name in tuple(names):
        service = bound(policy, name)
        names |= _destinations(service) if service is not None else set()
    return _narrowed(world, _with_pickers(world, names), caller.service_account)


def _destinations(service: VirtualService) -> set[str]:
    found: set[str] = set()
    for route in service.spec.http:
        targets = [item.destination for item in route.route] + [item.destination for item in route.mirrors]
        targets += [route.mirror] if route.mirror is not None else []
        found |= {qualified(target.host, service.metadata.namespace) for target in targets}
    return found


def _with_pickers(world: World, names: Iterable[str]) -> set[str]:
    known = {name for name in names if name in world.hosts}
    pickers = (world.hosts[name].picked_by for name in known)
    return known | {picker.host for picker in pickers if picker is not None}


def _narrowed(world: World, names: Iterable[str], caller: str) -> World:
    wanted = set(names)
    return replace(world, hosts={name: _owned(host, caller) for name, host in world.hosts.items() if name in wanted})


def _owned(host: Host, caller: str) -> Host:
    picker = replace(host.picked_by, caller=caller) if host.picked_by is not None else None
    return replace(host, caller=caller, picked_by=picker)
