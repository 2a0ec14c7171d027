"""The exceptions a service may raise, and the one table that turns them into gRPC status codes.

Each is named by what the caller should do about it. `services.chassis.interceptors` is the only place that aborts a
call; the codes mean what AIP-193 and AIP-194 say: only UNAVAILABLE invites an immediate retry.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "autoglm.mesh"


class ServiceError(Exception):
    """A failure with a public text. `metadata` carries the facts (limit, value seen) so that no one parses prose."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: Mapping[str, str] = {key: str(value) for key, value in metadata.items()}


class InvalidRequest(ServiceError):
    """Change the request: it breaks a bound or contradicts itself."""


class NotFound(ServiceError):
    """Ask for something that exists."""


class WrongVariant(ServiceError):
    """Ask the variant that is loaded: a digest did not match. Fails closed."""


class TooBusy(ServiceError):
    """Come back after `retry_after_s`: a queue or budget is full."""

    def __init__(self, message: str, retry_after_s: float, **metadata: object) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **metadata)
        self.retry_after_s = retry_after_s


class Unavailable(ServiceError):
    """Try again at once: this replica cannot answer, another may."""


class OutOfTime(ServiceError):
    """Give more time: the deadline passed before the work was done."""


class Interrupted(ServiceError):
    """The stream broke after it had begun; what was sent is a correct prefix."""


class CorruptData(ServiceError):
    """Stored data failed its checksum and was dropped."""


class Internal(ServiceError):
    """A bug. The public text is bland; the log has everything."""


TABLE: Mapping[type[ServiceError], tuple[grpc.StatusCode, str]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    NotFound: (grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    WrongVariant: (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_VARIANT"),
    TooBusy: (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_BUSY"),
    Unavailable: (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    OutOfTime: (grpc.StatusCode.DEADLINE_EXCEEDED, "OUT_OF_TIME"),
    Interrupted: (grpc.StatusCode.ABORTED, "INTERRUPTED"),
    CorruptData: (grpc.StatusCode.DATA_LOSS, "CORRUPT_DATA"),
    Internal: (grpc.StatusCode.INTERNAL, "INTERNAL"),
}

_BY_REASON = {reason: kind for kind, (_, reason) in TABLE.items()}
_BY_CODE = {code: kind for kind, (code, _) in TABLE.items()}


def status_of(error: ServiceError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """(code, text, trailing metadata): google.rpc.Status with ErrorInfo, and the reason in plain text beside it."""
    code, reason = next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=dict(error.metadata))
    detail = Any()
    detail.Pack(info)
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=error.message, details=[detail])
    trailers: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString()),
        ("autoglm-reason", reason),
    ]
    if isinstance(error, TooBusy):
        trailers.append(("retry-after-ms", str(round(error.retry_after_s * 1000))))
    return code, error.message, tuple(trailers)


def from_rpc(error: grpc.RpcError) -> ServiceError:
    """The exception behind a failed outgoing call, for services that pass a failure on."""
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    text = (error.details() if hasattr(error, "details") else None) or code.name
    trailers: dict[str, str | bytes] = {}
    if hasattr(error, "trailing_metadata"):
        trailers = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]  # pairs at run time
    kind = _BY_REASON.get(str(trailers.get("autoglm-reason", ""))) or _BY_CODE.get(code, Unavailable)
    if kind is TooBusy:
        return TooBusy(text, retry_after_s=int(trailers.get("retry-after-ms", 1000)) / 1000)
    return kind(text, code=code.name)
