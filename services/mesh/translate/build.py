"""Policy + registry + node → snapshot. Pure: the same three give the same bytes."""

from services.mesh.policy import Policy, PolicyError, check
from services.mesh.registry import Registry
from services.mesh.translate.bootstrap import bootstrap
from services.mesh.translate.clusters import clusters
from services.mesh.translate.endpoints import assignments
from services.mesh.translate.listeners import listeners
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.routes import ingress_routes, outbound_routes
from services.mesh.translate.snapshot import Snapshot
from services.mesh.translate.world import survey


def translate(policy: Policy, registry: Registry, node: NodeSettings) -> Snapshot:
    """Everything Envoy needs. Raises `PolicyError` where `check` finds errors: half a policy is never served."""
    errors = tuple(problem for problem in check(policy, registry) if problem.severity == "error")
    if errors:
        raise PolicyError(errors)
    world = survey(policy, registry)
    routes = [outbound_routes(policy, world, node)]
    if policy.doors:
        routes.append(ingress_routes(policy, world, node))
    return Snapshot(
        bootstrap=bootstrap(node),
        clusters=tuple(clusters(world, node)),
        listeners=tuple(listeners(policy, world, node)),
        routes=tuple(routes),
        endpoints=tuple(assignments(world, node)),
    )
