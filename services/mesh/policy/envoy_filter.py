"""EnvoyFilter, in the one shape that is served here: a compressor in front of the router of the ingress gateway.

Istio takes any patch of Envoy's configuration and checks none of it. Here each field has its model, so a patch is
either understood or refused. Event streams and gRPC may not be compressed: a compressor gathers bytes, and a token that
waits in it is a token that comes late.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import Document, Labels, Strict

COMPRESSOR = "envoy.filters.http.compressor"
_TYPES = "type.googleapis.com/envoy.extensions."
MediaType = Annotated[str, StringConstraints(pattern=r"^[a-z]+/[a-z0-9.+-]+$", max_length=128)]
STREAMED = ("text/event-stream", "application/grpc", "application/connect")
"""Media types (and beginnings of them) whose answers come piece by piece."""


class Plain(Strict):
    """A piece of Envoy's own configuration, in Envoy's spelling."""

    model_config = ConfigDict(alias_generator=None, validate_by_name=True)


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


class Patch(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"filterClass"})

    operation: Literal["INSERT_BEFORE"]
    value: CompressorFilter


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
    listener: ListenerMatch


class ConfigPatch(Strict):
    apply_to: Literal["HTTP_FILTER"]
    match: ObjectMatch
    patch: Patch


class WorkloadSelector(Strict):
    labels: Labels = Field(min_length=1)


class EnvoyFilterSpec(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"priority", "targetRefs"})

    workload_selector: WorkloadSelector
    config_patches: tuple[ConfigPatch, ...] = Field(min_length=1, max_length=4)


class EnvoyFilter(Document):
    api_version: Literal["networking.istio.io/v1alpha3"]
    kind: Literal["EnvoyFilter"]
    spec: EnvoyFilterSpec
