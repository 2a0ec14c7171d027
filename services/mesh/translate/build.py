"""Policy + registry + node → snapshot. Pure: the same three give the same bytes."""

from services.mesh.policy import Policy, PolicyError, check
from services.mesh.registry import Registry
from services.mesh.translate.bootstrap import bootstrap
from services.mesh.translate.clusters import clusters
from services.mesh.translate.eastwest import eastwest
from services.mesh.translate.endpoints import assignments
from services.mesh.translate.inbound import inbound_clusters, inbound_listeners
from services.mesh.translate.listeners import ingress_listener, outbound_listeners
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.routes import ingress_routes, outbound_routes
from services.mesh.translate.snapshot import Snapshot
from services.mesh.translate.views import ingress_view, outbound_views
from services.mesh.translate.world import survey


def translate(policy: Policy, registry: Registry, node: NodeSettings) -> Snapshot:
    """Everything Envoy needs. Raises `PolicyError` where `check` finds errors: half a policy is never served."""
    errors = tuple(problem for problem in check(policy, registry) if problem.severity == "error")
    if errors:
        raise PolicyError(errors)
    world = survey(policy, registry)
    outbound = outbound_views(policy, world, node)
    door = ingress_view(policy, world, node)
    views = (*outbound, door) if door is not None else outbound
    routes = [outbound_routes(policy, view, node) for view in outbound]
    listeners = [*inbound_listeners(policy, node), *outbound_listeners(policy, outbound, node)]
    if door is not None:
        routes.append(ingress_routes(policy, door, node))
        listeners.append(ingress_listener(policy, door, node))
    more_listeners, more_clusters, more_endpoints = eastwest(policy, world, node)
    listeners += more_listeners
    reached = {name: host for view in views for name, host in view.world.hosts.items()}
    return Snapshot(
        bootstrap=bootstrap(node),
        clusters=(*clusters(views, node), *inbound_clusters(node), *more_clusters),
        listeners=tuple(listeners),
        routes=tuple(routes),
        endpoints=(*assignments(reached, node), *more_endpoints),
    )
