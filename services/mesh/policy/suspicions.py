"""Policy that a cluster takes and that still cannot do what its author meant. Each finding becomes a warning.

Warnings depend on what runs now: a service without any endpoint is starting, and nothing is said about it.
"""

import math
from collections.abc import Iterator

from services.mesh.policy.destination_rule import DestinationRule, OutlierDetection, Subset
from services.mesh.policy.objects import Policy, gateway_name, qualified
from services.mesh.policy.others import Gateway
from services.mesh.policy.virtual_service import VirtualService
from services.mesh.registry import Endpoint, Registry, Service

_ENVOY_MAX_EJECTION_PERCENT = 10

Finding = tuple[str, str]
"""Path and message."""


def starved(service: VirtualService, policy: Policy, registry: Registry) -> Iterator[Finding]:
    """Traffic for a subset in which nobody runs: Envoy fails that share, it does not send it elsewhere."""
    for number, route in enumerate(service.spec.http):
        for index, target in enumerate(route.route):
            host = qualified(target.destination.host, service.metadata.namespace)
            rule, running = policy.rule_for(host), _endpoints(_service(registry, host))
            subsets = rule.spec.subsets if rule is not None else ()
            subset = next((subset for subset in subsets if subset.name == target.destination.subset), None)
            share = target.weight if len(route.route) > 1 else 100
            if subset is None or not share or not running or _is_pinned(subset):
                continue
            if not any(subset.labels.items() <= dict(endpoint.labels).items() for endpoint in running):
                labels = ", ".join(f"{key}={value}" for key, value in sorted(subset.labels.items()))
                yield (
                    f"spec.http[{number}].route[{index}]",
                    f"{share} % of the requests go to subset {subset.name} of {host}, and no endpoint has its labels "
                    f"({labels}): Envoy fails them (UNAVAILABLE); start a replica, or make the weight 0",
                )


def leads_nowhere(gateway: Gateway, policy: Policy) -> Iterator[Finding]:
    """A door behind which no VirtualService stands, as after emptying a file."""
    name = f"{gateway.metadata.namespace}/{gateway.metadata.name}"
    bound = (
        gateway_name(item, service.metadata.namespace)
        for service in policy.virtual_services
        for item in service.spec.gateways
    )
    if name not in bound:
        yield "metadata.name", f"no VirtualService names gateway {name}: every request from outside is answered 404"


def failover(rule: DestinationRule) -> Iterator[Finding]:
    """Istio orders places only where outlier detection can tell that one is gone."""
    policies = [("spec.trafficPolicy", rule.spec.traffic_policy, rule.spec.traffic_policy)]
    policies += [
        (f"spec.subsets[{number}].trafficPolicy", subset.traffic_policy, rule.spec.traffic_policy)
        for number, subset in enumerate(rule.spec.subsets)
    ]
    for path, traffic, under in policies:
        balancer = traffic.load_balancer if traffic is not None else None
        setting = balancer.locality_lb_setting if balancer is not None else None
        if traffic is None or setting is None or not (setting.failover or setting.failover_priority):
            continue
        if traffic.outlier_detection is None and (under is None or under.outlier_detection is None):
            yield (
                f"{path}.loadBalancer.localityLbSetting",
                "failover needs outlierDetection: without it Istio gives no priorities, and every place gets requests",
            )


def ejection(rule: DestinationRule, registry: Registry) -> Iterator[Finding]:
    """Envoy ejects while (ejected + 1) of all endpoints stays within the percentage: with few, that may be never."""
    host = qualified(rule.spec.host, rule.metadata.namespace)
    service = _service(registry, host)
    if service is None:
        return
    policies = [("spec.trafficPolicy", rule.spec.traffic_policy, dict[str, str]())]
    policies += [
        (f"spec.subsets[{number}].trafficPolicy", subset.traffic_policy, subset.labels)
        for number, subset in enumerate(rule.spec.subsets)
    ]
    for path, traffic, labels in policies:
        detection: OutlierDetection | None = traffic.outlier_detection if traffic is not None else None
        if detection is None:
            continue
        percent = detection.max_ejection_percent
        percent = _ENVOY_MAX_EJECTION_PERCENT if percent is None else percent
        for name, endpoints in service.endpoints.items():
            count = sum(labels.items() <= dict(endpoint.labels).items() for endpoint in endpoints)
            if count and percent * count < 100:
                needed = "no number of endpoints is enough" if percent == 0 else f"it takes {math.ceil(100 / percent)}"
                yield (
                    f"{path}.outlierDetection.maxEjectionPercent",
                    (
                        f"{percent} % of the {count} endpoint(s) on port {name} is less than one: nothing is "
                        f"ever ejected ({needed}); use 100"
                    ),
                )


def _is_pinned(subset: Subset) -> bool:
    """A subset that is one cloud by intent: with that cloud down, failing is what was meant."""
    return any(label.startswith("topology.istio.io/") for label in subset.labels)


def _service(registry: Registry, host: str) -> Service | None:
    return next((service for service in registry.services if service.host == host), None)


def _endpoints(service: Service | None) -> list[Endpoint]:
    return [endpoint for group in service.endpoints.values() for endpoint in group] if service is not None else []
