"""EnvoyFilter, in the three shapes that are served here: a compressor and a rate limit, at the ingress gateway, and the
bodies of Envoy's own refusals, at the gateway or in front of a service.

Istio takes any patch of Envoy's configuration and checks none of it. Here each field has its model, so a patch is
either understood or refused. Event streams and gRPC may not be compressed: a compressor gathers bytes, and a token that
waits in it is a token that comes late.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import Document, Labels, Strict
from services.mesh.policy.rate_limit import HostSettings, LimitFilter, Plain
from services.mesh.policy.refusal_bodies import CONNECTION_MANAGER, LocalReplyConfig, ManagerPatch

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
        kinds = (
            (CompressorFilter, "(compressor)"),
            (LimitFilter, "(limit)"),
            (HostSettings, "(hosts)"),
            (ManagerPatch, "(manager)"),
        )
        return next((tag for kind, tag in kinds if isinstance(value, kind)), None)
    if "typed_per_filter_config" in value:
        return "(hosts)"
    name = value.get("name")
    tags = {COMPRESSOR: "(compressor)", LOCAL_RATE_LIMIT: "(limit)", CONNECTION_MANAGER: "(manager)"}
    return tags.get(name) if isinstance(name, str) else None


class Patch(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"filterClass"})

    operation: Literal["INSERT_BEFORE", "MERGE"]
    value: Annotated[
        Annotated[CompressorFilter, Tag("(compressor)")]
        | Annotated[LimitFilter, Tag("(limit)")]
        | Annotated[HostSettings, Tag("(hosts)")]
        | Annotated[ManagerPatch, Tag("(manager)")],
        Discriminator(
            _what,
            custom_error_type="filter",
            custom_error_message=f"must be a filter named {COMPRESSOR}, {LOCAL_RATE_LIMIT} or {CONNECTION_MANAGER}, or"
            " typed_per_filter_config of the second",
        ),
    ]


class SubFilter(Strict):
    name: Literal["envoy.filters.http.router"]


class NetworkFilter(Strict):
    name: Literal["envoy.filters.network.http_connection_manager"]
    sub_filter: SubFilter | None = None


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

    context: Literal["GATEWAY", "SIDECAR_INBOUND"]
    listener: ListenerMatch | None = None


class ConfigPatch(Strict):
    """A filter in front of the router of every listener, or what is merged into every virtual host or manager."""

    apply_to: Literal["HTTP_FILTER", "VIRTUAL_HOST", "NETWORK_FILTER"]
    match: ObjectMatch
    patch: Patch

    @model_validator(mode="after")
    def _fits(self) -> Self:
        value, listener = self.patch.value, self.match.listener
        wanted = {HostSettings: "VIRTUAL_HOST", ManagerPatch: "NETWORK_FILTER"}.get(type(value), "HTTP_FILTER")
        is_filter = wanted == "HTTP_FILTER"
        if wanted != self.apply_to:
            raise PydanticCustomError(
                "shape",
                "a filter is for HTTP_FILTER, typed_per_filter_config for VIRTUAL_HOST,"
                " a connection manager for NETWORK_FILTER",
            )
        if self.patch.operation != ("INSERT_BEFORE" if is_filter else "MERGE"):
            raise PydanticCustomError("shape", "HTTP_FILTER is served with INSERT_BEFORE, the others with MERGE")
        if is_filter != (listener is not None and listener.filter_chain.filter.sub_filter is not None):
            raise PydanticCustomError("shape", "match.listener must name the router for HTTP_FILTER, and only for it")
        if (wanted == "VIRTUAL_HOST") != (listener is None):
            raise PydanticCustomError("shape", "match.listener is needed, except for VIRTUAL_HOST")
        if self.match.context != "GATEWAY" and wanted != "NETWORK_FILTER":
            raise PydanticCustomError("shape", "only NETWORK_FILTER is served with SIDECAR_INBOUND")
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

    def replies(self, context: str) -> tuple[LocalReplyConfig, ...]:
        """The bodies of refusals in that place, if this is about them."""
        return tuple(
            item.patch.value.typed_config.local_reply_config
            for item in self.config_patches
            if isinstance(item.patch.value, ManagerPatch) and item.match.context == context
        )


class EnvoyFilter(Document):
    api_version: Literal["networking.istio.io/v1alpha3"]
    kind: Literal["EnvoyFilter"]
    spec: EnvoyFilterSpec
