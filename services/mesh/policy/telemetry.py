"""Telemetry (telemetry.istio.io/v1): what is traced, what is logged, and for whom.

Istio names providers in its mesh configuration, which is no Kubernetes object. Here two names are known: `otel`, the
mesh's OTLP collector, and `envoy`, the access log that Envoy writes itself. `metrics` is Istio's own filter, which a
stock Envoy does not have; it stays refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import MAX_LIST, Document, HeaderName, Labels, Percentage, Strict

MAX_EXPRESSION = 4096
TagName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
TagText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


class TracingProvider(Strict):
    name: Literal["otel"]


class LogProvider(Strict):
    name: Literal["otel", "envoy"]


class LiteralTag(Strict):
    value: TagText


class HeaderTag(Strict):
    name: HeaderName
    default_value: str | None = Field(None, max_length=1024)


class EnvironmentTag(Strict):
    name: Variable
    default_value: str | None = Field(None, max_length=1024)


class FormatterTag(Strict):
    """Envoy's format strings, such as %UPSTREAM_CLUSTER_RAW%."""

    value: TagText


class CustomTag(Strict):
    """Where the value of a tag comes from."""

    literal: LiteralTag | None = None
    header: HeaderTag | None = None
    environment: EnvironmentTag | None = None
    formatter: FormatterTag | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(item is not None for item in (self.literal, self.header, self.environment, self.formatter)) != 1:
            raise PydanticCustomError("tag", "give exactly one of literal, header, environment, formatter")
        return self


class Tracing(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset(
        {"match", "disableContextPropagation", "enableIstioTags", "useRequestIdForTraceSampling"}
    )

    providers: tuple[TracingProvider, ...] = Field(default=(), max_length=1)
    random_sampling_percentage: Percentage | None = None
    disable_span_reporting: bool | None = None
    custom_tags: dict[TagName, CustomTag] | None = Field(None, max_length=MAX_LIST)


class LogFilter(Strict):
    """A CEL expression over Envoy's attributes; Envoy itself says whether it is one."""

    expression: Annotated[str, StringConstraints(min_length=1, max_length=MAX_EXPRESSION)]


class AccessLogging(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"match"})

    providers: tuple[LogProvider, ...] = Field(default=(), max_length=2)
    disabled: bool = False
    filter: LogFilter | None = None


class WorkloadSelector(Strict):
    match_labels: Labels = Field(min_length=1)


class TelemetrySpec(Strict):
    istio_has: ClassVar[frozenset[str]] = frozenset({"metrics", "targetRef", "targetRefs"})

    selector: WorkloadSelector | None = None
    tracing: tuple[Tracing, ...] = Field(default=(), max_length=1)
    access_logging: tuple[AccessLogging, ...] = Field(default=(), max_length=8)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.tracing and not self.access_logging:
            raise PydanticCustomError("telemetry", "says neither tracing nor accessLogging")
        return self


class Telemetry(Document):
    api_version: Literal["telemetry.istio.io/v1"]
    kind: Literal["Telemetry"]
    spec: TelemetrySpec


@dataclass(frozen=True, slots=True)
class Effective:
    """What holds for one workload."""

    tracing: Tracing
    access_logging: tuple[AccessLogging, ...]


def effective(telemetries: tuple[Telemetry, ...], labels: Mapping[str, str]) -> Effective:
    """Istio's merge: what a selector says of this workload goes over what the namespace says.

    Of tracing field by field, of access logging the whole list.
    """
    ranked = sorted((item.spec for item in telemetries), key=lambda spec: spec.selector is not None)
    tracing, logging = Tracing(), tuple[AccessLogging, ...]()
    for spec in ranked:
        if spec.selector is not None and not spec.selector.match_labels.items() <= labels.items():
            continue
        for entry in spec.tracing:
            said = {name: value for name in Tracing.model_fields if (value := getattr(entry, name)) not in (None, ())}
            tracing = tracing.model_copy(update=said)
        logging = spec.access_logging or logging
    return Effective(tracing, logging)


def conflicts(telemetry: Telemetry, earlier: tuple[Telemetry, ...]) -> Iterator[tuple[str, str]]:
    """Two objects for the same workloads: Istio takes the older one, which files do not tell."""
    for other in earlier:
        if other.spec.selector == telemetry.spec.selector:
            yield "spec.selector", f"Telemetry/{other.metadata.name} speaks for the same workloads; join the two"


def unseen(telemetry: Telemetry, workloads: tuple[Mapping[str, str], ...]) -> Iterator[tuple[str, str]]:
    """A selector that selects none of the workloads that there are."""
    selector = telemetry.spec.selector
    if selector is not None and not any(selector.match_labels.items() <= labels.items() for labels in workloads):
        yield "spec.selector", "selects no workload of this mesh, so it says nothing"
