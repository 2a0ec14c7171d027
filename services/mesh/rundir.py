"""The run directory: who holds it (a lock that dies with its owner), where things lie, and writes never half done."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_ATTEMPTS = 10
LOCK_PAUSE_S = 0.02


class AlreadyRunning(Exception):
    """Another supervisor holds the run directory."""


class RunDirectory:
    """Paths under one run directory. Making the object touches nothing."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.lock = self.root / "lock"
        self.state = self.root / "state.json"
        self.logs = self.root / "logs"
        self.envoy = self.root / "envoy"
        self.identity = self.root / "identity"

    def log(self, name: str) -> Path:
        """Where the output of process `name` goes."""
        return self.logs / f"{name}.log"

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Takes the lock for this process until the block ends. Raises `AlreadyRunning`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _lock(descriptor):
                raise AlreadyRunning(f"another mesh runs in {self.root}")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The pid of the supervisor that runs here. A stale file never counts: the lock ends with its process."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).decode().strip()
            return int(text) if text.isdigit() else None
        else:
            return None
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Tries for a moment: whoever only asks for the holder has the lock for some microseconds, too."""
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return True
    return False


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part; watchers of the folder see a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
