"""DestinationRule: how a service is reached once chosen: pools, balancing, ejection, subsets by label.

Follows networking.istio.io/v1. Absent fields stay absent here; the translator applies Istio's defaults.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import (
    MAX_LIST,
    Count,
    Document,
    Duration,
    ExportEverywhere,
    HeaderName,
    Host,
    Labels,
    Percentage,
    PortNumber,
    PositiveDuration,
    RouteName,
    Strict,
)

CookieText = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\s;,]+$")]


class TcpKeepalive(Strict):
    probes: Annotated[int, Field(ge=0, le=1000)] | None = None
    time: PositiveDuration | None = None
    interval: PositiveDuration | None = None


class TcpSettings(Strict):
    max_connections: Count = 0
    connect_timeout: PositiveDuration | None = None
    tcp_keepalive: TcpKeepalive | None = None
    max_connection_duration: PositiveDuration | None = None
    idle_timeout: Duration | None = None


class HttpSettings(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"useClientProtocol"})

    http1_max_pending_requests: Count = 0
    http2_max_requests: Count = 0
    max_requests_per_connection: Annotated[int, Field(ge=0, le=2**29)] = 0
    max_retries: Count = 0
    idle_timeout: PositiveDuration | None = None
    h2_upgrade_policy: Literal["DEFAULT", "DO_NOT_UPGRADE", "UPGRADE"] = "DEFAULT"
    max_concurrent_streams: Count = 0


class ConnectionPool(Strict):
    tcp: TcpSettings = TcpSettings()
    http: HttpSettings = HttpSettings()


class HttpCookie(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"attributes"})

    name: CookieText
    path: Annotated[str, StringConstraints(max_length=256)] | None = None
    ttl: Duration | None = None


class RingHash(Strict):
    minimum_ring_size: Annotated[int, Field(ge=1, le=8_388_608)] | None = None


class Maglev(Strict):
    table_size: Annotated[int, Field(ge=1, le=5_000_011)] | None = None


class ConsistentHash(Strict):
    """One source of the hash; at most one algorithm (ring hash unless `maglev`)."""

    http_header_name: HeaderName | None = None
    http_cookie: HttpCookie | None = None
    use_source_ip: Literal[True] | None = None
    http_query_parameter_name: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    ring_hash: RingHash | None = None
    maglev: Maglev | None = None
    minimum_ring_size: Annotated[int, Field(ge=1, le=8_388_608)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        sources = (self.http_header_name, self.http_cookie, self.use_source_ip, self.http_query_parameter_name)
        if sum(source is not None for source in sources) != 1:
            raise PydanticCustomError(
                "one_of", "give exactly one of httpHeaderName, httpCookie, useSourceIp, httpQueryParameterName"
            )
        if sum(part is not None for part in (self.ring_hash, self.maglev, self.minimum_ring_size)) > 1:
            raise PydanticCustomError("one_of", "give only one of ringHash, maglev, minimumRingSize")
        return self


class Warmup(Strict):
    duration: PositiveDuration
    minimum_percent: Percentage | None = None
    aggression: Annotated[float, Field(ge=1, le=100)] | None = None


class LoadBalancer(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"localityLbSetting", "zoneAwareLbSetting", "warmupDurationSecs"})

    simple: Literal["UNSPECIFIED", "LEAST_REQUEST", "LEAST_CONN", "ROUND_ROBIN", "RANDOM"] | None = None
    consistent_hash: ConsistentHash | None = None
    warmup: Warmup | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.simple is not None and self.consistent_hash is not None:
            raise PydanticCustomError("one_of", "give simple or consistentHash, not both")
        if self.warmup is not None and (self.consistent_hash is not None or self.simple == "RANDOM"):
            raise PydanticCustomError("warmup", "warmup works only with LEAST_REQUEST and ROUND_ROBIN")
        return self


class OutlierDetection(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"consecutiveErrors", "outlierDetectionHttpErrorCodes"})

    consecutive_5xx_errors: Count | None = Field(default=None, alias="consecutive5xxErrors")
    consecutive_gateway_errors: Count | None = None
    consecutive_local_origin_failures: Count | None = None
    split_external_local_origin_errors: bool = False
    interval: PositiveDuration | None = None
    base_ejection_time: PositiveDuration | None = None
    max_ejection_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    min_health_percent: Annotated[int, Field(ge=0, le=100)] = 0


class RetryBudget(Strict):
    percent: Percentage | None = None
    min_retry_concurrency: Count | None = None


class ClientTls(Strict):
    """How callers encrypt. Absent: mutual TLS to every endpoint that has a sidecar, plain to the others."""

    istio_has: ClassVar[frozenset[str]] = frozenset(
        {"clientCertificate", "privateKey", "caCertificates", "credentialName", "caCrl", "insecureSkipVerify"}
    )

    mode: Literal["DISABLE", "ISTIO_MUTUAL"]
    sni: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None
    subject_alt_names: tuple[Annotated[str, StringConstraints(min_length=1, max_length=512)], ...] = Field(
        default=(), max_length=MAX_LIST
    )


class PortPolicy(Strict):
    """The blocks that may also stand under `portLevelSettings`."""

    tls: ClientTls | None = None
    load_balancer: LoadBalancer | None = None
    connection_pool: ConnectionPool | None = None
    outlier_detection: OutlierDetection | None = None


class PortSelector(Strict):
    number: PortNumber


class PortLevelPolicy(PortPolicy):
    port: PortSelector


class TrafficPolicy(PortPolicy):
    istio_has: ClassVar[frozenset[str]] = frozenset({"tunnel", "proxyProtocol"})

    port_level_settings: tuple[PortLevelPolicy, ...] = Field(default=(), max_length=MAX_LIST)
    retry_budget: RetryBudget | None = None


class Subset(Strict):
    name: RouteName
    labels: Labels = Field(default_factory=dict)
    traffic_policy: TrafficPolicy | None = None


class DestinationRuleSpec(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"workloadSelector"})

    host: Host
    traffic_policy: TrafficPolicy | None = None
    subsets: tuple[Subset, ...] = Field(default=(), max_length=MAX_LIST)
    export_to: ExportEverywhere = ("*",)


class DestinationRule(Document):
    api_version: Literal["networking.istio.io/v1"]
    kind: Literal["DestinationRule"]
    spec: DestinationRuleSpec
