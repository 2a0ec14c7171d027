"""What a Prometheus on this machine scrapes: the pages of every process of the mesh, and Envoy's.

The supervisor keeps `prometheus/targets.json` in the run directory (file-based discovery); `configuration` is a whole
configuration around one or several of them, with the rules of deploy/observability.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from services.mesh.state import MeshState

RULES = Path("deploy/observability/prometheus")
RULE_FILES = ("envoy.yaml", "services.yaml", "alerts.yaml")
ENVOY_PAGE = "/stats/prometheus"
TARGETS = Path("prometheus/targets.json")
LOCAL = "local"


def cloud_of(root: Path) -> str:
    """The cloud a run directory belongs to: `…/clouds/<name>`, else the one there is."""
    return root.name if root.parent.name == "clouds" else LOCAL


def targets(state: MeshState, cloud: str) -> list[dict[str, Any]]:
    """Target groups as file-based discovery reads them. Every one has the labels `cloud`, `service` and `instance`."""
    host = state.addresses.admin.rpartition(":")[0]
    groups = [
        _group(f"{host}:{process.metrics_port}", cloud, process.service, process.name)
        for process in state.processes
        if process.metrics_port
    ]
    if state.addresses.metrics:
        groups.append(_group(state.addresses.metrics, cloud, "mesh", "mesh"))
    return [*groups, _group(state.addresses.admin, cloud, "envoy", "envoy", ENVOY_PAGE)]


def targets_text(state: MeshState, cloud: str) -> str:
    """The content of the targets file."""
    return json.dumps(targets(state, cloud), indent=1)


def configuration(roots: Iterable[Path], rules: Path, interval_s: float) -> dict[str, Any]:
    """A Prometheus configuration for the meshes in these run directories."""
    interval = f"{max(1, round(interval_s * 1000))}ms"  # Prometheus takes no fractions
    return {
        "global": {
            "scrape_interval": interval,
            "scrape_timeout": f"{min(10_000, round(interval_s * 1000))}ms",
            "evaluation_interval": interval,
        },
        "rule_files": [str((rules / name).absolute()) for name in RULE_FILES],
        "scrape_configs": [
            {
                "job_name": "autoglm",
                "file_sd_configs": [
                    {"files": [str(root.absolute() / TARGETS) for root in roots], "refresh_interval": "5s"}
                ],
            }
        ],
    }


def _group(address: str, cloud: str, service: str, instance: str, page: str = "/metrics") -> dict[str, Any]:
    labels = {"cloud": cloud, "service": service, "instance": instance, "__metrics_path__": page}
    return {"targets": [address], "labels": labels}
