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


class Rewrite(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"uriRegexRewrite"})

    uri: Annotated[str, StringConstraints(max_length=1024, pattern=r"^/")] | None = None
    authority: Text | None = None


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

    istio_has: ClassVar[frozenset[str]] = frozenset(
        {"corsPolicy", "delegate", "directResponse", "redirect", "mirrorPercent", "mirror_percent"}
    )

    name: RouteName | None = None
    match: tuple[Match, ...] = Field(default=(), max_length=MAX_LIST)
    route: tuple[WeightedDestination, ...] = Field(min_length=1, max_length=16)
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
