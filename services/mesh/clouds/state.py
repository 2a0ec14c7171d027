"""What the supervisor of the clouds tells the commands: one JSON file, replaced whole."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from services.mesh import state
from services.mesh.rundir import RunDirectory
from services.mesh.state import MeshState

FILE = "clouds.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CloudState(_Frozen):
    """One cloud."""

    name: str
    locality: str
    address: str
    run_dir: Path
    policy: Path
    ports: dict[str, int]
    phase: str
    pid: int | None
    restarts: int

    @property
    def mesh(self) -> MeshState | None:
        """What its own supervisor says, if that is the one that runs now."""
        current = state.read(RunDirectory(self.run_dir).state)
        return current if current is not None and current.pid == self.pid else None


class CloudsState(_Frozen):
    """All of them."""

    pid: int
    network: str
    """`namespaces`, or `loopback` with the reason."""
    key: str
    """What the names of bridge and namespaces carry; empty on loopback."""
    phase: str
    reason: str = ""
    remark: str = ""
    """What was changed on this machine to make room."""
    one_way_ms: float
    issuer: Path
    """Folder of the issuer whose tokens every cloud takes."""
    clouds: list[CloudState]


def read(directory: RunDirectory) -> CloudsState | None:
    """The state, or None when there is none yet."""
    try:
        return CloudsState.model_validate_json((directory.root / FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
