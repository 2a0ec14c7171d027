"""Models shared by digest between the clouds: what is pushed into one cloud's cache can be fetched from any other's.

A folder in the run directory stands for the bucket (S3, GCS, Azure) that real clouds would share. Artifacts are model
files, never what a request leaves behind, so regions hold with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.mesh.clouds.network import Network
from services.mesh.clouds.state import CloudsState, CloudState

FOLDER = "artifacts"
VARIABLE = "AUTOGLM_CACHE_ARTIFACT_URL"
COMMAND_S = 120.0


class NotShared(Exception):
    """A model could not be pushed or pulled; the text is what the command said."""


def environment(root: Path, given: Mapping[str, str]) -> dict[str, str]:
    """What the cache services of all clouds are told; a store that the person has named comes first."""
    url = given.get(VARIABLE) or (root.absolute() / FOLDER).as_uri()
    return {VARIABLE: url}


def push(current: CloudsState, cloud: CloudState, place: Path) -> str:
    """Pushes a model into one cloud's cache; its digest. Raises `NotShared`."""
    return str(_command(current, cloud, "push", str(place))["digest"])


def pull(current: CloudsState, cloud: CloudState, digest: str, directory: Path) -> int:
    """Fetches a model from one cloud's cache; its bytes. Raises `NotShared`."""
    return int(_command(current, cloud, "pull", digest, str(directory))["bytes"])


def _command(current: CloudsState, cloud: CloudState, *arguments: str) -> dict[str, Any]:
    """`autoglm model …` inside the cloud: a cache's own port is reached from its own machine only."""
    inside = Network(current.key, 0).inside(cloud.name) if current.key else ()
    program = (sys.executable, "-m", "autoglm.cli", "model", *arguments, "--run-dir", str(cloud.run_dir), "--json")
    try:
        done = subprocess.run((*inside, *program), capture_output=True, text=True, timeout=COMMAND_S, check=False)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise NotShared(f"autoglm model {arguments[0]} in {cloud.name}: {error}") from None
    if done.returncode != 0:
        raise NotShared(f"autoglm model {arguments[0]} in {cloud.name}: {done.stderr.strip()[-500:]}")
    return found
