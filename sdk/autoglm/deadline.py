"""The time one public call has, shared by the gRPC calls behind it."""

from __future__ import annotations

import time

from autoglm.connection import check_timeout
from autoglm.requests import CallOptions


class Deadline:
    """Starts when it is made. `remaining_s` never goes below zero."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._at = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """Seconds left for the next gRPC call; None without a deadline."""
        return None if self._at is None else max(self._at - time.monotonic(), 0.0)


def timeout_of(options: CallOptions, default_s: float | None) -> float | None:
    """The timeout of one call: its own, else the client's. An explicit None means no deadline."""
    return check_timeout(options["timeout"]) if "timeout" in options else default_s
