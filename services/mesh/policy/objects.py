"""The policy as a whole: every object of every file, remembered with the file it came from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from services.mesh.policy.destination_rule import DestinationRule
from services.mesh.policy.envoy_filter import EnvoyFilter
from services.mesh.policy.others import Gateway, InferencePool, ServiceEntry
from services.mesh.policy.security import AuthorizationPolicy, PeerAuthentication, RequestAuthentication
from services.mesh.policy.telemetry import Telemetry
from services.mesh.policy.virtual_service import VirtualService

CLUSTER_DOMAIN = "svc.cluster.local"

PolicyObject = (
    VirtualService
    | DestinationRule
    | ServiceEntry
    | InferencePool
    | Gateway
    | Telemetry
    | EnvoyFilter
    | PeerAuthentication
    | AuthorizationPolicy
    | RequestAuthentication
)
ObjectKey = tuple[str, str, str]
"""Kind, namespace, name: what identifies an object within its cluster."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Validated policy. `files` tells where an object was read, for messages only."""

    virtual_services: tuple[VirtualService, ...] = ()
    destination_rules: tuple[DestinationRule, ...] = ()
    service_entries: tuple[ServiceEntry, ...] = ()
    inference_pools: tuple[InferencePool, ...] = ()
    gateways: tuple[Gateway, ...] = ()
    telemetries: tuple[Telemetry, ...] = ()
    envoy_filters: tuple[EnvoyFilter, ...] = ()
    peer_authentications: tuple[PeerAuthentication, ...] = ()
    authorization_policies: tuple[AuthorizationPolicy, ...] = ()
    request_authentications: tuple[RequestAuthentication, ...] = ()
    files: Mapping[ObjectKey, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[PolicyObject]:
        yield from self.virtual_services
        yield from self.destination_rules
        yield from self.service_entries
        yield from self.inference_pools
        yield from self.gateways
        yield from self.telemetries
        yield from self.envoy_filters
        yield from self.peer_authentications
        yield from self.authorization_policies
        yield from self.request_authentications

    @property
    def doors(self) -> tuple[Gateway, ...]:
        """The gateways that clients come through."""
        return tuple(gateway for gateway in self.gateways if not gateway.passes_through)

    @property
    def eastwest(self) -> tuple[Gateway, ...]:
        """The gateways that other clouds come through."""
        return tuple(gateway for gateway in self.gateways if gateway.passes_through)

    def file_of(self, item: PolicyObject) -> str:
        """The file `item` came from, or nothing for an object made in memory."""
        return self.files.get(key_of(item), "")

    def rule_for(self, host: str) -> DestinationRule | None:
        """The DestinationRule of a fully qualified host (`check` refuses a second one)."""
        for rule in self.destination_rules:
            if qualified(rule.spec.host, rule.metadata.namespace) == host:
                return rule
        return None


def key_of(item: PolicyObject) -> ObjectKey:
    """The identity of an object."""
    return (item.kind, item.metadata.namespace, item.metadata.name)


def qualified(host: str, namespace: str) -> str:
    """Istio's rule: a name without dots means the service of that name in the namespace of the object naming it."""
    return host if "." in host or host == "*" else f"{host}.{namespace}.{CLUSTER_DOMAIN}"


def gateway_name(name: str, namespace: str) -> str:
    """A gateway reference as `namespace/name` (`mesh` stays what it is)."""
    return name if "/" in name or name == "mesh" else f"{namespace}/{name}"
