"""Everything a call can raise, named by what the caller should do about it.

    AutoglmError                     any failure of a call; catch this one to catch all
    ├── RefusedError                 sending it again unchanged gives the same answer
    │   ├── InvalidRequestError      a field breaks a limit or contradicts another; the text names it
    │   ├── NotFoundError            no such model
    │   ├── WrongVariantError        a digest did not match the variant that is loaded
    │   ├── AccessDeniedError        no token, a bad one, or one that may not do this
    │   └── UnsupportedError         the target does not know this method
    ├── UnavailableError             nobody answered; trying again at once may work
    ├── TooBusyError                 a queue or budget is full; come back after `retry_after_s`
    ├── DeadlineError                the timeout passed; give more time or ask for less
    ├── InterruptedStreamError       the stream broke before its proper end; `partial` is a correct prefix
    ├── CallCancelledError           the call was cancelled, here or on the way
    └── InternalError                a bug on the other side; report the request id

`autoglm.statuses` decides which one a gRPC status becomes.
"""

from __future__ import annotations

from autoglm.completion import Choice


class AutoglmError(Exception):
    """A failed call.

    `code` is the gRPC status name and `reason` the mesh's own reason; both are None when the failure is local.
    `request_id` and `trace_id` are empty when the call did not get that far. `partial` holds what had arrived.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str | None = None,
        request_id: str = "",
        trace_id: str = "",
        partial: tuple[Choice, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.trace_id = trace_id
        self.partial = partial

    @property
    def partial_text(self) -> str:
        """Text of the first choice as far as it had come."""
        return self.partial[0].text if self.partial else ""


class RefusedError(AutoglmError):
    """The request was understood and turned down."""


class InvalidRequestError(RefusedError):
    """Change the request: it breaks a limit or contradicts itself. Also raised before anything is sent."""


class NotFoundError(RefusedError):
    """Ask for something that exists; `Client.models` lists it."""


class WrongVariantError(RefusedError):
    """A digest named in the request is not the one that is loaded. The mesh fails closed."""


class AccessDeniedError(RefusedError):
    """Bring a valid token (`token=…` or AUTOGLM_TOKEN), or ask for the permission."""


class UnsupportedError(RefusedError):
    """The target does not know the method: an older gateway, or no gateway at all."""


class UnavailableError(AutoglmError):
    """Nobody answered. Nothing had been generated for this call, so trying again is safe."""


class TooBusyError(AutoglmError):
    """A queue or budget is full. `retry_after_s` says when to come back, in seconds; None when the mesh did not say."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str | None = None,
        request_id: str = "",
        trace_id: str = "",
        partial: tuple[Choice, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, code=code, reason=reason, request_id=request_id, trace_id=trace_id, partial=partial)
        self.retry_after_s = retry_after_s


class DeadlineError(AutoglmError):
    """The timeout passed before the answer was complete."""


class InterruptedStreamError(AutoglmError):
    """The stream broke after it had begun. `partial` holds text and tokens so far, a correct prefix of the answer."""


class CallCancelledError(AutoglmError):
    """The call was cancelled: by `cancel()`, by closing the client, or by something between here and the gateway."""


class InternalError(AutoglmError):
    """A bug on the other side. Its log has the details under `request_id`."""
