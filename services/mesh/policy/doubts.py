"""Policy whose parts contradict each other: allowed, and surely not what its author meant. Findings become warnings.

Unlike the suspicions next door these do not depend on what runs now.
"""

from collections.abc import Iterator, Mapping

from services.mesh.policy.destination_rule import DestinationRule, OutlierDetection, TrafficPolicy
from services.mesh.policy.envoy_filter import EnvoyFilter
from services.mesh.policy.objects import Policy, gateway_name, qualified
from services.mesh.policy.others import InferencePool
from services.mesh.policy.virtual_service import MESH, Match, Route, VirtualService
from services.mesh.registry import Registry

Finding = tuple[str, str]
"""Path and message."""


def routing(service: VirtualService, policy: Policy) -> Iterator[Finding]:
    """Routes nobody reaches, times that cannot pass, mirrors that only double the work."""
    yield from _hidden(service)
    yield from _not_admitted(service, policy)
    for number, route in enumerate(service.spec.http):
        path = f"spec.http[{number}]"
        retries = route.retries
        if retries is not None and retries.per_try_timeout is not None and route.timeout:
            if retries.per_try_timeout >= route.timeout:
                yield (
                    f"{path}.retries.perTryTimeout",
                    "is not shorter than the route's timeout: the first try uses up all the time, so none follows",
                )
        if retries is not None and retries.retry_remote_localities and not _orders_places(route, service, policy):
            yield (
                f"{path}.retries.retryRemoteLocalities",
                "needs outlierDetection on the destination: without it no place comes after another",
            )
        yield from _mirrors(route, path, service.metadata.namespace)
        cors = route.cors_policy
        if cors is not None and not cors.allow_origins:
            yield f"{path}.corsPolicy.allowOrigins", "names no origin: browsers let no page read an answer"
        if cors is not None and cors.allow_credentials:
            if any(
                origin.regex in {".*", ".+"} or origin.prefix in {"", "http", "https://"}
                for origin in cors.allow_origins
            ):
                yield (
                    f"{path}.corsPolicy.allowCredentials",
                    "with every origin allowed, any page may act with its visitor's credentials; name the origins",
                )


def detection(rule: DestinationRule) -> Iterator[Finding]:
    """Outlier detection with every detector switched off."""
    policies: list[tuple[str, TrafficPolicy | None]] = [("spec.trafficPolicy", rule.spec.traffic_policy)]
    policies += [
        (f"spec.subsets[{number}].trafficPolicy", subset.traffic_policy)
        for number, subset in enumerate(rule.spec.subsets)
    ]
    for path, traffic in policies:
        found = traffic.outlier_detection if traffic is not None else None
        if found is not None and _detects_nothing(found):
            yield (
                f"{path}.outlierDetection",
                "detects nothing: consecutive5xxErrors is 0 and no other detector is on, so nothing is ever ejected",
            )


def nobody_selected(pool: InferencePool, registry: Registry) -> Iterator[Finding]:
    """A pool whose labels no service has: the picker would never be asked."""
    wanted = pool.spec.selector.match_labels.items()
    for service in registry.services:
        if service.namespace != pool.metadata.namespace:
            continue
        endpoints = [endpoint for group in service.endpoints.values() for endpoint in group]
        if wanted <= dict(service.selector).items() or any(wanted <= dict(e.labels).items() for e in endpoints):
            return
    labels = ", ".join(f"{key}={value}" for key, value in sorted(wanted))
    yield "spec.selector", f"no service carries {labels}: its picker is never asked"


def patches_nothing(item: EnvoyFilter, policy: Policy, registry: Registry) -> Iterator[Finding]:
    """A patch for a gateway that no Gateway selects, or for the sidecars of nobody."""
    wanted = item.spec.workload_selector.labels.items()
    labels = ", ".join(f"{key}={value}" for key, value in sorted(wanted))
    contexts = {patch.match.context for patch in item.spec.config_patches}
    if "GATEWAY" in contexts and not any(wanted <= gateway.spec.selector.items() for gateway in policy.doors):
        yield "spec.workloadSelector", f"no Gateway stands at {labels}: nothing is patched"
    if "SIDECAR_INBOUND" in contexts:
        known = (dict(service.selector) or {"app": service.name} for service in registry.services)
        if not any(wanted <= one.items() for one in known):
            yield "spec.workloadSelector", f"no service carries {labels}: nothing is patched"


def _detects_nothing(found: OutlierDetection) -> bool:
    local = found.split_external_local_origin_errors and found.consecutive_local_origin_failures != 0
    return found.consecutive_5xx_errors == 0 and not found.consecutive_gateway_errors and not local


def _hidden(service: VirtualService) -> Iterator[Finding]:
    """A match that an earlier one, at the same door, already takes all of."""
    earlier: list[tuple[str, Match]] = []
    for number, route in enumerate(service.spec.http):
        for index, match in enumerate(route.match or (Match(),)):
            path = f"spec.http[{number}]" + (f".match[{index}]" if route.match else "")
            taken = next((place for place, before in earlier if _covers(before, match)), None)
            if taken is not None:
                yield path, f"is never reached: {taken} takes every request that it would"
            earlier.append((path, match))


def _covers(before: Match, after: Match) -> bool:
    """Whether every request of `after` meets `before`. Says no where it cannot tell."""
    if before.port not in (None, after.port) or (before.gateways and set(after.gateways) != set(before.gateways)):
        return False
    same = {name: (getattr(before, name), getattr(after, name)) for name in ("scheme", "method", "authority")}
    if any(first is not None and first != second for first, second in same.values()):
        return False
    for name in ("headers", "without_headers", "query_params"):
        wanted, given = getattr(before, name), getattr(after, name)
        if any(
            given.get(key) != value and not (value.is_presence and _present(name, key, given))
            for key, value in wanted.items()
        ):
            return False
    if before.uri is None or before.uri.is_presence or before.uri == after.uri:
        return before.uri is None or before.ignore_uri_case >= after.ignore_uri_case
    if before.uri.prefix is None or after.uri is None or before.ignore_uri_case != after.ignore_uri_case:
        return before.uri.prefix == "/"
    return (after.uri.prefix or after.uri.exact or "").startswith(before.uri.prefix)


def _present(name: str, key: str, given: Mapping[str, object]) -> bool:
    return name != "without_headers" and key in given


def _not_admitted(service: VirtualService, policy: Policy) -> Iterator[Finding]:
    """Hosts that the Gateway named does not let in."""
    namespace = service.metadata.namespace
    names = {gateway_name(name, namespace) for name in service.spec.gateways} - {MESH}
    doors = [item for item in policy.doors if f"{item.metadata.namespace}/{item.metadata.name}" in names]
    if not doors or MESH in service.spec.gateways:
        return
    for number, host in enumerate(service.spec.hosts):
        full = qualified(host, namespace)
        admitted = (pattern for door in doors for server in door.spec.servers for pattern in server.hosts)
        if not any(
            pattern in {"*", full} or (pattern.startswith("*.") and full.endswith(pattern[1:])) for pattern in admitted
        ):
            yield f"spec.hosts[{number}]", f"{full} is not among the hosts of its Gateway: no request gets there"


def _orders_places(route: Route, service: VirtualService, policy: Policy) -> bool:
    for target in route.route:
        rule = policy.rule_for(qualified(target.destination.host, service.metadata.namespace))
        traffic = rule.spec.traffic_policy if rule is not None else None
        subset = next((s for s in rule.spec.subsets if s.name == target.destination.subset), None) if rule else None
        inner = subset.traffic_policy if subset is not None else None
        if any(found is not None and found.outlier_detection is not None for found in (traffic, inner)):
            return True
    return not route.route


def _mirrors(route: Route, path: str, namespace: str) -> Iterator[Finding]:
    only = {
        (qualified(target.destination.host, namespace), target.destination.subset)
        for target in route.route
        if len(route.route) == 1 or target.weight
    }
    wanted = [(f"{path}.mirrors[{n}]", item.destination) for n, item in enumerate(route.mirrors)]
    if route.mirror is not None:
        wanted.append((f"{path}.mirror", route.mirror))
    for place, destination in wanted:
        if only == {(qualified(destination.host, namespace), destination.subset)}:
            yield place, "mirrors to where the requests go already: the same endpoints would do the work twice"
