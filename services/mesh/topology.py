"""Which processes make the local mesh: `deploy/local/mesh.yaml`, the laptop's stand-in for Deployments and Services.

Read strictly: an unknown key or a circle of `after` is refused with its place. It gives the
instances to start and, with the ports of those that are ready, the registry that policy is checked against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from services.mesh.registry import Endpoint, Registry, Service, ServicePort, Workload
from services.mesh.translate import Caller, InboundPort, Sidecar

MAX_FILE_BYTES = 64 * 1024
MAX_REPLICAS = 32

Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$")]
Text = Annotated[str, StringConstraints(max_length=4096)]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_./]{0,61}[A-Za-z0-9])?$")]
Module = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*$", max_length=128)]


class TopologyError(Exception):
    """The topology cannot be used; the text has every reason, one per line."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PortSpec(_Strict):
    """A port of the service, as callers name it."""

    name: Name
    number: int = Field(ge=1, le=65535)
    protocol: Literal["grpc", "http"]


class ReplicaSpec(_Strict):
    """A number of equal processes, told apart from the service's others by labels."""

    name: Name
    count: int = Field(1, ge=0, le=MAX_REPLICAS)
    own_model_count: int | None = Field(None, ge=0, le=MAX_REPLICAS)
    """Instead of `count`, when the model is not the one in the repository."""
    labels: dict[Label, Label] = Field(default_factory=dict, max_length=16)
    locality: Annotated[str, StringConstraints(max_length=128)] = ""
    environment: dict[Variable, Text] = Field(default_factory=dict, max_length=64)


class ServiceSpec(_Strict):
    """One service: its program, its ports, whom it calls, what must be ready before it starts."""

    module: Module
    ports: list[PortSpec] = Field(min_length=1, max_length=8)
    calls: list[Name] = Field(default_factory=list, max_length=16)
    """Services it reaches through the mesh. Without any it gets no outbound listener: it can call nobody."""
    after: list[Name] = Field(default_factory=list, max_length=16)
    environment: dict[Variable, Text] = Field(default_factory=dict, max_length=64)
    replicas: list[ReplicaSpec] = Field(
        default_factory=lambda: [ReplicaSpec(name="main", count=1)], min_length=1, max_length=8
    )


class Topology(_Strict):
    """The whole file."""

    version: Literal[1]
    services: dict[Name, ServiceSpec] = Field(min_length=1, max_length=32)


@dataclass(frozen=True, slots=True)
class Instance:
    """One process to start. `ports` are its own, by the service's names for them; `inbound` those of its sidecar."""

    name: str
    service: str
    module: str
    ports: Mapping[str, int]
    inbound: Mapping[str, int]
    labels: Mapping[str, str]
    locality: str
    environment: Mapping[str, str]
    after: tuple[str, ...]


def load(path: Path, overrides: str = "", is_own_model: bool = False) -> Topology:
    """The topology with the replica counts for the model, and those overridden by `service/replicas=count` pairs.

    Raises `TopologyError`.
    """
    try:
        raw = path.read_bytes()[: MAX_FILE_BYTES + 1]
        if len(raw) > MAX_FILE_BYTES:
            raise TopologyError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        topology = Topology.model_validate(yaml.safe_load(raw))
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise TopologyError("\n".join(lines)) from None
    except (OSError, yaml.YAMLError) as error:
        raise TopologyError(f"{path}: {' '.join(str(error).split())}") from None
    topology = _override(_for_model(topology, is_own_model), overrides)
    if problems := list(_problems(topology)):
        raise TopologyError("\n".join(f"{path}: {problem}" for problem in problems))
    return topology


def instances(topology: Topology, ports: Iterable[int]) -> tuple[Instance, ...]:
    """Every process to start, its ports drawn from `ports`."""
    supply = iter(ports)
    names = {name: tuple(_instance_names(name, spec)) for name, spec in topology.services.items()}
    found: list[Instance] = []
    for name, spec in topology.services.items():
        after = tuple(instance for other in spec.after for instance, _ in names[other])
        for instance, replica in names[name]:
            found.append(
                Instance(
                    name=instance,
                    service=name,
                    module=spec.module,
                    ports={port.name: next(supply) for port in spec.ports},
                    inbound={port.name: next(supply) for port in spec.ports},
                    labels={"app": name, **replica.labels},
                    locality=replica.locality,
                    environment={**spec.environment, **replica.environment},
                    after=after,
                )
            )
    return tuple(found)


def registry(topology: Topology, namespace: str, address: str, ready: Iterable[Instance]) -> Registry:
    """What Kubernetes would tell Istio, with the ready instances as endpoints: their sidecars' ports."""
    up = tuple(ready)
    services = []
    for name, spec in topology.services.items():
        endpoints = {
            port.name: tuple(
                Endpoint(address, item.inbound[port.name], item.labels, item.locality, has_sidecar=True)
                for item in up
                if item.service == name
            )
            for port in spec.ports
        }
        ports = tuple(ServicePort(port.name, port.number, port.protocol) for port in spec.ports)
        services.append(Service(name, namespace, ports, endpoints, {"app": name}))
    return Registry(tuple(services))


def callers(topology: Topology, ports: Iterable[int]) -> tuple[Caller, ...]:
    """The service accounts that call others, each with the port of its outbound listener, drawn from `ports`."""
    supply = iter(ports)
    return tuple(
        Caller(name, next(supply), frozenset(spec.calls))
        for name, spec in topology.services.items()
        if spec.calls and any(replica.count for replica in spec.replicas)
    )


def sidecars(topology: Topology, namespace: str, found: Iterable[Instance]) -> tuple[Sidecar, ...]:
    """The inbound side of every process."""
    return tuple(
        Sidecar(
            Workload(item.name, namespace, item.service, item.labels),
            item.service,
            tuple(
                InboundPort(port.number, port.protocol, item.inbound[port.name], item.ports[port.name])
                for port in topology.services[item.service].ports
            ),
        )
        for item in found
    )


def _instance_names(name: str, spec: ServiceSpec) -> Iterable[tuple[str, ReplicaSpec]]:
    for replica in spec.replicas:
        for index in range(replica.count):
            is_alone = len(spec.replicas) == 1 and replica.count == 1
            yield name if is_alone else f"{name}-{replica.name}-{index}", replica


def _for_model(topology: Topology, is_own: bool) -> Topology:
    wanted = {
        (name, replica.name): replica.own_model_count
        for name, spec in topology.services.items()
        for replica in spec.replicas
        if is_own and replica.own_model_count is not None
    }
    return _with_counts(topology, wanted)


def _override(topology: Topology, overrides: str) -> Topology:
    wanted: dict[tuple[str, str], int] = {}
    for item in filter(None, (part.strip() for part in overrides.split(","))):
        place, _, count = item.partition("=")
        service, _, replicas = place.partition("/")
        spec = topology.services.get(service)
        known = {replica.name for replica in spec.replicas} if spec is not None else set()
        if replicas not in known or not count.isdigit() or int(count) > MAX_REPLICAS:
            raise TopologyError(
                f"AUTOGLM_REPLICAS: {item!r} is not service/replicas=count, of a known service, at most {MAX_REPLICAS}"
            )
        wanted[service, replicas] = int(count)
    return _with_counts(topology, wanted)


def _with_counts(topology: Topology, wanted: Mapping[tuple[str, str], int]) -> Topology:
    services = {
        name: spec.model_copy(
            update={
                "replicas": [
                    replica.model_copy(update={"count": wanted.get((name, replica.name), replica.count)})
                    for replica in spec.replicas
                ]
            }
        )
        for name, spec in topology.services.items()
    }
    return topology.model_copy(update={"services": services})


def _problems(topology: Topology) -> Iterable[str]:
    for name, spec in topology.services.items():
        for other in spec.after:
            if other not in topology.services:
                yield f"services.{name}.after: unknown service {other}"
        for other in spec.calls:
            if other not in topology.services:
                yield f"services.{name}.calls: unknown service {other}"
        ports = [port.name for port in spec.ports]
        if len(set(ports)) < len(ports):
            yield f"services.{name}.ports: a port name is used twice"
        replicas = [replica.name for replica in spec.replicas]
        if len(set(replicas)) < len(replicas):
            yield f"services.{name}.replicas: a name is used twice"
    left = {name: set(spec.after) & topology.services.keys() for name, spec in topology.services.items()}
    while free := [name for name, after in left.items() if not after & left.keys()]:
        for name in free:
            del left[name]
    if left:
        yield f"services: these wait for each other: {', '.join(sorted(left))}"
