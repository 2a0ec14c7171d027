"""One supervised process: started, waited for, restarted when it dies, ended with grace.

It is ready when it logs the chassis' JSON "ready" line, or when its probe says so (Envoy). JSON lines "progress" say
how far a long start is. One that ends with status 2 before it was ever ready says that what it is told is wrong
(settings, a model that cannot be read): it is not started again. Nothing else is known here about what it does. It has
a process group of its own, and dies with the supervisor (see `launch.py`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from services.mesh.logs import BoundedLog, LineSplitter

LAUNCH = Path(__file__).with_name("launch.py")
PROBE_PAUSE_S = 0.03
CANNOT_WORK = 2
"""The exit status of a program whose settings or files are wrong."""
LAST_OUTPUT_S = 1.0
"""How long the output of an ended process is waited for; a grandchild could hold the pipe open for ever."""


class Phase(StrEnum):
    """Where a process is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    BACKING_OFF = "backing off"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Program:
    """What to run. `after` names programs that must be ready first; `environment` is complete, nothing is inherited."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    after: tuple[str, ...] = ()
    probe: Callable[[], Awaitable[bool]] | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """Time and size limits of supervision."""

    start_timeout_s: float = 60.0
    start_attempts: int = 3
    backoff_first_s: float = 0.2
    backoff_cap_s: float = 10.0
    stable_s: float = 30.0
    grace_s: float = 10.0
    log_bytes: int = 4 << 20


class Process:
    """One program kept running. `keep` is its life; `stop` ends it."""

    def __init__(self, program: Program, patience: Patience, changed: Callable[[], None]) -> None:
        self.program, self.patience, self._changed = program, patience, changed
        self.phase = Phase.WAITING
        self.since = time.time()
        self.pid: int | None = None
        self.restarts = 0
        self.last_exit = ""
        self.facts: Mapping[str, Any] = {}
        """The fields of the ready line."""
        self.progress: Mapping[str, Any] = {}
        """The fields of the newest progress line of a start that is under way."""
        self._heard_at = 0.0
        self.start_s = 0.0
        self.was_ready = asyncio.Event()
        self._log = BoundedLog(program.log, patience.log_bytes)
        self._stopping = asyncio.Event()
        self._child: asyncio.subprocess.Process | None = None
        self._returned: int | None = None

    async def keep(self) -> None:
        """Runs the program again and again until `stop`, or until it has failed too often before its first ready."""
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            was_ready = await self._live_once()
            if self._stopping.is_set():
                break
            failures = 1 if was_ready and time.monotonic() - began >= self.patience.stable_s else failures + 1
            is_hopeless = self._returned == CANNOT_WORK or failures >= self.patience.start_attempts
            if not self.was_ready.is_set() and is_hopeless:
                self._enter(Phase.FAILED)
                return
            self._enter(Phase.BACKING_OFF)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s(self.patience, failures))
            self.restarts += 1
        self._enter(Phase.STOPPED)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after the grace. May be called twice, and before the first start."""
        self._stopping.set()
        child = self._child
        if child is None or child.returncode is not None:
            return
        self._enter(Phase.STOPPING)
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            await asyncio.wait_for(child.wait(), self.patience.grace_s + 1.0)
        except TimeoutError:
            self._log.write(b"still running after its grace; killed")
            _kill_group(child.pid)
            await child.wait()

    def last_lines(self, count: int = 12) -> list[str]:
        """The end of its log."""
        return list(self._log.tail)[-count:]

    def close(self) -> None:
        """Closes the log file."""
        self._log.close()

    async def _live_once(self) -> bool:
        self.progress = {}
        self._enter(Phase.STARTING)
        began = self._heard_at = time.monotonic()
        child = self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(LAUNCH),
            str(os.getpid()),
            *self.program.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=dict(self.program.environment),
        )
        self.pid = child.pid
        self._changed()
        if self._stopping.is_set():  # stop() came while the child was being made and did not see it
            _kill_group(child.pid)
        ready = asyncio.Event()
        output = asyncio.create_task(self._read(child, ready))
        watch = asyncio.create_task(self._wait_ready(ready))
        ended = asyncio.create_task(child.wait())
        try:
            while (left_s := self._heard_at + self.patience.start_timeout_s - time.monotonic()) > 0:
                done, _ = await asyncio.wait({watch, ended}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    break
            is_ready = watch.done() and not ended.done()
            if is_ready:
                self.start_s = time.monotonic() - began
                self.progress = {}
                self.was_ready.set()
                self._enter(Phase.READY)
            elif not ended.done():
                self._log.write(f"not ready after {self.patience.start_timeout_s:g} s; killed".encode())
                _kill_group(child.pid)
            await ended
            await asyncio.wait({output}, timeout=LAST_OUTPUT_S)
        finally:
            _kill_group(child.pid)
            for task in (output, watch, ended):
                task.cancel()
            await asyncio.gather(output, watch, ended, return_exceptions=True)
            self.pid = None
        self.progress = {}
        self._returned = child.returncode
        self.last_exit = describe_exit(child.returncode)
        return is_ready

    async def _read(self, child: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        assert child.stdout is not None
        lines = LineSplitter()
        while data := await child.stdout.read(65_536):
            for line in lines.feed(data):
                self._log.write(line)
                if not ready.is_set():
                    self._listen(line, ready)
        if rest := lines.rest():
            self._log.write(rest)

    def _listen(self, line: bytes, ready: asyncio.Event) -> None:
        """Takes note of a line of a process that is not ready yet."""
        facts = _entry(line)
        if facts.get("message") == "ready":
            self.facts = facts
            ready.set()
        elif facts.get("message") == "progress" and facts != self.progress:
            self.progress, self._heard_at = facts, time.monotonic()
            self._changed()

    async def _wait_ready(self, ready: asyncio.Event) -> None:
        if self.program.probe is None:
            await ready.wait()
            return
        while not await self.program.probe():  # noqa: ASYNC110  # another program's state; nothing here could signal it
            await asyncio.sleep(PROBE_PAUSE_S)

    def _enter(self, phase: Phase) -> None:
        self.phase, self.since = phase, time.time()
        self._changed()


def backoff_s(patience: Patience, failures: int) -> float:
    """Pause after `failures` deaths in a row (from 1): doubles from the first pause up to the cap."""
    return min(patience.backoff_cap_s, patience.backoff_first_s * 2.0 ** min(failures - 1, 30))


def describe_exit(code: int | None) -> str:
    """An exit status in words."""
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit status {code}"


def _entry(line: bytes) -> Mapping[str, Any]:
    """A log line's fields; none when it is not one object of JSON."""
    if not line.startswith(b"{"):
        return {}
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
