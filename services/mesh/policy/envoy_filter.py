"""EnvoyFilter, in the two shapes that are served here, at the ingress gateway: a compressor, and a rate limit.

Istio takes any patch of Envoy's configuration and checks none of it. Here each field has its model, so a patch is
either understood or refused. Event streams and gRPC may not be compressed: a compressor gathers bytes, and a token that
waits in it is a token that comes late.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import Document, Labels, Strict
from services.mesh.policy.rate_limit import HostSettings, LimitFilter, Plain

COMPRESSOR = "envoy.filters.http.compressor"
LOCAL_RATE_LIMIT = "envoy.filters.http.local_ratelimit"
_TYPES = "type.googleapis.com/envoy.extensions."
MediaType = Annotated[str, StringConstraints(pattern=r"^[a-z]+/[a-z0-9.+-]+$", max_length=128)]
STREAMED = ("text/event-stream", "application/grpc", "application/connect")
"""Media types (and beginnings of them) whose answers come piece by piece."""


class Gzip(Plain):
    type_url: Literal["type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip"] = Field(alias="@type")
    compression_level: Literal["BEST_SPEED", "DEFAULT_COMPRESSION", "BEST_COMPRESSION"] | None = None
    memory_level: Annotated[int, Field(ge=1, le=9)] | None = None
    window_bits: Annotated[int, Field(ge=9, le=15)] | None = None


class Zstd(Plain):
    type_url: Literal["type.googleapis.com/envoy.extensions.compression.zstd.compressor.v3.Zstd"] = Field(alias="@type")
    compression_level: Annotated[int, Field(ge=1, le=19)] | None = None
    enable_checksum: bool | None = None


class GzipLibrary(Plain):
    name: Literal["gzip"]
    typed_config: Gzip


class ZstdLibrary(Plain):
    name: Literal["zstd"]
    typed_config: Zstd


class CommonConfig(Plain):
    min_content_length: Annotated[int, Field(ge=30, le=1 << 20)]
    content_type: tuple[MediaType, ...] = Field(min_length=1, max_length=16)

    @model_validator(mode="after")
    def _no_streams(self) -> Self:
        for media in self.content_type:
            if media.startswith(STREAMED):
                raise PydanticCustomError(
                    "stream", "{media} is streamed; a compressor would hold its pieces back", {"media": media}
                )
        return self


class ResponseDirection(Plain):
    common_config: CommonConfig
    disable_on_etag_header: bool | None = None


class Compressor(Plain):
    type_url: Literal["type.googleapis.com/envoy.extensions.filters.http.compressor.v3.Compressor"] = Field(
        alias="@type"
    )
    compressor_library: Annotated[GzipLibrary | ZstdLibrary, Field(discriminator="name")]
    response_direction_config: ResponseDirection
    choose_first: bool | None = None
    """Preferred where the caller likes several encodings equally."""


class CompressorFilter(Plain):
    name: Literal["envoy.filters.http.compressor"]
    typed_config: Compressor


def _what(value: Any) -> str | None:
    """Which of the values a patch means; tags in parentheses are left out of the paths of mistakes."""
    if not isinstance(value, dict):  # a model, on its way out again
        kinds = (CompressorFilter, "(compressor)"), (LimitFilter, "(limit)"), (HostSettings, "(hosts)")
        return next((tag for kind, tag in kinds if isinstance(value, kind)), None)
    if "typed_per_filter_config" in value:
        return "(hosts)"
    name = value.get("name")
    return {COMPRESSOR: "(compressor)", LOCAL_RATE_LIMIT: "(limit)"}.get(name) if isinstance(name, str) else None


class Patch(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"filterClass"})

    operation: Literal["INSERT_BEFORE", "MERGE"]
    value: Annotated[
        Annotated[CompressorFilter, Tag("(compressor)")]
        | Annotated[LimitFilter, Tag("(limit)")]
        | Annotated[HostSettings, Tag("(hosts)")],
        Discriminator(
            _what,
            custom_error_type="filter",
            custom_error_message=f"must be a filter named {COMPRESSOR} or {LOCAL_RATE_LIMIT}, or the latter's"
            " typed_per_filter_config",
        ),
    ]


class SubFilter(Strict):
    name: Literal["envoy.filters.http.router"]


class NetworkFilter(Strict):
    name: Literal["envoy.filters.network.http_connection_manager"]
    sub_filter: SubFilter


class FilterChain(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset(
        {"applicationProtocols", "destinationPort", "name", "sni", "transportProtocol"}
    )

    filter: NetworkFilter


class ListenerMatch(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"listenerFilter", "name", "portName", "portNumber"})

    filter_chain: FilterChain


class ObjectMatch(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"cluster", "proxy", "routeConfiguration", "waypoint"})

    context: Literal["GATEWAY"]
    listener: ListenerMatch | None = None


class ConfigPatch(Strict):
    """A filter in front of the router of every listener, or settings merged into every virtual host."""

    apply_to: Literal["HTTP_FILTER", "VIRTUAL_HOST"]
    match: ObjectMatch
    patch: Patch

    @model_validator(mode="after")
    def _fits(self) -> Self:
        is_filter = not isinstance(self.patch.value, HostSettings)
        if is_filter != (self.apply_to == "HTTP_FILTER"):
            raise PydanticCustomError("shape", "a filter is for HTTP_FILTER, typed_per_filter_config for VIRTUAL_HOST")
        if self.patch.operation != ("INSERT_BEFORE" if is_filter else "MERGE"):
            raise PydanticCustomError("shape", "HTTP_FILTER is served with INSERT_BEFORE, VIRTUAL_HOST with MERGE")
        if is_filter != (self.match.listener is not None):
            raise PydanticCustomError("shape", "match.listener must name the router for HTTP_FILTER, and only for it")
        return self


class WorkloadSelector(Strict):
    labels: Labels = Field(min_length=1)


class EnvoyFilterSpec(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"priority", "targetRefs"})

    workload_selector: WorkloadSelector
    config_patches: tuple[ConfigPatch, ...] = Field(min_length=1, max_length=4)

    @model_validator(mode="after")
    def _limits_are_whole(self) -> Self:
        filters = sum(isinstance(item.patch.value, LimitFilter) for item in self.config_patches)
        if filters > 1 or filters != len(self.limits):
            raise PydanticCustomError(
                "shape", "a rate limit is one filter and one VIRTUAL_HOST patch with its settings"
            )
        return self

    @property
    def limits(self) -> tuple[HostSettings, ...]:
        """The settings of the rate limit, if this is one."""
        values = (item.patch.value for item in self.config_patches)
        return tuple(value for value in values if isinstance(value, HostSettings))


class EnvoyFilter(Document):
    api_version: Literal["networking.istio.io/v1alpha3"]
    kind: Literal["EnvoyFilter"]
    spec: EnvoyFilterSpec
