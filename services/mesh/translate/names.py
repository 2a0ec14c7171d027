"""Names and small values in the form Istio gives them inside Envoy's configuration."""

from datetime import timedelta
from typing import Any

Json = dict[str, Any]

TYPE_URL = "type.googleapis.com/"
CLUSTER = TYPE_URL + "envoy.config.cluster.v3.Cluster"
LISTENER = TYPE_URL + "envoy.config.listener.v3.Listener"
ROUTES = TYPE_URL + "envoy.config.route.v3.RouteConfiguration"
ENDPOINTS = TYPE_URL + "envoy.config.endpoint.v3.ClusterLoadAssignment"

DESTINATION_HEADER = "x-gateway-destination-endpoint"
"""Chosen endpoint(s), set by the endpoint picker (endpoint picker protocol 1.0)."""
LB_NAMESPACE = "envoy.lb"

UNLIMITED = 4_294_967_295


def cluster_name(host: str, port: int, subset: str = "", caller: str = "") -> str:
    """Istio's name for the cluster of a service port, or of one subset of it; each calling account has its own."""
    return owned(f"outbound|{port}|{subset}|{host}", caller)


def owned(name: str, owner: str) -> str:
    """In Istio every proxy has a process of its own; here they share one, so names say whose they are."""
    return f"{owner}~{name}" if owner else name


def sni(host: str, port: int, subset: str = "") -> str:
    """The server name Istio's clients send, by which a gateway between two clouds knows where a connection goes."""
    return f"outbound_.{port}_.{subset}_.{host}"


def file_name(resource: str) -> str:
    """A resource's file: bars, which shells trip over, become the `_.` that Istio uses in SNI names."""
    return resource.replace("|", "_.") + ".json"


def seconds(span: timedelta | float) -> str:
    """A duration in protobuf's JSON form."""
    value = span.total_seconds() if isinstance(span, timedelta) else span
    return f"{value:.6f}".rstrip("0").rstrip(".") + "s"


def share(percent: float) -> Json:
    """A percentage as Istio writes fractions: in millionths."""
    return {"numerator": round(percent * 10_000), "denominator": "MILLION"}


def socket_address(address: str, port: int) -> Json:
    """An address of Envoy's."""
    return {"socket_address": {"address": address, "port_value": port}}


def locality(text: str) -> Json:
    """`region/zone/subzone` as Envoy's Locality."""
    parts = text.split("/") if text else []
    return dict(zip(("region", "zone", "sub_zone"), parts, strict=False))


def domains(host: str, port: int, *, is_default_port: bool) -> list[str]:
    """All authorities by which a caller may mean this port: short forms and full name, with and without the number."""
    names = [host]
    if host.endswith(".svc.cluster.local"):
        service, namespace = host.removesuffix(".svc.cluster.local").rsplit(".", 1)
        names += [f"{service}.{namespace}.svc", f"{service}.{namespace}", service]
    with_port = [f"{name}:{port}" for name in names]
    return names + with_port if is_default_port else with_port
