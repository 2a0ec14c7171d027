"""The smaller kinds: ServiceEntry, InferencePool, Gateway.

ServiceEntry and Gateway follow networking.istio.io/v1, InferencePool inference.networking.k8s.io/v1.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import (
    MAX_LIST,
    Document,
    ExportEverywhere,
    Host,
    HostPattern,
    Labels,
    ObjectName,
    PortNumber,
    RouteName,
    Strict,
)

Locality = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){0,2}$", max_length=256)]


class EntryPort(Strict):
    number: PortNumber
    name: RouteName
    protocol: Literal["GRPC", "HTTP2", "HTTP"]
    target_port: PortNumber | None = None


class WorkloadEntry(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"network", "serviceAccount"})

    address: Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:-]+$")]
    ports: dict[str, PortNumber] = Field(default_factory=dict, max_length=16)
    labels: Labels = Field(default_factory=dict)
    locality: Locality | None = None
    weight: Annotated[int, Field(ge=1, le=128)] | None = None


class ServiceEntrySpec(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"addresses", "subjectAltNames", "workloadSelector"})

    hosts: tuple[Host, ...] = Field(min_length=1, max_length=MAX_LIST)
    location: Literal["MESH_EXTERNAL", "MESH_INTERNAL"] = "MESH_EXTERNAL"
    ports: tuple[EntryPort, ...] = Field(min_length=1, max_length=16)
    resolution: Literal["STATIC", "DNS"]
    endpoints: tuple[WorkloadEntry, ...] = Field(default=(), max_length=256)
    export_to: ExportEverywhere = ("*",)

    @model_validator(mode="after")
    def _static_needs_endpoints(self) -> Self:
        if self.resolution == "STATIC" and not self.endpoints:
            raise PydanticCustomError("endpoints", "resolution STATIC needs endpoints")
        return self


class ServiceEntry(Document):
    api_version: Literal["networking.istio.io/v1"]
    kind: Literal["ServiceEntry"]
    spec: ServiceEntrySpec


class PoolSelector(Strict):
    match_labels: Labels = Field(min_length=1)


class TargetPort(Strict):
    number: PortNumber


class EndpointPickerRef(Strict):
    """Names the service that speaks ext_proc. FailClose is the API's default, not ours to change."""

    group: Literal[""] = ""
    kind: Literal["Service"] = "Service"
    name: ObjectName
    port: TargetPort
    failure_mode: Literal["FailOpen", "FailClose"] = "FailClose"


class InferencePoolSpec(Strict):
    selector: PoolSelector
    target_ports: tuple[TargetPort, ...] = Field(min_length=1, max_length=8)
    app_protocol: Literal["http", "kubernetes.io/h2c"] = "http"
    endpoint_picker_ref: EndpointPickerRef


class InferencePool(Document):
    api_version: Literal["inference.networking.k8s.io/v1"]
    kind: Literal["InferencePool"]
    spec: InferencePoolSpec


class ServerPort(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"targetPort"})

    number: PortNumber
    name: RouteName
    protocol: Literal["HTTP", "HTTP2", "GRPC", "GRPC-WEB", "TLS"]
    """All but TLS are the same door (HTTP/1.1 and HTTP/2); GRPC-WEB adds the translation of gRPC-Web calls."""


class ServerTls(Strict):
    """Only the mode of an east-west gateway: what the handshake names is passed through, unopened."""

    istio_has: ClassVar[frozenset[str]] = frozenset(
        {
            "httpsRedirect",
            "serverCertificate",
            "privateKey",
            "caCertificates",
            "caCrl",
            "credentialName",
            "credentialNames",
            "caCertCredentialName",
            "tlsCertificates",
            "subjectAltNames",
            "verifyCertificateSpki",
            "verifyCertificateHash",
            "minProtocolVersion",
            "maxProtocolVersion",
            "cipherSuites",
        }
    )

    mode: Literal["AUTO_PASSTHROUGH"]


class Server(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"bind", "defaultEndpoint"})

    port: ServerPort
    tls: ServerTls | None = None
    hosts: tuple[HostPattern, ...] = Field(min_length=1, max_length=MAX_LIST)
    name: RouteName | None = None

    @model_validator(mode="after")
    def _tls_both_ways(self) -> Self:
        if (self.port.protocol == "TLS") != (self.tls is not None):
            raise PydanticCustomError("tls", "protocol TLS and a tls block go together")
        return self


class GatewaySpec(Strict):
    selector: Labels = Field(default_factory=dict)
    servers: tuple[Server] = Field(description="exactly one server")


class Gateway(Document):
    api_version: Literal["networking.istio.io/v1"]
    kind: Literal["Gateway"]
    spec: GatewaySpec

    @property
    def passes_through(self) -> bool:
        """Whether it is the way in for other clouds, rather than a door for clients."""
        return self.spec.servers[0].tls is not None
