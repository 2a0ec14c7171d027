"""The strict ground the policy models stand on: nothing unknown, nothing unbounded, nothing guessed.

Field names are Istio's, in Istio's spelling. A field that Istio has and the local control plane lacks is listed by each
model in `istio_has`, so that the refusal can tell "not supported here" from a spelling mistake.
"""

import re
from datetime import timedelta
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, StringConstraints
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

ISTIO_VERSION = "1.30.3"
MAX_LIST = 64
MAX_WEIGHT = 1_000_000

_DURATION = re.compile(
    r"(?:(\d{1,5})h)?(?:(\d{1,7})m(?!s))?(?:(\d{1,9}(?:\.\d{1,6})?)s)?(?:(\d{1,9}(?:\.\d{1,3})?)ms)?"
)
_LONGEST = timedelta(days=7)
_HEADER = re.compile(r":?[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


class Strict(BaseModel):
    """A frozen piece of an Istio object."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=to_camel,
        validate_by_alias=True,
        validate_by_name=False,
        allow_inf_nan=False,
    )
    istio_has: ClassVar[frozenset[str]] = frozenset()


class Metadata(Strict):
    """Name, namespace and free labels; what the cluster writes into metadata is refused."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
    namespace: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")] = "default"
    labels: dict[str, str] = Field(default_factory=dict, max_length=MAX_LIST)
    annotations: dict[str, str] = Field(default_factory=dict, max_length=MAX_LIST)


class Document(Strict):
    """One Kubernetes object. Subclasses narrow `apiVersion` and `kind` and add `spec`."""

    api_version: str
    kind: str
    metadata: Metadata


def _duration(value: object) -> timedelta:
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value) if isinstance(value, str) and value else None
    if match is None:
        raise PydanticCustomError("duration", "must be a duration such as 10s, 1.5s, 250ms or 1h")
    hours, minutes, seconds, millis = (float(part or 0) for part in match.groups())
    span = timedelta(hours=hours, minutes=minutes, seconds=seconds, milliseconds=millis)
    if span > _LONGEST:
        raise PydanticCustomError("duration", "must not exceed 168h")
    return span


def _text(value: timedelta) -> str:
    return f"{value.total_seconds():.6f}".rstrip("0").rstrip(".") + "s"


def _positive(value: timedelta) -> timedelta:
    if value < timedelta(milliseconds=1):
        raise PydanticCustomError("duration", "must be at least 1ms")
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    for key, text in value.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(text):
            raise PydanticCustomError("label", "'{pair}' is not a Kubernetes label", {"pair": f"{key}: {text}"})
    return value


def _header(value: str) -> str:
    if not _HEADER.fullmatch(value):
        raise PydanticCustomError("header", "'{name}' is not a header name", {"name": value})
    return value.lower()


Duration = Annotated[timedelta, BeforeValidator(_duration), PlainSerializer(_text, when_used="json")]
PositiveDuration = Annotated[Duration, AfterValidator(_positive)]
Labels = Annotated[dict[str, str], AfterValidator(_labels), Field(max_length=MAX_LIST)]
HeaderName = Annotated[str, AfterValidator(_header)]
HeaderValue = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\r\n\x00]*$")]
Host = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", max_length=253)
]
HostPattern = Annotated[
    str,
    StringConstraints(
        pattern=r"^(\*|(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)$", max_length=253
    ),
]
ObjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
RouteName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,126}[A-Za-z0-9])?$")]
PortNumber = Annotated[int, Field(ge=1, le=65535)]
Percentage = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Weight = Annotated[int, Field(ge=0, le=MAX_WEIGHT)]
ExportEverywhere = tuple[Literal["*"]]
