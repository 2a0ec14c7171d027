"""One measured process from the parent's side: starts it, asks it, freezes it while others are measured.

A frozen process (SIGSTOP) cannot spin or page: threads of a peer that wait busily would slow the next one down.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import REPOSITORY, environment

ANSWER_LIMIT_BYTES = 16 << 20


class Failed(Exception):
    """The process died, hung or answered with an error; the text is for the result."""


class Child:
    """Starts `python -m benchmarks.peers.<module>` at once, frozen between questions."""

    def __init__(self, python: Path, module: str, log: Path, limit_s: float) -> None:
        self._limit_s = limit_s
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [str(python), "-m", f"benchmarks.peers.{module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                cwd=REPOSITORY,
                env=environment(),
                start_new_session=True,
            )
        self._log, self._pending = log, b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request. Raises Failed."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line())
        except OSError as error:
            raise Failed(f"the process is gone ({error}); see {self._log}") from error
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process; may be called twice."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # what was not written yet has no reader any more

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        source, deadline = self._process.stdout.fileno(), time.monotonic() + self._limit_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([source], [], [], left)[0]:
                raise Failed(f"no answer within {self._limit_s:g} s")
            got = os.read(source, 1 << 16)
            if not got or len(self._pending) > ANSWER_LIMIT_BYTES:
                raise Failed(f"the process ended; see {self._log}")
            self._pending += got
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
