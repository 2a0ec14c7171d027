"""Turns a gRPC status into one of `autoglm.errors`.

The mesh names its reason in the trailing metadata `autoglm-reason`, which decides; proxies and gRPC itself know only
status codes, which are the fallback. After the answer has begun, a lost connection is an interruption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import grpc

from autoglm import errors

Metadata: TypeAlias = "Iterable[tuple[str, str | bytes]] | None"

_BY_REASON: Mapping[str, type[errors.AutoglmError]] = {
    "INVALID_REQUEST": errors.InvalidRequestError,
    "NOT_FOUND": errors.NotFoundError,
    "WRONG_VARIANT": errors.WrongVariantError,
    "TOO_BUSY": errors.TooBusyError,
    "UNAVAILABLE": errors.UnavailableError,
    "OUT_OF_TIME": errors.DeadlineError,
    "INTERRUPTED": errors.InterruptedStreamError,
    "CORRUPT_DATA": errors.InternalError,
    "INTERNAL": errors.InternalError,
}
_BY_CODE: Mapping[grpc.StatusCode, type[errors.AutoglmError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.WrongVariantError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AccessDeniedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.TooBusyError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.ABORTED: errors.InterruptedStreamError,
    grpc.StatusCode.CANCELLED: errors.CallCancelledError,
}
_LOST = {  # what gRPC and proxies report for a stream whose connection went away, when nobody gave a reason
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


class EndedCall(Protocol):
    """What is read of a failed call; both the sync and the asyncio errors of grpcio are one."""

    def code(self) -> Any: ...
    def details(self) -> Any: ...
    def initial_metadata(self) -> Any: ...
    def trailing_metadata(self) -> Any: ...


def error_of(call: EndedCall, target: str, timeout_s: float | None, *, has_begun: bool = False) -> errors.AutoglmError:
    """The exception for a call that ended with a status other than OK."""
    code: grpc.StatusCode = call.code() or grpc.StatusCode.UNKNOWN
    said = text_metadata(call.initial_metadata()) | text_metadata(call.trailing_metadata())
    reason = said.get("autoglm-reason") or None
    details = str(call.details() or "")
    kind = _BY_REASON.get(reason or "") or _BY_CODE.get(code, errors.InternalError)
    if has_begun and (kind is errors.UnavailableError or (reason is None and code in _LOST)):
        kind = errors.InterruptedStreamError
    if reason is None and code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        kind = errors.InvalidRequestError  # gRPC's own refusal of an oversized message has no other mark
    facts: dict[str, Any] = {
        "code": code.name,
        "reason": reason,
        "request_id": said.get("x-request-id", ""),
        "trace_id": said.get("x-trace-id", ""),
    }
    if kind is errors.TooBusyError:
        facts["retry_after_s"] = _seconds(said.get("retry-after-ms"))
    return kind(_message(kind, code, details, reason, target, timeout_s), **facts)


def cancelled_on_the_way(target: str, *, has_begun: bool) -> errors.AutoglmError:
    """The exception for a call that somebody else cancelled."""
    kind = errors.InterruptedStreamError if has_begun else errors.CallCancelledError
    return kind(f"the call to {target} was cancelled on the way", code="CANCELLED")


def text_metadata(metadata: Metadata) -> dict[str, str]:
    """The entries of call metadata whose values are text."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def _message(
    kind: type[errors.AutoglmError],
    code: grpc.StatusCode,
    details: str,
    reason: str | None,
    target: str,
    timeout_s: float | None,
) -> str:
    if reason is not None:
        return details or f"the gateway answered {reason}"
    if kind is errors.UnavailableError:
        return f"no gateway answers at {target} (set target=… or AUTOGLM_TARGET): {details}"
    if kind is errors.DeadlineError and timeout_s is not None:
        return f"no complete answer from {target} within timeout={timeout_s:g} s"
    if kind is errors.InterruptedStreamError:
        return f"the stream from {target} broke before its end: {details or code.name}"
    if kind is errors.UnsupportedError:
        return f"{target} does not offer this method; is it the mesh's ingress? {details}".rstrip()
    return details or f"{target} answered {code.name}"


def _seconds(milliseconds: str | None) -> float | None:
    if milliseconds is None or not milliseconds.isascii() or not milliseconds.isdigit():
        return None
    return int(milliseconds[:15]) / 1000
