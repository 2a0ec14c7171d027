"""The supervisor as a process of its own: starting it, watching it come up, stopping it, and being it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Protocol

from services.mesh import state
from services.mesh.local import CannotStart
from services.mesh.process import LAUNCH
from services.mesh.rundir import AlreadyRunning, RunDirectory
from services.mesh.state import MeshState, Progress

POLL_S = 0.05
OUTPUT = "supervisor"
STOP_WAVES = 6
"""At most this many groups of processes are drained one after the other."""

Watcher = Callable[[MeshState], None]


class Runs(Protocol):
    """What a supervisor runs: until it is told to stop, then its exit status."""

    async def run(self) -> int: ...


def start(
    directory: RunDirectory, environment: Mapping[str, str], *, dies_with_us: bool, module: str = "services.mesh"
) -> subprocess.Popen[bytes]:
    """The supervisor, running in the background. Its output is in the log `supervisor`."""
    directory.logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, "supervise"]
    if dies_with_us:
        command = [sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid()), *command]
    with directory.log(OUTPUT).open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=dict(environment),
        )


def wait_up(
    directory: RunDirectory, supervisor: subprocess.Popen[bytes] | None, timeout_s: float, watch: Watcher
) -> MeshState:
    """Returns when everything is ready; `watch` sees each state on the way. Raises `CannotStart` with the reason.

    `timeout_s` begins anew with every progress that a process tells.

    Without `supervisor`, or when another was quicker than it, this waits for whoever holds the directory.
    """
    deadline = time.monotonic() + timeout_s
    progress: list[Progress | None] = []
    who = None if supervisor is None else supervisor.pid
    while time.monotonic() < deadline:
        ended = supervisor is not None and supervisor.poll() is not None
        holder = directory.holder() if supervisor is None or ended else supervisor.pid
        who = holder or who
        current = state.read(directory.state)
        # What an earlier mesh left behind says nothing about this one.
        if current is not None and current.pid == who:
            watch(current)
            if (now := [item.progress for item in current.processes]) != progress:
                progress, deadline = now, time.monotonic() + timeout_s
            if current.phase == "up":
                return current
            if current.phase == "failed":
                raise CannotStart(current.reason)
            if current.phase in ("stopping", "stopped"):
                raise CannotStart("it was stopped before it was up")
        if holder is None:
            raise CannotStart(last_words(directory) or "the supervisor ended without a word")
        time.sleep(POLL_S)
    raise CannotStart(f"not up after {timeout_s:g} s; see the logs in {directory.logs}")


def stop(directory: RunDirectory, grace_s: float, watch: Watcher) -> bool:
    """Stops whatever runs in the directory, gracefully, then by force. False when nothing was running."""
    pid = directory.holder()
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_WAVES * (grace_s + 2.0)
    while directory.holder() == pid:
        if time.monotonic() > deadline:  # its children die with it
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            deadline += 5.0
        current = state.read(directory.state)
        if current is not None:
            watch(current)
        time.sleep(POLL_S)
    return True


def supervise(directory: RunDirectory, name: str, log_bytes: int, level: str, make: Callable[[], Runs]) -> int:
    """Be the supervisor that `start` started: hold the directory, log to `name` there, run. The exit status."""

    async def live() -> int:
        return await make().run()

    try:
        with directory.hold():
            _log_to(directory.log(name), log_bytes, level)
            return asyncio.run(live())
    except (AlreadyRunning, CannotStart) as error:
        print(error, file=sys.stderr)
        return 1


def last_words(directory: RunDirectory) -> str:
    """The end of the supervisor's own output."""
    try:
        lines = directory.log(OUTPUT).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-15:])


def _log_to(path: Path, log_bytes: int, level: str) -> None:
    handler = RotatingFileHandler(path, maxBytes=log_bytes, backupCount=1, encoding="utf-8")
    handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = [f"{key}={value}" for key, value in getattr(record, "facts", {}).items()]
        return " ".join([super().format(record), *facts])
