"""The Gateway API's objects that istio/gateway-api uses: strict models, and checks across them.

Only `python -m services.mesh check` reads them. The local control plane serves the VirtualServices instead and refuses
these kinds by name: one policy must not be said twice in one mesh.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from services.mesh.policy.base import (
    MAX_LIST,
    MAX_WEIGHT,
    Document,
    HeaderName,
    HostPattern,
    ObjectName,
    PortNumber,
    Strict,
)
from services.mesh.policy.objects import qualified
from services.mesh.policy.others import InferencePool
from services.mesh.registry import Registry

API_GROUP = "gateway.networking.k8s.io"
POOL_GROUP = "inference.networking.k8s.io"
Finding = tuple[str, str]
Section = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class Namespaces(Strict):
    from_: Literal["Same", "All"] = Field(default="Same", alias="from")


class AllowedRoutes(Strict):
    namespaces: Namespaces = Namespaces()


class Listener(Strict):
    name: Section
    port: PortNumber
    protocol: Literal["HTTP"]
    hostname: HostPattern | None = None
    allowed_routes: AllowedRoutes = AllowedRoutes()


class GatewaySpec(Strict):
    gateway_class_name: ObjectName
    listeners: tuple[Listener, ...] = Field(min_length=1, max_length=16)


class ApiGateway(Document):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["Gateway"]
    spec: GatewaySpec


class ParentRef(Strict):
    group: Literal["gateway.networking.k8s.io"] = "gateway.networking.k8s.io"
    kind: Literal["Gateway"] = "Gateway"
    name: ObjectName
    section_name: Section | None = None


class BackendRef(Strict):
    group: Literal["", "inference.networking.k8s.io"] = ""
    kind: Literal["Service", "InferencePool"] = "Service"
    name: ObjectName
    port: PortNumber | None = None
    weight: Annotated[int, Field(ge=0, le=MAX_WEIGHT)] = 1


class PathMatch(Strict):
    type: Literal["Exact", "PathPrefix"] = "PathPrefix"
    value: Annotated[str, StringConstraints(pattern=r"^/", max_length=1024)] = "/"


class HeaderMatch(Strict):
    type: Literal["Exact"] = "Exact"
    name: HeaderName
    value: Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class HttpMatch(Strict):
    path: PathMatch = PathMatch()
    headers: tuple[HeaderMatch, ...] = Field(default=(), max_length=16)


class MethodMatch(Strict):
    type: Literal["Exact"] = "Exact"
    service: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$", max_length=1024)]
    method: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=1024)] | None = None


class GrpcMatch(Strict):
    method: MethodMatch
    headers: tuple[HeaderMatch, ...] = Field(default=(), max_length=16)


class HttpRule(Strict):
    matches: tuple[HttpMatch, ...] = Field(default=(), max_length=MAX_LIST)
    backend_refs: tuple[BackendRef, ...] = Field(min_length=1, max_length=16)


class GrpcRule(Strict):
    matches: tuple[GrpcMatch, ...] = Field(default=(), max_length=MAX_LIST)
    backend_refs: tuple[BackendRef, ...] = Field(min_length=1, max_length=16)


class HttpRouteSpec(Strict):
    parent_refs: tuple[ParentRef, ...] = Field(min_length=1, max_length=8)
    hostnames: tuple[HostPattern, ...] = Field(default=(), max_length=16)
    rules: tuple[HttpRule, ...] = Field(min_length=1, max_length=16)


class GrpcRouteSpec(Strict):
    parent_refs: tuple[ParentRef, ...] = Field(min_length=1, max_length=8)
    hostnames: tuple[HostPattern, ...] = Field(default=(), max_length=16)
    rules: tuple[GrpcRule, ...] = Field(min_length=1, max_length=16)


class HttpRoute(Document):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    spec: HttpRouteSpec


class GrpcRoute(Document):
    api_version: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["GRPCRoute"]
    spec: GrpcRouteSpec


GATEWAY_KINDS: dict[str, type[Document]] = {"Gateway": ApiGateway, "HTTPRoute": HttpRoute, "GRPCRoute": GrpcRoute}


def check_gateway_api(items: Sequence[Document], registry: Registry) -> Iterator[tuple[Document, str, str]]:
    """(object, path, message) of everything named that does not exist, and of pools that fight over a worker."""
    gateways = {item.metadata.name: item for item in items if isinstance(item, ApiGateway)}
    pools = {item.metadata.name: item for item in items if isinstance(item, InferencePool)}
    for item in items:
        if isinstance(item, HttpRoute | GrpcRoute):
            yield from ((item, path, text) for path, text in _route(item, gateways, pools, registry))
        if isinstance(item, InferencePool):
            yield from ((item, path, text) for path, text in _pool(item, list(pools.values()), registry))
        if isinstance(item, ApiGateway):
            names = [listener.name for listener in item.spec.listeners]
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield item, "spec.listeners", f"listener '{name}' is defined twice"


def _route(
    route: HttpRoute | GrpcRoute,
    gateways: dict[str, ApiGateway],
    pools: dict[str, InferencePool],
    registry: Registry,
) -> Iterator[Finding]:
    for number, parent in enumerate(route.spec.parent_refs):
        path = f"spec.parentRefs[{number}]"
        gateway = gateways.get(parent.name)
        if gateway is None:
            yield f"{path}.name", f"unknown Gateway {parent.name}"
            continue
        names = [listener.name for listener in gateway.spec.listeners]
        if parent.section_name is not None and parent.section_name not in names:
            yield f"{path}.sectionName", f"Gateway/{parent.name} has no listener '{parent.section_name}'"
    rules: tuple[HttpRule | GrpcRule, ...] = route.spec.rules
    for number, rule in enumerate(rules):
        for index, backend in enumerate(rule.backend_refs):
            path = f"spec.rules[{number}].backendRefs[{index}]"
            if backend.kind == "InferencePool":
                if backend.group != POOL_GROUP:
                    yield f"{path}.group", f"an InferencePool's group is {POOL_GROUP}"
                elif backend.name not in pools:
                    yield f"{path}.name", f"unknown InferencePool {backend.name}"
                if isinstance(route, GrpcRoute):
                    yield path, "Istio takes an InferencePool only from an HTTPRoute; gRPC passes through one as well"
                continue
            host = qualified(backend.name, route.metadata.namespace)
            ports = {service.host: [port.number for port in service.ports] for service in registry.services}
            if host not in ports:
                yield f"{path}.name", f"unknown service {host}"
            elif backend.port not in ports[host]:
                yield f"{path}.port", f"{host} has no port {backend.port}"
        if not any(backend.weight for backend in rule.backend_refs):
            yield f"spec.rules[{number}].backendRefs", "all weights are 0: every request is answered 500"


def _pool(pool: InferencePool, pools: list[InferencePool], registry: Registry) -> Iterator[Finding]:
    ref = pool.spec.endpoint_picker_ref
    host = qualified(ref.name, pool.metadata.namespace)
    ports = {service.host: [port.number for port in service.ports] for service in registry.services}
    if host not in ports:
        yield "spec.endpointPickerRef.name", f"unknown service {host}"
    elif ref.port.number not in ports[host]:
        yield "spec.endpointPickerRef.port.number", f"{host} has no port {ref.port.number}"
    mine = pool.spec.selector.match_labels
    for other in pools:
        theirs = other.spec.selector.match_labels
        if other.metadata.name < pool.metadata.name and all(theirs[key] == mine[key] for key in theirs.keys() & mine):
            yield "spec.selector", f"selects workers that InferencePool/{other.metadata.name} selects, too"
