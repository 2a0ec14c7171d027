"""Failures as the OpenAI API tells them: an HTTP status and {"error": {message, type, param, code}}.

One table for what the mesh raises; the rest of REST raises `ApiError` itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from services.chassis.errors import (
    CorruptData,
    Internal,
    Interrupted,
    InvalidRequest,
    NotFound,
    OutOfTime,
    ServiceError,
    TooBusy,
    Unavailable,
    WrongVariant,
)
from services.gateway.budgets.reservations import OverBudget
from services.gateway.budgets.words import spoken

log = logging.getLogger("autoglm.rest")

INVALID, BUSY, SERVER = "invalid_request_error", "rate_limit_error", "server_error"

TABLE: Mapping[type[ServiceError], tuple[int, str, str | None]] = {
    InvalidRequest: (400, INVALID, None),
    NotFound: (404, INVALID, "not_found"),
    WrongVariant: (503, SERVER, "wrong_variant"),
    TooBusy: (429, BUSY, "too_busy"),
    Unavailable: (503, SERVER, "unavailable"),
    OutOfTime: (504, SERVER, "out_of_time"),
    Interrupted: (502, SERVER, "interrupted"),
    CorruptData: (500, SERVER, "corrupt_data"),
    Internal: (500, SERVER, "internal_error"),
}


class ApiError(Exception):
    """A failure of one REST call."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def unsupported(param: str, remedy: str = "leave it out") -> ApiError:
    """For what other servers offer and this one does not: better told than ignored."""
    return ApiError(400, f"{param} is not supported yet; {remedy}", param=param, code="unsupported_parameter")


def told(failure: BaseException) -> ApiError:
    """Any failure as the caller may see it; what is unexpected goes to the log and stays there."""
    if isinstance(failure, ApiError):
        return failure
    if isinstance(failure, TimeoutError):
        failure = OutOfTime("the deadline passed before the answer was complete")
    if not isinstance(failure, ServiceError):
        log.error("unexpected failure", exc_info=failure)
        failure = Internal("internal error; the service's log has the details")
    status, kind, code = next(TABLE[kind] for kind in type(failure).__mro__ if kind in TABLE)
    headers = {}
    if isinstance(failure, TooBusy):
        headers["retry-after"] = str(max(1, math.ceil(failure.retry_after_s)))
        headers["retry-after-ms"] = str(math.ceil(failure.retry_after_s * 1000))
    if isinstance(failure, OverBudget):
        headers |= spoken(failure.standing)
    facts = failure.metadata
    return ApiError(status, failure.message, kind, facts.get("field"), facts.get("kind", code), headers)


def from_validation(problems: Sequence[ErrorDetails]) -> ApiError:
    """What pydantic found wrong with a body: the first problem, and how many more there are."""
    first = problems[0]
    param = _path(first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        message = message.removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is not valid JSON: {message}", code="invalid_json")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Unsupported):
        return unsupported(param, cause.remedy)
    more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param or 'body'}: {message}{more}", param=param or None, code=code)


class Unsupported(ValueError):
    """Raised by a schema for a valid OpenAI feature that is not here yet."""

    def __init__(self, remedy: str) -> None:
        super().__init__(f"not supported yet; {remedy}")
        self.remedy = remedy


def _path(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
