"""Client for Open-AutoGLM Mesh: text generation over gRPC, with grpcio and protobuf as its only needs.

    import autoglm

    with autoglm.Client() as client:
        print(client.generate("Once upon a time", max_tokens=32).text)

What is listed in `__all__` is the public interface; everything else may move.
"""

from autoglm.async_client import AsyncClient
from autoglm.client import Client
from autoglm.completion import (
    Alternative,
    Choice,
    Completion,
    FinishReason,
    Health,
    Message,
    Model,
    Token,
    TokenCount,
    Usage,
)
from autoglm.connection import Tls
from autoglm.errors import (
    AccessDeniedError,
    AutoglmError,
    CallCancelledError,
    DeadlineError,
    InternalError,
    InterruptedStreamError,
    InvalidRequestError,
    NotFoundError,
    RefusedError,
    TooBusyError,
    UnavailableError,
    UnsupportedError,
    WrongVariantError,
)
from autoglm.events import Delta, Done, Event, Finish
from autoglm.requests import CallOptions, GenerateOptions
from autoglm.streams import AsyncStream, Stream

__all__ = [
    "AccessDeniedError",
    "Alternative",
    "AsyncClient",
    "AsyncStream",
    "AutoglmError",
    "CallCancelledError",
    "CallOptions",
    "Choice",
    "Client",
    "Completion",
    "DeadlineError",
    "Delta",
    "Done",
    "Event",
    "Finish",
    "FinishReason",
    "GenerateOptions",
    "Health",
    "InternalError",
    "InterruptedStreamError",
    "InvalidRequestError",
    "Message",
    "Model",
    "NotFoundError",
    "RefusedError",
    "Stream",
    "Tls",
    "Token",
    "TokenCount",
    "TooBusyError",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
    "WrongVariantError",
]
