"""VirtualService: which requests go where, how long they may take, and what happens on the way.

Follows networking.istio.io/v1. A percentage is required wherever Istio has one: a fault without it would never fire.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import (
    MAX_LIST,
    Document,
    Duration,
    ExportEverywhere,
    HeaderName,
    HeaderValue,
    Host,
    HostPattern,
    Percentage,
    PortNumber,
    PositiveDuration,
    RouteName,
    Strict,
    Weight,
)

MESH = "mesh"
Text = Annotated[str, StringConstraints(max_length=1024)]
GatewayName = Annotated[
    str, StringConstraints(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?/)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=317)
]


class StringMatch(Strict):
    """One of exact, prefix, regex (RE2, whole value); all empty means "present"."""

    exact: Text | None = None
    prefix: Text | None = None
    regex: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(part is not None for part in (self.exact, self.prefix, self.regex)) > 1:
            raise PydanticCustomError("one_of", "give only one of exact, prefix, regex")
        return self

    @property
    def is_presence(self) -> bool:
        """True when any value matches."""
        return (self.exact, self.prefix, self.regex) in {(None, None, None), (None, None, "*")}


class Match(Strict):
    """Conditions that must all hold."""

    istio_has: ClassVar[frozenset[str]] = frozenset({"sourceLabels", "sourceNamespace", "statPrefix"})

    name: RouteName | None = None
    uri: StringMatch | None = None
    scheme: StringMatch | None = None
    method: StringMatch | None = None
    authority: StringMatch | None = None
    headers: dict[HeaderName, StringMatch] = Field(default_factory=dict, max_length=MAX_LIST)
    without_headers: dict[HeaderName, StringMatch] = Field(default_factory=dict, max_length=MAX_LIST)
    query_params: dict[Text, StringMatch] = Field(default_factory=dict, max_length=MAX_LIST)
    ignore_uri_case: bool = False
    port: PortNumber | None = None
    gateways: tuple[GatewayName, ...] = Field(default=(), max_length=MAX_LIST)


class PortSelector(Strict):
    number: PortNumber


class Destination(Strict):
    host: Host
    subset: RouteName | None = None
    port: PortSelector | None = None


class HeaderOperations(Strict):
    """`set` overwrites, `add` appends, `remove` drops."""

    set_: dict[HeaderName, HeaderValue] = Field(default_factory=dict, alias="set", max_length=MAX_LIST)
    add: dict[HeaderName, HeaderValue] = Field(default_factory=dict, max_length=MAX_LIST)
    remove: tuple[HeaderName, ...] = Field(default=(), max_length=MAX_LIST)


class Headers(Strict):
    request: HeaderOperations = HeaderOperations()
    response: HeaderOperations = HeaderOperations()


class WeightedDestination(Strict):
    destination: Destination
    weight: Weight = 0
    headers: Headers | None = None


class RegexRewrite(Strict):
    """RE2: every part of the path that `match` finds becomes `rewrite`, in which `\\1` is the first group."""

    match: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    rewrite: Text


class Rewrite(Strict):
    uri: Annotated[str, StringConstraints(max_length=1024, pattern=r"^/")] | None = None
    authority: Text | None = None
    uri_regex_rewrite: RegexRewrite | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.uri is not None and self.uri_regex_rewrite is not None:
            raise PydanticCustomError("one_of", "give uri or uriRegexRewrite, not both")
        return self


class Redirect(Strict):
    """An answer that sends the caller elsewhere; 301 unless `redirectCode` says otherwise."""

    uri: Annotated[str, StringConstraints(max_length=1024, pattern=r"^/")] | None = None
    authority: Text | None = None
    port: PortNumber | None = None
    derive_port: Literal["FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"] | None = None
    scheme: Literal["http", "https"] | None = None
    redirect_code: Literal[301, 302, 303, 307, 308] = 301

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.port is not None and self.derive_port is not None:
            raise PydanticCustomError("one_of", "give port or derivePort, not both")
        return self


class Body(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"bytes"})

    string: Annotated[str, StringConstraints(max_length=4096)]


class DirectResponse(Strict):
    """An answer of the proxy's own. Envoy keeps its body in memory, hence the bound."""

    status: Annotated[int, Field(ge=200, le=599)]
    body: Body | None = None


class CorsPolicy(Strict):
    """Which web pages may call. Without an origin here browsers let none."""

    istio_has: ClassVar[frozenset[str]] = frozenset({"allowOrigin"})

    allow_origins: tuple[StringMatch, ...] = Field(default=(), max_length=MAX_LIST)
    allow_methods: tuple[Annotated[str, StringConstraints(pattern=r"^(\*|[A-Z]{1,16})$")], ...] = Field(
        default=(), max_length=16
    )
    allow_headers: tuple[HeaderName, ...] = Field(default=(), max_length=MAX_LIST)
    expose_headers: tuple[HeaderName, ...] = Field(default=(), max_length=MAX_LIST)
    max_age: PositiveDuration | None = None
    allow_credentials: bool | None = None
    unmatched_preflights: Literal["UNSPECIFIED", "FORWARD", "IGNORE"] = "UNSPECIFIED"

    @model_validator(mode="after")
    def _origins(self) -> Self:
        if any(origin.is_presence for origin in self.allow_origins):
            raise PydanticCustomError("cors", "an origin needs exact, prefix or regex; for all of them say regex: '.*'")
        return self


class Retries(Strict):
    """`attempts: 0` switches retries off and allows no other field."""

    attempts: Annotated[int, Field(ge=0, le=16)]
    per_try_timeout: PositiveDuration | None = None
    retry_on: Annotated[str, StringConstraints(max_length=512)] | None = None
    retry_remote_localities: bool | None = None
    retry_ignore_previous_hosts: bool | None = None
    backoff: PositiveDuration | None = None

    @model_validator(mode="after")
    def _off_means_off(self) -> Self:
        if self.attempts == 0 and len(self.model_fields_set) > 1:
            raise PydanticCustomError("retries", "attempts: 0 switches retries off; remove the other fields")
        return self


class Percent(Strict):
    value: Percentage


class Delay(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"percent", "exponentialDelay"})

    percentage: Percent
    fixed_delay: PositiveDuration


class Abort(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"http2Error"})

    percentage: Percent
    http_status: Annotated[int, Field(ge=200, le=599)] | None = None
    grpc_status: Annotated[str, StringConstraints(max_length=32)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.http_status is None) == (self.grpc_status is None):
            raise PydanticCustomError("one_of", "give exactly one of httpStatus, grpcStatus")
        return self


class Fault(Strict):
    delay: Delay | None = None
    abort: Abort | None = None


class Mirror(Strict):
    destination: Destination
    percentage: Percent | None = None


class Route(Strict):
    """One rule: any of `match`, then `route` by weight."""

    istio_has: ClassVar[frozenset[str]] = frozenset({"delegate", "mirrorPercent", "mirror_percent"})

    name: RouteName | None = None
    match: tuple[Match, ...] = Field(default=(), max_length=MAX_LIST)
    route: tuple[WeightedDestination, ...] = Field(default=(), max_length=16)
    redirect: Redirect | None = None
    direct_response: DirectResponse | None = None
    cors_policy: CorsPolicy | None = None
    rewrite: Rewrite | None = None
    timeout: Duration | None = None
    retries: Retries | None = None
    fault: Fault | None = None
    mirror: Destination | None = None
    mirror_percentage: Percent | None = None
    mirrors: tuple[Mirror, ...] = Field(default=(), max_length=4)
    headers: Headers | None = None

    @model_validator(mode="after")
    def _mirrors(self) -> Self:
        if self.mirror_percentage is not None and self.mirror is None:
            raise PydanticCustomError("mirror", "mirrorPercentage needs mirror")
        if self.mirror is not None and self.mirrors:
            raise PydanticCustomError("mirror", "give mirror or mirrors, not both")
        return self

    @model_validator(mode="after")
    def _one_action(self) -> Self:
        if sum((bool(self.route), self.redirect is not None, self.direct_response is not None)) != 1:
            raise PydanticCustomError("one_of", "give exactly one of route, redirect, directResponse")
        if not self.route and self.model_fields_set & _ONLY_WITH_ROUTE:
            names = ", ".join(sorted(_ONLY_WITH_ROUTE))
            raise PydanticCustomError("one_of", "without route nothing is forwarded; remove {names}", {"names": names})
        return self


_ONLY_WITH_ROUTE = {"rewrite", "timeout", "retries", "mirror", "mirrors"}


class VirtualServiceSpec(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"tcp", "tls"})

    hosts: tuple[HostPattern, ...] = Field(min_length=1, max_length=MAX_LIST)
    gateways: tuple[GatewayName, ...] = Field(default=(MESH,), min_length=1, max_length=MAX_LIST)
    http: tuple[Route, ...] = Field(min_length=1, max_length=MAX_LIST)
    export_to: ExportEverywhere = ("*",)


class VirtualService(Document):
    api_version: Literal["networking.istio.io/v1"]
    kind: Literal["VirtualService"]
    spec: VirtualServiceSpec
