"""Settings of several clouds on one machine. Each cloud's own mesh reads `MeshSettings` as always."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from services.chassis.settings import ServiceSettings


class CloudsSettings(ServiceSettings):
    """What is started, and where it is kept."""

    clouds_dir: Path = Field(Path(".run/clouds"), description="lock, state and logs; each cloud has a folder below it")
    clouds_plan: Path = Field(Path("deploy/local/clouds.yaml"), description="which clouds there are")
    clouds_policy: Path = Field(Path("istio"), description="folder of all Istio YAML; each cloud's overlay is below it")
    issuer_dir: Path | None = Field(
        None, description="the key of the token issuer that all clouds trust; unset: issuer, below clouds_dir"
    )
    clouds_network: Literal["auto", "namespaces", "loopback"] = Field(
        "auto", description="namespaces need root; loopback addresses are reached without crossing a network"
    )
    clouds_free_ports: bool = Field(False, description="free ports instead of the usual ones, to have several runs")
    clouds_replicas: str = Field(
        "sparse-inference/v1=1", max_length=1024, description="replica counts of each cloud; name:… only for that one"
    )
    clouds_start_timeout_s: float = Field(180.0, gt=0, le=3600, description="how long one cloud may take to come up")
    clouds_restart_s: float = Field(1.0, gt=0, le=600, description="pause before a cloud that died is started again")
    clouds_shared_cache: bool = Field(
        False, description="one Valkey or Redis keeps the key-value blocks of all clouds; not where regions must hold"
    )
    clouds_shared_artifacts: bool = Field(
        True,
        description="caches share models by digest: in AUTOGLM_CACHE_ARTIFACT_URL, else in a folder of clouds_dir",
    )
    drain_grace_s: float = Field(10.0, ge=0, le=3600, description="how long running calls may finish on stop")
