"""What the supervisor tells the rest of the world about itself, as one JSON file in the run directory.

The commands only ever read this file; it is replaced atomically whenever something changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Progress(_Frozen):
    """How far a long start is; a total of 0 is unknown."""

    doing: str
    done: int
    total: int
    seconds: float


class ProcessState(_Frozen):
    """One supervised process."""

    name: str
    service: str
    phase: str
    pid: int | None
    restarts: int
    since_unix_s: float
    start_s: float
    last_exit: str
    ports: dict[str, int]
    inbound: dict[str, int] = {}
    """The sidecar's ports, by the same names."""
    metrics_port: int
    labels: dict[str, str]
    log: str
    last_line: str
    progress: Progress | None = None


class RouteWeight(_Frozen):
    """How much of a host's traffic a subset gets, as the policy in force says."""

    host: str
    route: str
    destination: str
    weight: int


class PolicyState(_Frozen):
    """The policy in force, and the newest edit if that was refused."""

    version: str = ""
    accepted_unix_s: float = 0.0
    accept_ms: float = 0.0
    warnings: list[str] = []
    refused: list[str] = []
    refused_unix_s: float = 0.0
    weights: list[RouteWeight] = []


class IdentityState(_Frozen):
    """The certificate of a service account that is in force."""

    account: str
    spiffe_id: str
    serial: str
    issued_unix_s: float
    expires_unix_s: float
    renew_unix_s: float
    count: int
    """How many it has had since the start."""


class Addresses(_Frozen):
    """Where things listen, as `host:port`."""

    ingress: str
    outbound: dict[str, str] = {}
    """By service account."""
    admin: str
    otlp: str
    traces: str
    metrics: str = ""
    """The supervisor's own Prometheus page."""


class MeshState(_Frozen):
    """Everything."""

    phase: Literal["starting", "up", "failed", "stopping", "stopped"]
    pid: int
    started_unix_s: float
    up_s: float = Field(0.0, description="seconds from the start until everything was ready")
    reason: str = ""
    addresses: Addresses
    model: str = Field("", description="public name of the model that is served")
    model_dir: str = Field("", description="where it lies")
    processes: list[ProcessState] = []
    policy: PolicyState = PolicyState()
    identities: list[IdentityState] = []


def read(path: Path) -> MeshState | None:
    """The state, or None when there is none yet (or one of another version)."""
    try:
        return MeshState.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
