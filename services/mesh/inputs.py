"""What the running control loop translates from besides the policy: node and registry, as a file in the run directory.

The loop writes it, `diff` and `explain` read it: so they translate for the mesh that runs, and not for one like it.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from services.mesh.registry import Registry
from services.mesh.rundir import write_atomically
from services.mesh.translate import NodeSettings

FILE = "inputs.json"


@dataclass(frozen=True, slots=True, config=ConfigDict(arbitrary_types_allowed=False))
class Inputs:
    """The two, and the folder of the policy in force."""

    node: NodeSettings
    registry: Registry
    policy_dir: Path


_ADAPTER = TypeAdapter(Inputs)


def write(inputs: Inputs) -> None:
    """Replaces the file; readers see the old one or the new one."""
    write_atomically(inputs.node.run_directory / FILE, _ADAPTER.dump_json(inputs, indent=1).decode())


def read(run_directory: Path) -> Inputs | None:
    """The inputs, or None when there are none (or those of another version)."""
    try:
        return _ADAPTER.validate_json((run_directory / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
