"""Clouds to measure or to hurt: on free ports, with their own copy of all policy, gone when the block ends.

Used by benchmarks/cloud_failover.py and tests/mesh. What happened inside is read from each Envoy's access log.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from rich.console import Console

from benchmarks.harness import REPOSITORY, supervised
from services.mesh.clouds import asking, network, present, state
from services.mesh.clouds.state import CloudsState, CloudState
from services.mesh.rundir import RunDirectory
from services.mesh.state import MeshState

POLL_S = 0.02
DRAIN_S = 2.0


class Clouds:
    """Running clouds. Make it with `running_clouds`."""

    def __init__(self, directory: RunDirectory, policy: Path) -> None:
        self.directory, self.policy = directory, policy

    @property
    def state(self) -> CloudsState:
        current = state.read(self.directory)
        assert current is not None
        return current

    def cloud(self, name: str) -> CloudState:
        return next(cloud for cloud in self.state.clouds if cloud.name == name)

    def mesh(self, name: str) -> MeshState:
        """What the cloud's own supervisor says; it must be up."""
        mesh = self.cloud(name).mesh
        assert mesh is not None, f"{name} is not up"
        return mesh

    def is_up(self, name: str) -> bool:
        mesh = self.cloud(name).mesh
        return mesh is not None and mesh.phase == "up"

    def ingress(self, name: str) -> str:
        cloud = self.cloud(name)
        return f"{cloud.address}:{cloud.ports['ingress']}"

    def token(self, tenant: str = asking.TENANT, region: str = "") -> str:
        """A token that every cloud takes."""
        return asking.token(self.state.issuer, tenant, region)

    def pull(self, name: str) -> None:
        """The cloud vanishes from the network without a word."""
        network.pull(network.network(self.directory.root), name)

    def plug(self, name: str) -> None:
        """And is there again."""
        network.plug(network.network(self.directory.root), name)

    def kill(self, name: str) -> int:
        """kill -9 of its supervisor; every process of the cloud dies with it. The pid that died."""
        pid = self.cloud(name).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return pid

    def places(self, name: str, cluster: str) -> set[str]:
        """The regions that the cloud's Envoy has endpoints of for a cluster, by the start of its name."""
        folder = self.cloud(name).run_dir / "envoy" / "eds"
        for path in folder.glob(f"{cluster}*.json"):
            content = json.loads(path.read_bytes())
            return {group["locality"].get("region", "") for item in content["resources"] for group in item["endpoints"]}
        return set()

    def edit(self, file: str, change: Callable[[str], str]) -> None:
        """Rewrites one policy file below istio/ as an editor would: whole, by rename."""
        path = self.policy / file
        fresh = path.with_suffix(".edited")
        fresh.write_text(change(path.read_text()))
        fresh.rename(path)

    def served(self, name: str, listener: str, path: str) -> list[float]:
        """When each request came in at a listener of the cloud whose name begins so, in Unix seconds.

        Envoy writes its log every few seconds: read it when all is over.
        """
        log = self.cloud(name).run_dir / "envoy" / "access.log"
        found = []
        for line in log.read_text().splitlines() if log.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # Envoy died while it wrote
            if str(entry["listener"]).startswith(listener) and str(entry["path"]).endswith(path):
                found.append(datetime.fromisoformat(entry["start"]).timestamp())
        return sorted(found)

    def said(self, name: str, word: str) -> list[str]:
        """Lines of the cloud's own log, with their times, that have the word."""
        log = self.cloud(name).run_dir / "logs" / "mesh.log"
        return [line for line in log.read_text().splitlines() if word in line]

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> float:
        """Seconds until `condition` holds; looks again and again. Raises TimeoutError with `what`."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{what}: not within {timeout_s:g} s")
            time.sleep(POLL_S)
        return time.monotonic() - began


@contextmanager
def running_clouds(timeout_s: float = 240.0, **environment: str) -> Iterator[Clouds]:
    """Starts clouds with a copy of istio/ and stops them; logs are kept when the block fails."""
    root = Path(tempfile.mkdtemp(prefix="autoglm-clouds-"))
    policy = root / "istio"
    shutil.copytree(REPOSITORY / "istio", policy)
    directory = RunDirectory(root / "run")
    chosen = {
        "AUTOGLM_CLOUDS_DIR": str(directory.root),
        "AUTOGLM_CLOUDS_POLICY": str(policy),
        "AUTOGLM_CLOUDS_FREE_PORTS": "true",
        "AUTOGLM_DRAIN_GRACE_S": str(DRAIN_S),
    }
    try:
        with supervised(
            root, directory, chosen | environment, drain_s=2 * DRAIN_S, module="services.mesh.clouds"
        ) as supervisor:
            present.wait_up(directory, supervisor, timeout_s, Console(quiet=True))
            yield Clouds(directory, policy)
    finally:
        if network.is_possible():
            network.remove(network.network(directory.root))  # there is one left only if it had to be killed
