"""Keeps a slow or dead neighbour out of the way: after a few failures in a row it is left alone for growing pauses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FAILURES_TO_OPEN = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


@dataclass(slots=True)
class Breaker:
    """Opens after consecutive failures; lets calls through again after each pause."""

    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    closed_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S

    def allows(self) -> bool:
        """Whether to try now. Past a pause, the next failure opens it again at once."""
        return self.failures < FAILURES_TO_OPEN or self.clock() >= self.closed_at

    def succeeded(self) -> None:
        self.failures, self.pause_s = 0, FIRST_PAUSE_S

    def failed(self) -> None:
        self.failures += 1
        if self.failures >= FAILURES_TO_OPEN:
            self.closed_at = self.clock() + self.pause_s
            self.pause_s = min(self.pause_s * 2, LONGEST_PAUSE_S)
