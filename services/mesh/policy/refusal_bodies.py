"""Envoy's `local_reply_config` in the one form that is served here: its own refusals in the shape of OpenAI errors.

Istio has no object for it; it takes an EnvoyFilter merged into the connection manager. The first mapper that fits
counts. gRPC must be the first, untouched: Envoy puts the text into grpc-message, where nobody looks for JSON. Texts may
name only what the caller may see, so of Envoy's format operators a few are taken. Names are Envoy's.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from services.mesh.policy.base import HeaderName, HeaderValue, RouteName
from services.mesh.policy.rate_limit import Plain

CONNECTION_MANAGER = "envoy.filters.network.http_connection_manager"
OPERATORS = (
    "%%",
    "%LOCAL_REPLY_BODY%",
    "%RESPONSE_CODE%",
    "%REQ(:METHOD)%",
    "%REQ(x-request-id)%",
    "%RESP(retry-after)%",
)
"""What a text may be filled in with. Details of Envoy's and addresses behind it are not for callers."""
_OPERATOR = re.compile("|".join(map(re.escape, OPERATORS)))
_PassedOn = "%LOCAL_REPLY_BODY%"
_GRPC = "application/grpc"


def _format(text: str) -> str:
    rest = _OPERATOR.sub("", text)
    if "%" in rest:
        raise PydanticCustomError(
            "format",
            "of Envoy's operators only {known} are taken (a percent sign is %%)",
            {"known": ", ".join(OPERATORS)},
        )
    return text


Format = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_format)]
HeaderFormat = Annotated[HeaderValue, AfterValidator(_format)]
ErrorStatus = Annotated[int, Field(ge=400, le=599)]


class TextMatch(Plain):
    exact: Annotated[str, StringConstraints(max_length=256)] | None = None
    prefix: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.exact is None) == (self.prefix is None):
            raise PydanticCustomError("one_of", "give exact or prefix")
        return self


class HeaderCondition(Plain):
    """The text of a request header."""

    name: HeaderName
    string_match: TextMatch


class HeaderFilter(Plain):
    header: HeaderCondition


class StatusValue(Plain):
    default_value: ErrorStatus
    runtime_key: RouteName
    """Envoy insists on a name under which its operator could change the number."""


class Comparison(Plain):
    op: Literal["EQ", "GE"]
    value: StatusValue


class StatusFilter(Plain):
    comparison: Comparison


class FlagFilter(Plain):
    """Why Envoy answered, in its own abbreviations."""

    flags: tuple[
        Literal["UH", "UF", "UO", "UT", "UC", "UR", "URX", "LR", "NC", "NR", "FI", "RL", "OM", "DT", "SI"], ...
    ] = Field(min_length=1, max_length=16)


class _Payload(Plain):
    key: Literal["payload"]


class _Claim(Plain):
    key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class _Present(Plain):
    present_match: Literal[True]


class ClaimMatcher(Plain):
    filter: Literal["envoy.filters.http.jwt_authn"]
    path: tuple[_Payload, _Claim]
    value: _Present


class ClaimFilter(Plain):
    """That a token was accepted which has this claim. (The token itself is gone by then: it is not passed on.)"""

    matcher: ClaimMatcher
    match_if_key_not_found: Literal[False]
    """Envoy's default is true."""


class Condition(Plain):
    header_filter: HeaderFilter | None = None
    metadata_filter: ClaimFilter | None = None
    status_code_filter: StatusFilter | None = None
    response_flag_filter: FlagFilter | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise PydanticCustomError("one_of", "give exactly one condition")
        return self


class AllOf(Plain):
    filters: tuple[Condition, ...] = Field(min_length=2, max_length=8)


class ReplyFilter(Condition):
    and_filter: AllOf | None = None


class ErrorBody(Plain):
    """OpenAI's four fields, as the gateway's own errors have them."""

    message: Format
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: None
    code: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")] | None


class ErrorAnswer(Plain):
    error: ErrorBody


class TextSource(Plain):
    inline_string: Format


class ReplyBody(Plain):
    json_format: ErrorAnswer | None = None
    text_format_source: TextSource | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise PydanticCustomError("one_of", "give json_format or text_format_source")
        return self


class ReplyHeader(Plain):
    key: HeaderName
    value: HeaderFormat


class ReplyHeaderOption(Plain):
    header: ReplyHeader


class Mapper(Plain):
    filter: ReplyFilter
    status_code: ErrorStatus | None = None
    headers_to_add: tuple[ReplyHeaderOption, ...] = Field(default=(), max_length=8)
    body_format_override: ReplyBody

    @property
    def leaves_grpc_alone(self) -> bool:
        """Whether every gRPC and gRPC-Web call gets Envoy's own status and text."""
        header, text = self.filter.header_filter, self.body_format_override.text_format_source
        return (
            header is not None
            and header.header == HeaderCondition(name="content-type", string_match=TextMatch(prefix=_GRPC))
            and self.status_code is None
            and text is not None
            and text.inline_string == _PassedOn
        )


class LocalReplyConfig(Plain):
    mappers: tuple[Mapper, ...] = Field(min_length=1, max_length=32)

    @model_validator(mode="after")
    def _grpc_first(self) -> Self:
        if not self.mappers[0].leaves_grpc_alone:
            raise PydanticCustomError(
                "grpc",
                "the first of mappers must be for header content-type with prefix {grpc} and give {text} as it is",
                {"grpc": _GRPC, "text": _PassedOn},
            )
        return self


class Manager(Plain):
    type_url: Literal[
        "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    ] = Field(alias="@type")
    local_reply_config: LocalReplyConfig


class ManagerPatch(Plain):
    """What is merged into a listener's connection manager."""

    name: Literal["envoy.filters.network.http_connection_manager"]
    typed_config: Manager
