"""Says how far a long start is: a bar on a terminal, elsewhere a log line a second, which a supervisor reads as a sign
of life.
"""

from __future__ import annotations

import logging
import sys
import time

log = logging.getLogger("autoglm.progress")

BAR_CELLS = 32
LOG_EVERY_S = 1.0
QUICK_S = 0.5
"""What takes no longer is not worth a word."""


class Reporter:
    """Tells how far a long piece of work is. Called from one thread with (done, total); 0 of 0 is waiting."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._on_terminal = sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        took = now - self._began
        pause = 0.1 if self._on_terminal else LOG_EVERY_S
        if took < QUICK_S or (now - self._last < pause and done < total) or (total == 0 and now - self._last < pause):
            return
        self._last = now
        if self._on_terminal:
            self._draw(done, total, took)
        else:
            facts = {"doing": self._doing, "done": done, "total": total, "seconds": round(took, 1)}
            log.info("progress", extra={"facts": facts})

    def _draw(self, done: int, total: int, took: float) -> None:
        if total == 0:
            print(f"\r{self._doing}: another process is at it, {took:.0f} s   ", end="", file=sys.stderr, flush=True)
            return
        left = took * (total - done) / max(1, done)
        text = f"{self._doing} {done >> 20} of {total >> 20} MiB, {left:.0f} s left"
        filled = BAR_CELLS * done // total
        end = "\n" if done == total else ""
        print(f"\r[{'#' * filled}{'.' * (BAR_CELLS - filled)}] {text}   ", end=end, file=sys.stderr, flush=True)
