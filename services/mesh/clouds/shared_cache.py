"""One store of key-value blocks for all clouds: a Valkey or Redis between them, which holds what their caches keep.

Blocks are named by digest, so one made in one cloud is good in every other. Off unless asked for: what a request
that must stay in a region leaves in it lies outside that region.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from services.mesh.process import Program

NAME = "shared-cache"
SERVERS = ("valkey-server", "redis-server")
MEMORY_MB = 256
TIMEOUT_MS = 200
"""A block may take this long; far more than it does between processes of one machine."""


@dataclass(frozen=True, slots=True)
class SharedCache:
    """Where it listens, and its password, new in every run: others on the machine reach the port, too."""

    server: str
    address: str
    port: int
    password: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    def program(self, log: Path) -> Program:
        """How it is run: in memory only, bounded, oldest out first."""
        options = {
            "--bind": self.address,
            "--port": str(self.port),
            "--requirepass": self.password,
            "--maxmemory": f"{MEMORY_MB}mb",
            "--maxmemory-policy": "allkeys-lru",
            "--save": "",
            "--appendonly": "no",
        }
        command = (self.server, *(part for pair in options.items() for part in pair))
        return Program(NAME, command, {}, log, probe=self._answers)

    def environment(self) -> dict[str, str]:
        """What the cache services are told: no tier of their own, as blocks only sink when a tier is full."""
        return {
            "AUTOGLM_REDIS_URL": f"redis://:{self.password}@{self.address}:{self.port}/0",
            "AUTOGLM_REDIS_TIMEOUT_MS": str(TIMEOUT_MS),
            "AUTOGLM_CACHE_MEMORY_BYTES": "0",
            "AUTOGLM_CACHE_DISK_BYTES": "0",
        }

    async def _answers(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(self.address, self.port)
        except OSError:
            return False
        writer.close()
        return True


def find(address: str, port: int) -> SharedCache | None:
    """None when no server is installed."""
    server = next((found for name in SERVERS if (found := shutil.which(name))), None)
    return SharedCache(server, address, port) if server is not None else None
