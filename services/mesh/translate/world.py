"""Registry and ServiceEntries as one list of hosts, each with the policy that applies to it.

The rest of the translator asks this view; nothing here knows Envoy.
"""

from dataclasses import dataclass, replace

from services.mesh.policy import Policy
from services.mesh.policy.checks import picks_for
from services.mesh.policy.destination_rule import PortPolicy, Subset, TrafficPolicy
from services.mesh.policy.objects import qualified
from services.mesh.policy.others import InferencePool, ServiceEntry
from services.mesh.registry import Endpoint, Registry
from services.mesh.translate.names import cluster_name, config_path

TLS_MODE_LABEL = "security.istio.io/tlsMode"
_BLOCKS = (*PortPolicy.model_fields, "retry_budget")


@dataclass(frozen=True, slots=True)
class Member:
    """An endpoint with its weight among the others."""

    endpoint: Endpoint
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Port:
    """One port of a host and who answers there."""

    number: int
    is_http2: bool
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class PickedBy:
    """The endpoint picker that places the requests of a host."""

    host: str
    port: int
    fails_open: bool
    caller: str = ""

    @property
    def cluster(self) -> str:
        """The cluster by which it is asked: on behalf of the caller, with the caller's certificate."""
        return cluster_name(self.host, self.port, "", self.caller)


@dataclass(frozen=True, slots=True)
class Host:
    """A destination: a service of the registry or a host of a ServiceEntry.

    `identities` are the SPIFFE ids that may answer for it; `caller` is the account from whose side it is seen.
    """

    name: str
    ports: tuple[Port, ...]
    resolves_by_dns: bool
    subsets: tuple[Subset, ...]
    traffic: TrafficPolicy | None
    picked_by: PickedBy | None
    identities: tuple[str, ...] = ()
    caller: str = ""
    rule: str = ""
    """The DestinationRule it follows, by Istio's name for the object."""

    def cluster(self, port: int, subset: str = "") -> str:
        """The name of the caller's cluster for this host."""
        return cluster_name(self.name, port, subset, self.caller)

    def port(self, number: int) -> Port:
        """The port of that number (checked before translation)."""
        return next(port for port in self.ports if port.number == number)

    def subset(self, name: str) -> Subset | None:
        """The subset of that name."""
        return next((subset for subset in self.subsets if subset.name == name), None)

    def policy(self, port: int, subset: str = "") -> TrafficPolicy:
        """Istio's merge: a subset's blocks replace the rule's one by one; a port's settings inherit nothing."""
        merged = _merge(TrafficPolicy(), self.traffic, port)
        chosen = self.subset(subset) if subset else None
        return _merge(merged, chosen.traffic_policy if chosen is not None else None, port)


@dataclass(frozen=True, slots=True)
class World:
    """Every host there is, by name, in a stable order."""

    hosts: dict[str, Host]


def survey(policy: Policy, registry: Registry) -> World:
    """Joins registry, ServiceEntries, DestinationRules and InferencePools."""
    hosts: dict[str, Host] = {}
    for service in sorted(registry.services, key=lambda item: item.host):
        ports = tuple(
            Port(port.number, port.protocol == "grpc", tuple(map(Member, service.endpoints.get(port.name, ()))))
            for port in service.ports
        )
        pool = next((pool for pool in policy.inference_pools if picks_for(pool, service)), None)
        host = _host(policy, service.host, ports, dns=False, pool=pool)
        hosts[service.host] = replace(host, identities=(service.identity,))
    for entry in policy.service_entries:
        for name in entry.spec.hosts:
            hosts[name] = _host(policy, name, _entry_ports(entry, name), dns=entry.spec.resolution == "DNS", pool=None)
    return World(hosts)


def _host(policy: Policy, name: str, ports: tuple[Port, ...], *, dns: bool, pool: InferencePool | None) -> Host:
    rule = policy.rule_for(name)
    picked_by = None
    if pool is not None:
        ref = pool.spec.endpoint_picker_ref
        picker = qualified(ref.name, pool.metadata.namespace)
        picked_by = PickedBy(picker, ref.port.number, ref.failure_mode == "FailOpen")
    subsets = rule.spec.subsets if rule is not None else ()
    traffic = rule.spec.traffic_policy if rule is not None else None
    return Host(name, ports, dns, subsets, traffic, picked_by, rule=config_path(rule) if rule is not None else "")


def _entry_ports(entry: ServiceEntry, name: str) -> tuple[Port, ...]:
    ports = []
    for port in entry.spec.ports:
        fallback = port.target_port or port.number
        members = tuple(
            Member(
                Endpoint(
                    item.address,
                    item.ports.get(port.name, fallback),
                    item.labels,
                    item.locality or "",
                    has_sidecar=item.labels.get(TLS_MODE_LABEL) == "istio",
                ),
                item.weight or 1,
            )
            for item in entry.spec.endpoints
        ) or (Member(Endpoint(name, fallback)),)
        ports.append(Port(port.number, port.protocol != "HTTP", members))
    return tuple(ports)


def _merge(under: TrafficPolicy, over: TrafficPolicy | None, port: int) -> TrafficPolicy:
    if over is None:
        return under
    blocks = {name: value for name in _BLOCKS if (value := getattr(over, name)) is not None}
    for level in over.port_level_settings:
        if level.port.number == port:
            blocks |= {name: getattr(level, name) for name in PortPolicy.model_fields}
            break
    return under.model_copy(update=blocks)
