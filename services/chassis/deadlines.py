"""The time a call has left, carried from the incoming call to every outgoing one, less a margin per hop.

gRPC Python does not pass a deadline on by itself. The server interceptor sets it, the client interceptor spends it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


def start(remaining_s: float | None) -> None:
    """Remembers the incoming call's remaining seconds for the current task; None means no deadline."""
    _deadline.set(None if remaining_s is None else time.monotonic() + remaining_s)


def remaining_s() -> float | None:
    """Seconds left, possibly negative; None without a deadline."""
    deadline = _deadline.get()
    return None if deadline is None else deadline - time.monotonic()


def for_next_hop(margin_s: float, wanted_s: float | None = None) -> float | None:
    """Timeout of an outgoing call: what is left less the margin, or `wanted_s` if that is shorter."""
    left = remaining_s()
    if left is None:
        return wanted_s
    left -= margin_s
    return left if wanted_s is None else min(left, wanted_s)
