"""What a cloud knows of the others: endpoints it was told of, how fresh that is, and how much each may be given.

Pure: time comes in with every call. `federation` feeds it and asks; it knows neither sockets nor Envoy. A cloud not
heard of for a while loses its endpoints. Endpoints that come back get their share little by little, so that a cloud
that has just started, with cold caches, is not flooded.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from services.mesh.registry import Endpoint, Registry

CLUSTER_LABEL = "topology.istio.io/cluster"
NETWORK_LABEL = "topology.istio.io/network"
REGION_LABEL = "topology.kubernetes.io/region"
ZONE_LABEL = "topology.kubernetes.io/zone"
RAMP_STEPS = 10
"""A return is told to Envoy in so many steps."""


def _address(text: str) -> str:
    ipaddress.ip_address(text)
    return text


Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$")]
Text = Annotated[str, StringConstraints(max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OfferedEndpoint(_Strict):
    """One ready endpoint."""

    address: Annotated[str, AfterValidator(_address)]
    port: int = Field(ge=1, le=65535)
    labels: dict[Text, Text] = Field(default_factory=dict, max_length=32)
    locality: Text = ""
    has_sidecar: bool = False


class Offer(_Strict):
    """Everything a cloud has ready for the others, by service and port name."""

    version: Literal[1] = 1
    cloud: Name
    services: dict[Name, dict[Name, list[OfferedEndpoint]]] = Field(max_length=64)


@dataclass(frozen=True, slots=True)
class Place:
    """Where this cloud is."""

    cloud: str
    locality: str

    @property
    def labels(self) -> dict[str, str]:
        """What Istio adds to the labels of every endpoint."""
        region, _, rest = self.locality.partition("/")
        zone = rest.partition("/")[0]
        given = {CLUSTER_LABEL: self.cloud, NETWORK_LABEL: self.cloud, REGION_LABEL: region, ZONE_LABEL: zone}
        return {key: value for key, value in given.items() if value}


def placed(registry: Registry, place: Place) -> Registry:
    """The registry of this cloud alone, each endpoint with its place."""

    def here(endpoint: Endpoint) -> Endpoint:
        return replace(
            endpoint,
            labels={**endpoint.labels, **place.labels},
            locality=endpoint.locality or place.locality,
            network=place.cloud,
        )

    return Registry(
        tuple(
            replace(service, endpoints={name: tuple(map(here, found)) for name, found in service.endpoints.items()})
            for service in registry.services
        )
    )


def offer(registry: Registry, cloud: str, kept: frozenset[str]) -> Offer:
    """What the others may know: all services but those `kept` within the cloud."""
    services = {
        service.name: {
            port: [
                OfferedEndpoint(
                    address=e.address,
                    port=e.port,
                    labels=dict(e.labels),
                    locality=e.locality,
                    has_sidecar=e.has_sidecar,
                )
                for e in found
            ]
            for port, found in service.endpoints.items()
        }
        for service in registry.services
        if service.name not in kept
    }
    return Offer(cloud=cloud, services=services)


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of the federation."""

    heartbeat_s: float = 0.25
    stale_s: float = 1.0
    """A cloud not heard of for so long loses its endpoints."""
    ramp_s: float = 10.0
    """How long an endpoint that comes back takes to its full share; 0: at once."""


@dataclass(slots=True)
class _Neighbour:
    offer: Offer | None = None
    heard: float = 0.0
    known: set[str] = field(default_factory=set)
    """Services it has ever had endpoints of: their return is a return."""
    returned: dict[str, float] = field(default_factory=dict)
    """When the endpoints of a service came back."""
    lost: int = 0


class Neighbours:
    """The other clouds, as last heard."""

    def __init__(self, names: tuple[str, ...], pace: Pace) -> None:
        self._pace = pace
        self._all = {name: _Neighbour() for name in names}

    def hear(self, name: str, offer: Offer, now: float) -> bool:
        """Takes an offer. Whether anything changed."""
        them = self._all[name]
        before = _ready(them.offer)
        for service in _ready(offer) - before:
            if service in them.known:
                them.returned[service] = now
        them.known |= _ready(offer)
        is_new = them.offer != offer
        them.offer, them.heard = offer, now
        return is_new

    def expire(self, now: float) -> list[str]:
        """Forgets the endpoints of every cloud not heard of for too long; their names."""
        gone = [
            name for name, them in self._all.items() if them.offer is not None and now - them.heard > self._pace.stale_s
        ]
        for name in gone:
            self._all[name].offer = None
            self._all[name].lost += 1
        return gone

    def heard(self, now: float) -> dict[str, float | None]:
        """Seconds since each cloud was heard, none for one that is gone or was never there."""
        return {name: None if them.offer is None else now - them.heard for name, them in self._all.items()}

    def ramps(self, now: float) -> dict[tuple[str, str], float]:
        """By cloud and service, the part of its share that each returning one gets now, in steps."""
        return {
            (name, service): part
            for name, them in self._all.items()
            for service, since in them.returned.items()
            if (part := self._ramp(since, now)) < 1
        }

    def joined(self, registry: Registry, now: float) -> Registry:
        """Our registry with the endpoints of the others. Services and ports that we do not have are left out."""
        ramps = self.ramps(now)
        services = []
        for service in registry.services:
            endpoints = dict(service.endpoints)
            for name, them in sorted(self._all.items()):
                theirs: Mapping[str, list[OfferedEndpoint]] = (
                    them.offer.services.get(service.name, {}) if them.offer is not None else {}
                )
                part = ramps.get((name, service.name), 1.0)
                for port in service.ports:
                    found = tuple(
                        Endpoint(
                            e.address,
                            e.port,
                            {**e.labels, CLUSTER_LABEL: name},
                            e.locality,
                            network=name,
                            ramp=part,
                            has_sidecar=e.has_sidecar,
                        )
                        for e in theirs.get(port.name, ())
                    )
                    endpoints[port.name] = (*endpoints.get(port.name, ()), *found)
            services.append(replace(service, endpoints=endpoints))
        return Registry(tuple(services))

    def _ramp(self, since: float, now: float) -> float:
        if self._pace.ramp_s <= 0:
            return 1.0
        steps = int((now - since) / self._pace.ramp_s * RAMP_STEPS)
        return min(1.0, max(1, steps) / RAMP_STEPS)


def _ready(offer: Offer | None) -> set[str]:
    if offer is None:
        return set()
    return {name for name, ports in offer.services.items() if any(ports.values())}
