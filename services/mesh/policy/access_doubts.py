"""Access policy that a cluster takes and that cannot do what its author meant: names of nobody, tokens nobody checks.

Each finding becomes a warning. An idle ALLOW rule locks somebody out, an idle DENY rule lets somebody in, in silence.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from services.mesh.policy.objects import Policy
from services.mesh.policy.security import (
    ROOT_NAMESPACE,
    AuthorizationPolicy,
    PeerAuthentication,
    RequestAuthentication,
    Rule,
    SecurityObject,
    concerns,
)
from services.mesh.policy.suspicions import Finding
from services.mesh.registry import TRUST_DOMAIN, Registry, Workload


@dataclass(frozen=True, slots=True)
class _Known:
    """A kind of workload and the ports policies know it by."""

    workload: Workload
    ports: frozenset[int]


def doubts(item: SecurityObject, policy: Policy, registry: Registry) -> Iterator[Finding]:
    """What is suspicious about one object."""
    known = list(_known(policy, registry))
    concerned = [one for one in known if concerns(item, one.workload)]
    if item.spec.selector.match_labels and not concerned:
        labels = ", ".join(f"{key}={value}" for key, value in sorted(item.spec.selector.match_labels.items()))
        yield "spec.selector", f"no workload of namespace {item.metadata.namespace} has the labels {labels}"
    match item:
        case PeerAuthentication():
            yield from _peer(item, policy)
        case AuthorizationPolicy():
            for number, rule in enumerate(item.spec.rules):
                path = f"spec.rules[{number}]"
                yield from _accounts(rule, path, item.metadata.namespace, known)
                yield from _tokens(rule, path, policy, concerned)
                yield from _calls(rule, path, concerned)
        case RequestAuthentication():
            issuers = [rule.issuer for rule in item.spec.jwt_rules]
            for number, issuer in enumerate(issuers):
                if issuer in issuers[:number]:
                    yield f"spec.jwtRules[{number}].issuer", f"{issuer} is listed twice"


def _known(policy: Policy, registry: Registry) -> Iterator[_Known]:
    for service in registry.services:
        ports = frozenset(port.number for port in service.ports)
        named = dict(service.selector) or {"app": service.name}
        running = [dict(endpoint.labels) for group in service.endpoints.values() for endpoint in group]
        for labels in (named, *({**named, **labels} for labels in running)):
            yield _Known(Workload(service.name, service.namespace, service.name, labels), ports)
    for gateway in policy.gateways:
        name, namespace = gateway.metadata.name, gateway.metadata.namespace
        ports = frozenset(server.port.number for server in gateway.spec.servers)
        yield _Known(Workload(name, namespace, name, gateway.spec.selector), ports)


def _peer(item: PeerAuthentication, policy: Policy) -> Iterator[Finding]:
    labels = item.spec.selector.match_labels
    if labels and item.metadata.namespace == ROOT_NAMESPACE:
        yield "spec.selector", f"ignored in {ROOT_NAMESPACE}: there only an object for the whole mesh counts"
    for other in policy.peer_authentications:
        if other is item:
            return
        if (other.metadata.namespace, other.spec.selector) == (item.metadata.namespace, item.spec.selector):
            yield "spec.selector", f"PeerAuthentication/{other.metadata.name} is for the same workloads and comes first"


def _accounts(rule: Rule, path: str, namespace: str, known: list[_Known]) -> Iterator[Finding]:
    accounts = {(one.workload.namespace, one.workload.service_account) for one in known}
    namespaces = {owner for owner, _ in accounts}
    for number, part in enumerate(rule.from_):
        place = f"{path}.from[{number}].source"
        for name in ("principals", "not_principals"):
            for principal in getattr(part.source, name):
                if "*" in principal:
                    continue
                field = f"{place}.{'principals' if name == 'principals' else 'notPrincipals'}"
                words = principal.split("/")
                if len(words) != 5 or (words[1], words[3]) != ("ns", "sa"):
                    yield field, f"{principal} is not trust-domain/ns/namespace/sa/account: nobody is called so"
                elif words[0] != TRUST_DOMAIN:
                    yield field, f"{principal} is of another trust domain than {TRUST_DOMAIN}: nobody here is called so"
                elif words[2] in namespaces and (words[2], words[4]) not in accounts:
                    yield field, f"there is no service account {words[4]} in namespace {words[2]}"
        for name, field in (("service_accounts", "serviceAccounts"), ("not_service_accounts", "notServiceAccounts")):
            for account in getattr(part.source, name):
                owner, _, plain = account.rpartition("/")
                owner = owner or namespace
                if owner in namespaces and (owner, plain) not in accounts:
                    yield f"{place}.{field}", f"there is no service account {plain} in namespace {owner}"


def _tokens(rule: Rule, path: str, policy: Policy, concerned: list[_Known]) -> Iterator[Finding]:
    asks = [
        f"{path}.from[{number}].source"
        for number, part in enumerate(rule.from_)
        if part.source.request_principals or part.source.not_request_principals
    ]
    asks += [f"{path}.when[{n}]" for n, condition in enumerate(rule.when) if condition.key.startswith("request.auth.")]
    if not asks:
        return
    blind = sorted(
        {
            one.workload.name
            for one in concerned
            if not any(concerns(item, one.workload) for item in policy.request_authentications)
        }
    )
    if blind:
        yield asks[0], f"asks about a token, and no RequestAuthentication reads tokens for {', '.join(blind)}"


def _calls(rule: Rule, path: str, concerned: list[_Known]) -> Iterator[Finding]:
    ports = {port for one in concerned for port in one.ports}
    for number, part in enumerate(rule.to):
        place = f"{path}.to[{number}].operation"
        for name, field in (("paths", "paths"), ("not_paths", "notPaths")):
            for value in getattr(part.operation, name):
                if value[0] not in "/*":
                    yield f"{place}.{field}", f"{value} does not begin with a slash: no path is so"
        if ports:
            for name, field in (("ports", "ports"), ("not_ports", "notPorts")):
                for value in getattr(part.operation, name):
                    if int(value) not in ports:
                        known = ", ".join(map(str, sorted(ports)))
                        yield f"{place}.{field}", f"the workloads have no port {value}; they have {known}"
