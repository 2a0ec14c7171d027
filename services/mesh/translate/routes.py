"""VirtualService → virtual hosts and routes.

One route configuration per calling account for calls between services, and `ingress` for the outside. All are
validated against the clusters Envoy knows, so a route to nowhere is refused and the old one stays.
"""

from collections.abc import Iterable

from services.mesh.policy import Policy
from services.mesh.policy.checks import GRPC_STATUS
from services.mesh.policy.objects import gateway_name, qualified
from services.mesh.policy.virtual_service import MESH, Destination, Fault, Headers, Match, Route, VirtualService
from services.mesh.translate.answers import direct_response, redirect
from services.mesh.translate.balancing import hash_policy
from services.mesh.translate.edge_filters import CORS, cors_policy
from services.mesh.translate.matching import route_match
from services.mesh.translate.names import ROUTES, TYPE_URL, Json, domains, origin, seconds, share
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.picker import EXT_PROC, per_route
from services.mesh.translate.rate_limits import host_rate_limits
from services.mesh.translate.retrying import retry_policy
from services.mesh.translate.views import INGRESS, View, bound
from services.mesh.translate.world import Host, World

FAULT = "envoy.filters.http.fault"


def outbound_routes(policy: Policy, view: View, node: NodeSettings) -> Json:
    """A virtual host per service port; what no VirtualService mentions goes to the plain cluster."""
    hosts, world = [], view.world
    taken: set[str] = set()
    for host in world.hosts.values():
        service = bound(policy, host.name)
        for index, port in enumerate(host.ports):
            routes = _routes(service, world, node, MESH, port.number) if service is not None else []
            if service is None:
                routes = [_plain(host, port.number, node)]
            names = [n for n in domains(host.name, port.number, is_default_port=index == 0) if n not in taken]
            taken |= set(names)
            hosts.append(_virtual_host(f"{host.name}:{port.number}", names, routes))
    nowhere = {"name": "block_all", "match": {"prefix": "/"}, "direct_response": {"status": 502}}
    return _configuration(view.name, [*hosts, _virtual_host("block_all", ["*"], [nowhere])])


def ingress_routes(policy: Policy, view: View, node: NodeSettings) -> Json:
    """The virtual hosts of the one Gateway, from every VirtualService that names it."""
    hosts = []
    for gateway in policy.doors:
        server = gateway.spec.servers[0]
        name = f"{gateway.metadata.namespace}/{gateway.metadata.name}"
        for service in policy.virtual_services:
            namespace = service.metadata.namespace
            if name not in {gateway_name(item, namespace) for item in service.spec.gateways}:
                continue
            for pattern in service.spec.hosts:
                host = qualified(pattern, namespace)
                if any(_admits(allowed, host) for allowed in server.hosts):
                    routes = _routes(service, view.world, node, name, server.port.number)
                    hosts.append(
                        _virtual_host(f"{host}:{server.port.number}", [host], routes) | host_rate_limits(policy)
                    )
    return _configuration(INGRESS, hosts)


def _configuration(name: str, hosts: list[Json]) -> Json:
    return {
        "@type": ROUTES,
        "name": name,
        "virtual_hosts": hosts,
        "validate_clusters": True,
        "ignore_port_in_host_matching": name == INGRESS,
    }


def _virtual_host(name: str, names: list[str], routes: list[Json]) -> Json:
    return {"name": name, "domains": names, "routes": routes, "include_request_attempt_count": True}


def _admits(allowed: str, host: str) -> bool:
    return allowed in {"*", host} or (allowed.startswith("*.") and host.endswith(allowed[1:]))


def _routes(service: VirtualService, world: World, node: NodeSettings, gateway: str, port: int) -> list[Json]:
    """One Envoy route per `match` entry. What follows a catch-all could never be reached and is dropped."""
    routes: list[Json] = []
    for number, route in enumerate(service.spec.http):
        for index, match in enumerate(route.match or (Match(),)):
            here = {gateway_name(name, service.metadata.namespace) for name in match.gateways}
            if (here and gateway not in here) or (match.port is not None and match.port != port):
                continue
            translated = _route(route, match, service, world, node, port)
            translated["name"] = route.name or f"{service.metadata.name}-{number}"
            path = f"spec.http[{number}]" + (f".match[{index}]" if route.match else "")
            translated["metadata"] = {"filter_metadata": origin(service, path)}
            routes.append(translated)
            if translated["match"] == {"prefix": "/"}:
                return routes
    return routes


def _plain(host: Host, port: int, node: NodeSettings) -> Json:
    action = {"cluster": host.cluster(port), **_timeout("0s")}
    balancer = host.policy(port).load_balancer
    action["retry_policy"] = retry_policy(None, is_hashed=hash_policy(balancer) is not None)
    hashed = hash_policy(balancer)
    if hashed is not None:
        action["hash_policy"] = [hashed]
    route: Json = {"name": "default", "match": {"prefix": "/"}, "route": action}
    if host.picked_by is not None:
        route["typed_per_filter_config"] = {EXT_PROC: per_route(host.picked_by, {}, node)}
    return route


def _route(route: Route, match: Match, service: VirtualService, world: World, node: NodeSettings, port: int) -> Json:
    result: Json = {"match": route_match(match)}
    filters: Json = {}
    if route.redirect is not None:
        result["redirect"] = redirect(route.redirect, port)
        _add_headers(result, {}, (route.headers,))
    elif route.direct_response is not None:
        result["direct_response"] = direct_response(route.direct_response)
        _add_headers(result, {}, (route.headers,))
    else:
        _forward(result, filters, route, service.metadata.namespace, world, node, port)
    if route.fault is not None:
        filters[FAULT] = _fault(route.fault)
    if route.cors_policy is not None:
        filters[CORS] = cors_policy(route.cors_policy)
    if filters:
        result["typed_per_filter_config"] = filters
    return result


def _forward(
    result: Json, filters: Json, route: Route, namespace: str, world: World, node: NodeSettings, port: int
) -> None:
    """Fills in what a route that leads to services says."""
    targets = [(item, *_resolve(item.destination, namespace, world, port)) for item in route.route]
    action: Json = _timeout(seconds(route.timeout) if route.timeout is not None else "0s")
    result["route"] = action
    if len(targets) == 1:
        item, host, number = targets[0]
        action["cluster"] = host.cluster(number, item.destination.subset or "")
        _add_headers(result, action, (route.headers, item.headers))
        if host.picked_by is not None:
            filters[EXT_PROC] = per_route(host.picked_by, _subset_labels(host, item.destination), node)
    else:
        action["weighted_clusters"] = {"clusters": []}
        _add_headers(result, action, (route.headers,))
        for item, host, number in targets:
            if item.weight == 0:
                continue
            share_of: Json = {
                "name": host.cluster(number, item.destination.subset or ""),
                "weight": item.weight,
            }
            _add_headers(share_of, share_of, (item.headers,))
            if host.picked_by is not None:
                labels = _subset_labels(host, item.destination)
                share_of["typed_per_filter_config"] = {EXT_PROC: per_route(host.picked_by, labels, node)}
            action["weighted_clusters"]["clusters"].append(share_of)
    hashes = _hashes((host, number, item.destination.subset or "") for item, host, number in targets)
    if hashes:
        action["hash_policy"] = hashes
    # Istio looks at the hash of a single destination only: with weights a retry avoids the host that failed.
    retries = retry_policy(route.retries, is_hashed=bool(hashes) and len(targets) == 1)
    if retries is not None:
        action["retry_policy"] = retries
    if route.rewrite is not None and route.rewrite.uri is not None:
        action["prefix_rewrite"] = route.rewrite.uri
    if route.rewrite is not None and route.rewrite.uri_regex_rewrite is not None:
        rewrite = route.rewrite.uri_regex_rewrite
        action["regex_rewrite"] = {"pattern": {"regex": rewrite.match}, "substitution": rewrite.rewrite}
    if route.rewrite is not None and route.rewrite.authority is not None:
        action["host_rewrite_literal"] = route.rewrite.authority
    mirrors = _mirrors(route, namespace, world, port)
    if mirrors:
        action["request_mirror_policies"] = mirrors


def _timeout(span: str) -> Json:
    return {"timeout": span, "max_grpc_timeout": span}


def _resolve(destination: Destination, namespace: str, world: World, port: int) -> tuple[Host, int]:
    host = world.hosts[qualified(destination.host, namespace)]
    if destination.port is not None:
        return host, destination.port.number
    return host, port if any(item.number == port for item in host.ports) else host.ports[0].number


def _subset_labels(host: Host, destination: Destination) -> dict[str, str]:
    subset = host.subset(destination.subset) if destination.subset is not None else None
    return subset.labels if subset is not None else {}


def _hashes(targets: Iterable[tuple[Host, int, str]]) -> list[Json]:
    found: list[Json] = []
    for host, port, subset in targets:
        hashed = hash_policy(host.policy(port, subset).load_balancer)
        if hashed is not None and hashed not in found:
            found.append(hashed)
    return found


def _add_headers(target: Json, action: Json, sources: tuple[Headers | None, ...]) -> None:
    """`action` takes the authority; Istio treats a `set` of it as a host rewrite."""
    for headers in (source for source in sources if source is not None):
        for side, operations in (("request", headers.request), ("response", headers.response)):
            added = [(key, value, "OVERWRITE_IF_EXISTS_OR_ADD") for key, value in sorted(operations.set_.items())]
            added += [(key, value, "APPEND_IF_EXISTS_OR_ADD") for key, value in sorted(operations.add.items())]
            for key, value, append in added:
                if side == "request" and key in {":authority", "host"}:
                    action["host_rewrite_literal"] = value
                    continue
                entry = {"header": {"key": key, "value": value}, "append_action": append}
                target.setdefault(f"{side}_headers_to_add", []).append(entry)
            if operations.remove:
                target.setdefault(f"{side}_headers_to_remove", []).extend(operations.remove)


def _mirrors(route: Route, namespace: str, world: World, port: int) -> list[Json]:
    wanted = [(item.destination, item.percentage) for item in route.mirrors]
    if route.mirror is not None:
        wanted.append((route.mirror, route.mirror_percentage))
    policies = []
    for destination, percentage in wanted:
        percent = 100.0 if percentage is None else percentage.value
        if percent == 0:
            continue
        host, number = _resolve(destination, namespace, world, port)
        policies.append(
            {
                "cluster": host.cluster(number, destination.subset or ""),
                "runtime_fraction": {"default_value": share(percent)},
                "trace_sampled": False,
                "disable_shadow_host_suffix_append": True,
            }
        )
    return policies


def _fault(fault: Fault) -> Json:
    config: Json = {"@type": TYPE_URL + "envoy.extensions.filters.http.fault.v3.HTTPFault"}
    if fault.delay is not None:
        config["delay"] = {
            "percentage": share(fault.delay.percentage.value),
            "fixed_delay": seconds(fault.delay.fixed_delay),
        }
    if fault.abort is not None:
        abort: Json = {"percentage": share(fault.abort.percentage.value)}
        if fault.abort.grpc_status is not None:
            abort["grpc_status"] = GRPC_STATUS[fault.abort.grpc_status]
        else:
            abort["http_status"] = fault.abort.http_status
        config["abort"] = abort
    return config
