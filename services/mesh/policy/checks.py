"""What no schema can see: names that must exist elsewhere, weights that must add up, ejection that cannot happen.

`check` is pure and returns every finding; errors make `translate` refuse, warnings are for the operator to read.
"""

import ipaddress
from collections.abc import Iterator, Mapping

from services.mesh.policy import access_doubts, doubts, suspicions
from services.mesh.policy.destination_rule import DestinationRule
from services.mesh.policy.envoy_filter import EnvoyFilter
from services.mesh.policy.objects import Policy, PolicyObject, gateway_name, key_of, qualified
from services.mesh.policy.others import InferencePool, ServiceEntry
from services.mesh.policy.problems import Problem
from services.mesh.policy.security import SecurityObject
from services.mesh.policy.suspicions import Finding
from services.mesh.policy.telemetry import conflicts, unseen
from services.mesh.policy.virtual_service import MESH, Destination, Route, VirtualService
from services.mesh.registry import Registry, Service

RETRY_ON = frozenset(
    {
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "envoy-ratelimited",
        "retriable-4xx",
        "refused-stream",
        "retriable-status-codes",
        "retriable-headers",
        "http3-post-connect-failure",
        "cancelled",
        "deadline-exceeded",
        "internal",
        "resource-exhausted",
        "unavailable",
    }
)
GRPC_STATUS = {
    name: number
    for number, name in enumerate(
        (
            "OK",
            "CANCELLED",
            "UNKNOWN",
            "INVALID_ARGUMENT",
            "DEADLINE_EXCEEDED",
            "NOT_FOUND",
            "ALREADY_EXISTS",
            "PERMISSION_DENIED",
            "RESOURCE_EXHAUSTED",
            "FAILED_PRECONDITION",
            "ABORTED",
            "OUT_OF_RANGE",
            "UNIMPLEMENTED",
            "INTERNAL",
            "UNAVAILABLE",
            "DATA_LOSS",
            "UNAUTHENTICATED",
        )
    )
}


def check(policy: Policy, registry: Registry) -> tuple[Problem, ...]:
    """Every mistake and every suspicion, in the order of the objects."""
    ports = _ports(policy, registry)
    found: list[Problem] = []

    def add(item: PolicyObject, findings: Iterator[Finding], *, is_warning: bool = False) -> None:
        label = f"{item.kind}/{item.metadata.name}"
        for path, message in findings:
            severity = "warning" if is_warning else "error"
            found.append(Problem(policy.file_of(item), label, path, message, severity))  # type: ignore[arg-type]  # one of the two literals

    for service in policy.virtual_services:
        add(service, _virtual_service(service, policy, ports))
        add(service, suspicions.starved(service, policy, registry), is_warning=True)
        add(service, doubts.routing(service, policy), is_warning=True)
    for rule in policy.destination_rules:
        add(rule, _destination_rule(rule, policy, ports))
        add(rule, suspicions.ejection(rule, registry), is_warning=True)
        add(rule, doubts.detection(rule), is_warning=True)
        add(rule, suspicions.failover(rule), is_warning=True)
    for pool in policy.inference_pools:
        add(pool, _pool(pool, policy, registry, ports))
        add(pool, doubts.nobody_selected(pool, registry), is_warning=True)
    for entry in policy.service_entries:
        add(entry, _service_entry(entry, policy, registry))
    for item in policy.envoy_filters:
        add(item, doubts.patches_nothing(item, policy, registry), is_warning=True)
    for gateway in policy.doors:
        add(gateway, suspicions.leads_nowhere(gateway, policy), is_warning=True)
    for second in [item for item in policy.envoy_filters if item.spec.limits][1:]:
        add(second, iter([("spec", "a second rate limit for the ingress; only one is supported")]))
    for second in _told_twice(policy):
        add(second, iter([("spec", "a second local_reply_config for the same workloads; only one is supported")]))
    secured: tuple[SecurityObject, ...] = (
        *policy.peer_authentications,
        *policy.authorization_policies,
        *policy.request_authentications,
    )
    for access in secured:
        add(access, access_doubts.doubts(access, policy, registry), is_warning=True)
    for singles in (policy.doors, policy.eastwest):
        for extra in singles[1:]:
            add(extra, iter([("kind", f"only one {extra.kind} is supported by the local control plane")]))
    for number, telemetry in enumerate(policy.telemetries):
        add(telemetry, conflicts(telemetry, policy.telemetries[:number]))
        add(telemetry, unseen(telemetry, _workloads(policy, registry)), is_warning=True)
    return tuple(found)


def _told_twice(policy: Policy) -> Iterator[EnvoyFilter]:
    """Filters about the bodies of refusals for workloads that an earlier one, or the same, has words for."""
    told: set[tuple[str, frozenset[tuple[str, str]]]] = set()
    for item in policy.envoy_filters:
        for context in ("GATEWAY", "SIDECAR_INBOUND"):
            key = (context, frozenset(item.spec.workload_selector.labels.items()))
            count = len(item.spec.replies(context))
            if count + (key in told) > 1:
                yield item
            if count:
                told.add(key)


def _workloads(policy: Policy, registry: Registry) -> tuple[Mapping[str, str], ...]:
    """The labels of everything a proxy may stand in front of."""
    services = [service.selector for service in registry.services]
    members = [item.labels for service in registry.services for each in service.endpoints.values() for item in each]
    return (*services, *members, *(gateway.spec.selector for gateway in policy.gateways))


def _ports(policy: Policy, registry: Registry) -> dict[str, tuple[int, ...]]:
    ports = {service.host: tuple(port.number for port in service.ports) for service in registry.services}
    for entry in policy.service_entries:
        for host in entry.spec.hosts:
            ports.setdefault(host, tuple(port.number for port in entry.spec.ports))
    return ports


def _virtual_service(service: VirtualService, policy: Policy, ports: dict[str, tuple[int, ...]]) -> Iterator[Finding]:
    namespace = service.metadata.namespace
    gateways = {gateway_name(name, namespace) for name in service.spec.gateways}
    known = {f"{gateway.metadata.namespace}/{gateway.metadata.name}" for gateway in policy.gateways} | {MESH}
    yield from (("spec.gateways", f"unknown gateway {name}") for name in sorted(gateways - known))
    for number, host in enumerate(service.spec.hosts):
        full = qualified(host, namespace)
        if MESH in gateways and full not in ports:
            yield f"spec.hosts[{number}]", f"unknown host {full}: neither a service of the registry nor a ServiceEntry"
        if full in [qualified(name, namespace) for name in service.spec.hosts[:number]]:
            yield f"spec.hosts[{number}]", f"{full} is listed twice"
        for other in policy.virtual_services:
            if key_of(other) >= key_of(service):
                continue
            theirs = {gateway_name(name, other.metadata.namespace) for name in other.spec.gateways}
            if gateways & theirs and full in {qualified(name, other.metadata.namespace) for name in other.spec.hosts}:
                yield (
                    f"spec.hosts[{number}]",
                    (
                        f"{full} is already routed by VirtualService/{other.metadata.name}; "
                        "the order of two such objects is undefined, put the routes into one"
                    ),
                )
    for number, route in enumerate(service.spec.http):
        yield from _route(route, f"spec.http[{number}]", service, policy, ports)


def _route(
    route: Route, path: str, service: VirtualService, policy: Policy, ports: dict[str, tuple[int, ...]]
) -> Iterator[Finding]:
    namespace = service.metadata.namespace
    for number, target in enumerate(route.route):
        yield from _target(target.destination, f"{path}.route[{number}].destination", namespace, policy, ports)
    if route.mirror is not None:
        yield from _target(route.mirror, f"{path}.mirror", namespace, policy, ports)
    for number, mirror in enumerate(route.mirrors):
        yield from _target(mirror.destination, f"{path}.mirrors[{number}].destination", namespace, policy, ports)
    total = sum(target.weight for target in route.route)
    if len(route.route) > 1 and total != 100:
        yield (
            f"{path}.route",
            (
                f"weights add up to {total}, not 100: Envoy takes weights relative to their sum, so the "
                "split would not be the percentages written here"
            ),
        )
    if route.retries is not None and route.retries.retry_on is not None:
        for word in route.retries.retry_on.split(","):
            name = word.strip()
            if name not in RETRY_ON and not (name.isdigit() and 100 <= int(name) <= 599):
                yield f"{path}.retries.retryOn", f"unknown condition '{name}'; Envoy would ignore it"
    if route.fault is not None and route.fault.abort is not None:
        status = route.fault.abort.grpc_status
        if status is not None and status not in GRPC_STATUS:
            yield f"{path}.fault.abort.grpcStatus", f"unknown gRPC status '{status}'"
    if route.rewrite is not None and route.rewrite.uri is not None:
        if any(match.uri is not None and match.uri.regex is not None for match in route.match):
            yield f"{path}.rewrite.uri", "cannot rewrite a path matched by regex: no prefix is known"
    for number, match in enumerate(route.match):
        for name in match.gateways:
            if gateway_name(name, namespace) not in {gateway_name(g, namespace) for g in service.spec.gateways}:
                yield f"{path}.match[{number}].gateways", f"{name} is not among spec.gateways, so this never matches"


def _target(
    target: Destination, path: str, namespace: str, policy: Policy, ports: dict[str, tuple[int, ...]]
) -> Iterator[Finding]:
    host = qualified(target.host, namespace)
    if host not in ports:
        yield f"{path}.host", f"unknown host {host}: neither a service of the registry nor a ServiceEntry"
        return
    if target.port is not None and target.port.number not in ports[host]:
        yield f"{path}.port.number", f"{host} has no port {target.port.number}"
    if target.port is None and len(ports[host]) > 1:
        yield f"{path}.port", f"{host} has several ports {ports[host]}: name one"
    if target.subset is None:
        return
    rule = policy.rule_for(host)
    if rule is None:
        yield f"{path}.subset", f"{host} has no DestinationRule, so no subset '{target.subset}'"
    elif target.subset not in {subset.name for subset in rule.spec.subsets}:
        yield f"{path}.subset", f"DestinationRule/{rule.metadata.name} defines no subset '{target.subset}'"


def _destination_rule(rule: DestinationRule, policy: Policy, ports: dict[str, tuple[int, ...]]) -> Iterator[Finding]:
    host = qualified(rule.spec.host, rule.metadata.namespace)
    if host not in ports:
        yield "spec.host", f"unknown host {host}: neither a service of the registry nor a ServiceEntry"
    for other in policy.destination_rules:
        if key_of(other) < key_of(rule) and qualified(other.spec.host, other.metadata.namespace) == host:
            yield "spec.host", f"{host} already has DestinationRule/{other.metadata.name}"
    names = [subset.name for subset in rule.spec.subsets]
    yield from (
        ("spec.subsets", f"subset '{name}' is defined twice")
        for name in sorted({n for n in names if names.count(n) > 1})
    )
    policies = [("spec.trafficPolicy", rule.spec.traffic_policy)]
    policies += [
        (f"spec.subsets[{i}].trafficPolicy", subset.traffic_policy) for i, subset in enumerate(rule.spec.subsets)
    ]
    for path, traffic in policies:
        for number, port in enumerate(traffic.port_level_settings if traffic is not None else ()):
            if host in ports and port.port.number not in ports[host]:
                yield f"{path}.portLevelSettings[{number}].port.number", f"{host} has no port {port.port.number}"


def _service_entry(entry: ServiceEntry, policy: Policy, registry: Registry) -> Iterator[Finding]:
    services = {service.host for service in registry.services}
    for number, host in enumerate(entry.spec.hosts):
        if host in services:
            yield f"spec.hosts[{number}]", f"{host} is already a service of the registry"
        if host in entry.spec.hosts[:number]:
            yield f"spec.hosts[{number}]", f"{host} is listed twice"
        for other in policy.service_entries:
            if key_of(other) < key_of(entry) and host in other.spec.hosts:
                yield f"spec.hosts[{number}]", f"{host} is already a host of ServiceEntry/{other.metadata.name}"
    for number, endpoint in enumerate(entry.spec.endpoints):
        if entry.spec.resolution == "STATIC" and not _is_ip(endpoint.address):
            yield f"spec.endpoints[{number}].address", f"{endpoint.address} is not an IP address; use resolution DNS"


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _pool(
    pool: InferencePool, policy: Policy, registry: Registry, ports: dict[str, tuple[int, ...]]
) -> Iterator[Finding]:
    ref = pool.spec.endpoint_picker_ref
    host = qualified(ref.name, pool.metadata.namespace)
    if host not in ports:
        yield "spec.endpointPickerRef.name", f"unknown service {host}"
    elif ref.port.number not in ports[host]:
        yield "spec.endpointPickerRef.port.number", f"{host} has no port {ref.port.number}"
    for service in (service for service in registry.services if picks_for(pool, service)):
        rivals = [
            other for other in policy.inference_pools if key_of(other) < key_of(pool) and picks_for(other, service)
        ]
        yield from (
            ("spec.selector", f"{service.host} is already picked for by InferencePool/{other.metadata.name}")
            for other in rivals
        )


def picks_for(pool: InferencePool, service: Service) -> bool:
    """Whether requests to `service` are to be placed by the pool's endpoint picker."""
    if {port.number for port in service.ports}.isdisjoint(port.number for port in pool.spec.target_ports):
        return False
    endpoints = (endpoint for group in service.endpoints.values() for endpoint in group)
    return selects(pool, service.selector, service.namespace) or any(
        selects(pool, endpoint.labels, service.namespace) for endpoint in endpoints
    )


def selects(pool: InferencePool, labels: Mapping[str, str], namespace: str) -> bool:
    """Whether the pool's selector takes in something with these labels."""
    return pool.metadata.namespace == namespace and pool.spec.selector.match_labels.items() <= dict(labels).items()
