"""Runs a program of the mesh as a real process for a test: start, wait for its ready line, find its ports, stop it.

    with running("services.cache", AUTOGLM_CACHE_MEMORY_BYTES="1000000") as cache:
        channel = grpc.aio.insecure_channel(cache.address)

A process is ended by its own id only, and always, however the test ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
KEPT_LINES = 10_000

Line = dict[str, Any]


class Service:
    """One running program. `lines` are its log lines so far, oldest first; text that is not JSON is under "text"."""

    def __init__(self, module: str, environment: Mapping[str, str], arguments: tuple[str, ...] = ()) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("AUTOGLM_")}
        self.module = module
        self.lines: list[Line] = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env={**inherited, "AUTOGLM_OTLP_ENDPOINT": "", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read, name=f"log of {module}", daemon=True)
        self._reader.start()

    def wait_for(self, message: str, timeout_s: float = 30.0, after: int = 0) -> Line:
        """The first log line with this message at index `after` or later; fails with the log when none comes."""
        return self.wait_until(lambda line: line.get("message") == message, timeout_s, after)

    def wait_until(self, wanted: Callable[[Line], bool], timeout_s: float = 30.0, after: int = 0) -> Line:
        """The first log line that `wanted` accepts; fails with the log when the process ends or time runs out."""
        found: list[Line] = []

        def done() -> bool:
            found.extend(line for line in self.lines[after:] if wanted(line))
            return bool(found) or self._ended

        with self._changed:
            self._changed.wait_for(done, timeout_s)
        if not found:
            raise AssertionError(f"{self.module}: the awaited log line never came\n{self.log()}")
        return found[0]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def grpc_port(self) -> int:
        return int(self.wait_for("ready")["grpc_port"])

    @property
    def metrics_port(self) -> int:
        return int(self.wait_for("ready")["metrics_port"])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def metrics(self) -> str:
        """The Prometheus page as text."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as page:
            return str(page.read().decode())

    def children(self) -> list[int]:
        """Process ids of its direct children."""
        found: list[int] = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                found += map(int, (task / "children").read_text().split())
        return found

    def log(self, last: int = 40) -> str:
        """The last log lines as text, for a failure's message."""
        return "\n".join(json.dumps(line) for line in self.lines[-last:])

    def signal(self, number: signal.Signals) -> None:
        """Sends one signal to this process, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def terminate(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, then the exit status; fails when the program does not end by itself in time."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def kill(self) -> int:
        """SIGKILL; returns the exit status (negative signal number)."""
        self.signal(signal.SIGKILL)
        return self.wait(10)

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit status of a process that ends by itself."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.module} did not end within {timeout_s} s\n{self.log()}") from None
        self._reader.join(5)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for raw in stream:
                line = _parse(raw.decode(errors="replace").rstrip("\n"))
                with self._changed:
                    if len(self.lines) < KEPT_LINES:
                        self.lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def start(module: str, arguments: tuple[str, ...] = (), **environment: str) -> Service:
    """Starts `python -m module` without waiting; the caller must `kill` or `terminate` it."""
    return Service(module, environment, arguments)


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs: one that nobody has waited for yet is over, too."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rsplit(")", 1)[1].split()[0] != "Z"


@contextmanager
def running(
    module: str,
    arguments: tuple[str, ...] = (),
    ready: str | None = "ready",
    timeout_s: float = 30.0,
    **environment: str,
) -> Iterator[Service]:
    """Starts `python -m module`, waits for its ready line (`ready=None`: does not), and ends it on the way out."""
    service = Service(module, environment, arguments)
    try:
        if ready is not None:
            service.wait_for(ready, timeout_s)
        yield service
    finally:
        service.kill()


def _parse(text: str) -> Line:
    try:
        value = json.loads(text)
    except ValueError:
        return {"text": text}
    return value if isinstance(value, dict) else {"text": text}
