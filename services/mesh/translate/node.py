"""What one Envoy is told about itself: where it listens, where its files are, whom it reports to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.mesh.registry import Workload


@dataclass(frozen=True, slots=True)
class Caller:
    """A service account whose calls leave by an outbound listener of its own, with its own certificate.

    `calls` are the services it may name, as an Istio Sidecar's egress hosts would say: what nobody can use is not
    generated. None means every service.
    """

    service_account: str
    port: int
    calls: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class InboundPort:
    """A port of a workload: its number as policies name it, where Envoy listens, and where the process does."""

    number: int
    protocol: Literal["grpc", "http"]
    listens: int
    forwards_to: int


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The inbound side of one workload."""

    workload: Workload
    service: str
    ports: tuple[InboundPort, ...]


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Settings of one local Envoy. Everything that is not traffic policy is here, and only here."""

    run_directory: Path
    """Absolute folder for `bootstrap.json`, the four xDS folders and the access log."""
    listen_address: str = "127.0.0.1"
    ingress_port: int = 8080
    outbound_port: int = 15001
    """Where calls of no particular account leave; used only without `callers`."""
    callers: tuple[Caller, ...] = ()
    """The accounts behind this Envoy; each has its own outbound listener and its own clusters."""
    sidecars: tuple[Sidecar, ...] = ()
    """The processes behind this Envoy; each has a listener per port, from the start."""
    identities: Path | None = None
    """Folder with the certificates (`services/mesh/identity`); None: this Envoy cannot speak TLS."""
    namespace: str = "autoglm"
    upstream_address: str = "127.0.0.1"
    """Where the processes behind the sidecars listen, and where the outbound listeners do."""
    admin_address: str = ""
    """Where Envoy's admin page listens; empty: beside the outbound listeners. Whoever reaches it may end Envoy."""
    admin_port: int = 15000
    otlp_endpoint: str = ""
    """`host:port` of an OTLP/gRPC receiver; empty: no spans leave Envoy."""
    locality: str = ""
    """`region/zone/subzone` of this node: with outlier detection, nearer endpoints are preferred."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels of this proxy, for `failoverPriority`."""
    network: str = ""
    """The network this Envoy is in; endpoints of another one are reached through a gateway of `network_gateways`."""
    network_gateways: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """By network: addresses of its east-west gateways. A network without one is unreachable."""
    eastwest_port: int = 0
    """Where requests of other networks come in, if the policy has a Gateway for them."""
    eastwest_services: frozenset[str] = frozenset()
    """The services they may reach."""
    ping_interval_s: float = 0.0
    """How often an HTTP/2 connection to a sidecar is tried; 0: never. Nothing else notices a peer that vanishes without
    a word: TCP waits minutes for an answer. Istio has it from 1.31 (`http2KeepAlive`), until then as EnvoyFilter."""
    ping_timeout_s: float = 1.5
    service_name: str = "autoglm-mesh"
    tracing_sampling_percent: float = 1.0
    """Share of new traces recorded unless a Telemetry object says otherwise (Istio's default is 1 %)."""
    update_merge_window_s: float | None = None
    """How long health and endpoint changes are gathered: None is Istio's (and Envoy's) 1 s, 0 is at once."""
    picker_message_timeout_s: float = 1.0
    """How long Envoy waits for each answer of the endpoint picker before the failure mode applies."""
    picker_dialect: Literal["resilient", "istio"] = "resilient"
    """`resilient`: the picker sees headers and asks for the body; its death fails no request. `istio`: full duplex."""
    max_connections: int = 4096
    """Open connections per listener; beyond it new ones are closed at once."""
    max_concurrent_streams: int = 1024
    """HTTP/2 streams per client connection."""
    max_request_headers_kb: int = 60
    max_request_headers: int = 100
    buffer_limit_bytes: int = 1 << 20
    """Soft bound on what Envoy holds for one slow connection, each way."""
    request_headers_timeout_s: float = 10.0
    """Ingress only: how long a client may take to send its request headers."""
    connection_idle_timeout_s: float = 3600.0
    """Closes connections without a request; streams never time out by idling."""

    def __post_init__(self) -> None:
        if (self.sidecars or self.callers) and self.identities is None:
            raise ValueError("sidecars and callers need identities: a sidecar without a certificate protects nothing")
