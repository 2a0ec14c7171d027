"""What Kubernetes would tell Istio: which services exist, their ports, and the endpoints behind each port.

Pure data. Whoever starts the local processes fills it in; `policy.check` and `translate.translate` read it. It knows
neither Envoy nor the policy: labels such as `version: canary` only mean something once a DestinationRule selects them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

CLUSTER_DOMAIN = "svc.cluster.local"
TRUST_DOMAIN = "cluster.local"


def spiffe_id(namespace: str, service_account: str) -> str:
    """The name in a workload's certificate."""
    return f"spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{service_account}"


@dataclass(frozen=True, slots=True)
class Workload:
    """Who a proxy listener stands in front of: one process of a service, or the door (`ingress`)."""

    name: str
    namespace: str
    service_account: str
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Its SPIFFE id."""
        return spiffe_id(self.namespace, self.service_account)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One reachable process. `locality` is `region/zone/subzone` (the region is the cloud), or empty.

    `has_sidecar` is Istio's label `security.istio.io/tlsMode: istio`: a listener in front of it takes mutual TLS.
    """

    address: str
    port: int
    labels: Mapping[str, str] = field(default_factory=dict)
    locality: str = ""
    has_sidecar: bool = False


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a service. `grpc` is spoken as HTTP/2, `http` as HTTP/1.1."""

    name: str
    number: int
    protocol: Literal["grpc", "http"]


@dataclass(frozen=True, slots=True)
class Service:
    """A Kubernetes Service. The first port is the one meant when a caller's authority carries no port.

    `selector` holds the labels that every endpoint of the service carries: it lets an InferencePool be recognised
    before the first worker is up, so the arrival of workers changes endpoints only, never clusters or routes.
    """

    name: str
    namespace: str
    ports: tuple[ServicePort, ...]
    endpoints: Mapping[str, tuple[Endpoint, ...]] = field(default_factory=dict)
    selector: Mapping[str, str] = field(default_factory=dict)

    @property
    def host(self) -> str:
        """The name callers put into `:authority`."""
        return f"{self.name}.{self.namespace}.{CLUSTER_DOMAIN}"

    @property
    def identity(self) -> str:
        """Who answers: every process of a service runs under the service account of the service's name."""
        return spiffe_id(self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class Registry:
    """All services this mesh member can see."""

    services: tuple[Service, ...]
