"""Envoy's local rate limit in the one form that is served here: requests by tenant, at the ingress gateway.

Istio has no object for rate limits; it documents an EnvoyFilter with two patches. One puts the filter before the
router, empty, so that it limits nothing by itself; the other gives every virtual host its settings, where they can
change without a listener being drained. Names are Envoy's.
"""

from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import MAX_LIST, PositiveDuration, RouteName, Strict

Requests = Annotated[int, Field(ge=1, le=1_000_000)]
_TypeUrl = Literal["type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit"]


class Plain(Strict):
    """A piece of Envoy's own configuration, in Envoy's spelling."""

    model_config = ConfigDict(alias_generator=None, validate_by_name=True)


class _Limiter(Plain):
    type_url: _TypeUrl = Field(alias="@type")
    stat_prefix: RouteName


class Bucket(Plain):
    """At most `max_tokens` requests at once, and `tokens_per_fill` more after each `fill_interval`."""

    max_tokens: Requests
    tokens_per_fill: Requests
    fill_interval: PositiveDuration


class Entry(Plain):
    key: Literal["tenant"]
    value: Annotated[str, StringConstraints(max_length=64, pattern=r"^[!-~]*$")] = ""
    """Empty: any tenant without a descriptor of its own, each with its own bucket."""


class Descriptor(Plain):
    entries: tuple[Entry] = Field(description="exactly one entry")
    token_bucket: Bucket


class _Always(Plain):
    numerator: Literal[100]
    denominator: Literal["HUNDRED"] = "HUNDRED"


class _Switch(Plain):
    default_value: _Always
    runtime_key: RouteName | None = None


class _HeaderDescriptor(Plain):
    header_name: Literal["x-autoglm-tenant"]
    descriptor_key: Literal["tenant"]


class _Action(Plain):
    request_headers: _HeaderDescriptor


class _Actions(Plain):
    actions: tuple[_Action] = Field(description="exactly one action")


class _Header(Plain):
    key: Literal["retry-after", "retry-after-ms"]
    value: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,7}$")]


class _HeaderOption(Plain):
    header: _Header


class RateLimit(_Limiter):
    """`token_bucket` is for requests that name no tenant, all together; `descriptors` are for those that do."""

    token_bucket: Bucket
    filter_enabled: _Switch
    filter_enforced: _Switch
    rate_limited_as_resource_exhausted: Literal[True]
    """Else gRPC clients get UNAVAILABLE, which invites an immediate retry."""
    always_consume_default_token_bucket: Literal[False]
    """Envoy's default is true: every tenant would also draw from the bucket of those without a name."""
    enable_x_ratelimit_headers: Literal["OFF", "DRAFT_VERSION_03"] = "OFF"
    response_headers_to_add: tuple[_HeaderOption, ...] = Field(default=(), max_length=2)
    descriptors: tuple[Descriptor, ...] = Field(default=(), max_length=MAX_LIST)
    max_dynamic_descriptors: Annotated[int, Field(ge=1, le=100_000)] = 20
    rate_limits: tuple[_Actions] = Field(description="exactly one entry")

    @model_validator(mode="after")
    def _can_be_kept(self) -> Self:
        tenants = [item.entries[0].value for item in self.descriptors]
        if len(set(tenants)) < len(tenants):
            raise PydanticCustomError("descriptors", "descriptors: a tenant is named twice")
        waits = {item.header.key: int(item.header.value) for item in self.response_headers_to_add}
        if len(waits) < len(self.response_headers_to_add):
            raise PydanticCustomError("headers", "response_headers_to_add: a header is named twice")
        longest = max(item.fill_interval for item in (self.token_bucket, *(d.token_bucket for d in self.descriptors)))
        for name, unit in (("retry-after", timedelta(seconds=1)), ("retry-after-ms", timedelta(milliseconds=1))):
            if name in waits and waits[name] * unit < longest:
                raise PydanticCustomError("headers", "{name} is shorter than the longest fill_interval", {"name": name})
        return self


class LimitFilter(Plain):
    """The filter in the listener."""

    name: Literal["envoy.filters.http.local_ratelimit"]
    typed_config: _Limiter


class _PerFilter(Plain):
    limit: RateLimit = Field(alias="envoy.filters.http.local_ratelimit")


class HostSettings(Plain):
    """What each virtual host says to the filter."""

    typed_per_filter_config: _PerFilter
